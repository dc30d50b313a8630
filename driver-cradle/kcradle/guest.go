package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
)

// A guest is a pod's HTTP server, docker's API among it (moby api/swagger.yaml).
type guest struct {
	dial func(context.Context) (net.Conn, error)
}

// A refusal is an error answer.
type refusal struct {
	code    int
	message string
}

func (e *refusal) Error() string { return e.message }

func newRequest(ctx context.Context, method, path string, query url.Values, body any) (*http.Request, error) {
	var r io.Reader
	if body != nil {
		data, err := json.Marshal(body)
		if err != nil {
			return nil, err
		}
		r = bytes.NewReader(data)
	}
	u := url.URL{Scheme: "http", Host: "guest", Path: path, RawQuery: query.Encode()}
	req, err := http.NewRequestWithContext(ctx, method, u.String(), r)
	if err == nil && body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	return req, err
}

// call does one request; out may be nil.
func (g *guest) call(ctx context.Context, method, path string, query url.Values, body, out any) error {
	resp, err := g.get(ctx, method, path, query, body)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if out == nil {
		return nil
	}
	return json.NewDecoder(io.LimitReader(resp.Body, 16<<20)).Decode(out)
}

// get does one request and leaves the answer's body to the caller.
func (g *guest) get(ctx context.Context, method, path string, query url.Values, body any) (*http.Response, error) {
	req, err := newRequest(ctx, method, path, query, body)
	if err != nil {
		return nil, err
	}
	client := http.Client{Transport: &http.Transport{
		DialContext:        func(ctx context.Context, _, _ string) (net.Conn, error) { return g.dial(ctx) },
		DisableKeepAlives:  true,
		DisableCompression: true,
	}}
	resp, err := client.Do(req)
	if err != nil {
		var u *url.Error
		if errors.As(err, &u) {
			err = u.Err
		}
		return nil, err
	}
	return resp, check(resp)
}

// check turns an error answer into an error, and closes it.
func check(resp *http.Response) error {
	if resp.StatusCode < 300 || resp.StatusCode == http.StatusNotModified {
		return nil
	}
	defer resp.Body.Close()
	data, _ := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
	var e struct{ Message string }
	if json.Unmarshal(data, &e) != nil || e.Message == "" {
		e.Message = resp.Status
	}
	return &refusal{resp.StatusCode, e.Message}
}

// A stream is a connection that HTTP was upgraded to docker's raw stream on.
type stream struct {
	net.Conn
	r *bufio.Reader
}

func (s *stream) Read(p []byte) (int, error) { return s.r.Read(p) }

func (s *stream) closeWrite() error {
	if w, ok := s.Conn.(interface{ CloseWrite() error }); ok {
		return w.CloseWrite()
	}
	return nil
}

// hijack does one request that becomes a stream.
func (g *guest) hijack(ctx context.Context, path string, query url.Values, body any) (*stream, error) {
	req, err := newRequest(ctx, http.MethodPost, path, query, body)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Connection", "Upgrade")
	req.Header.Set("Upgrade", "tcp")
	conn, err := g.dial(ctx)
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	r := bufio.NewReaderSize(conn, 32<<10)
	err = req.Write(conn)
	var resp *http.Response
	if err == nil {
		resp, err = http.ReadResponse(r, req) //nolint:bodyclose // the body is the stream, which the caller closes
	}
	if err == nil && resp.StatusCode != http.StatusSwitchingProtocols && resp.StatusCode != http.StatusOK {
		if err = check(resp); err == nil {
			err = fmt.Errorf("unexpected answer %s", resp.Status)
		}
	}
	if err != nil {
		conn.Close()
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return nil, err
	}
	return &stream{conn, r}, nil
}

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
func (g *guest) resize(ctx context.Context, path string, width, height int) error {
	return g.call(ctx, http.MethodPost, path+"/resize", url.Values{"h": {strconv.Itoa(height)}, "w": {strconv.Itoa(width)}}, nil, nil)
}
