package main

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"

	"github.com/cradlestack/cradlestack/driver-cradle/pod"
)

// demux takes docker's frames of two output streams apart (moby api/swagger.yaml, ContainerAttach, "Stream format").
func demux(r io.Reader, stdout, stderr io.Writer) error {
	var header [8]byte
	for {
		if _, err := io.ReadFull(r, header[:]); err == io.EOF {
			return nil
		} else if err != nil {
			return err
		}
		var w io.Writer
		switch header[0] {
		case 0, 1:
			w = stdout
		case 2:
			w = stderr
		default:
			return fmt.Errorf("frame of unknown stream %d", header[0])
		}
		if _, err := io.CopyN(w, r, int64(binary.BigEndian.Uint32(header[4:]))); err != nil {
			return err
		}
	}
}

// resize tells the size of a terminal, of a container or an exec.
func resize(ctx context.Context, g *pod.Guest, path string, width, height int) error {
	return g.Call(ctx, http.MethodPost, path+"/resize", url.Values{"h": {strconv.Itoa(height)}, "w": {strconv.Itoa(width)}}, nil, nil)
}
