// Command rawguest is the init of a machine that does nothing but move bytes over the control stream: what docker cp is compared with.
package main

import (
	"fmt"
	"io"
	"net/http"
	"os"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/driver-cradle/wire"
)

func main() {
	fmt.Fprintf(os.Stderr, "rawguest: %v\n", run())
	// The kernel panics when init ends; -no-reboot then ends QEMU.
}

// run answers POST /sink, which reads everything, and GET /source?bytes=N.
func run() error {
	for _, fs := range []string{"sysfs", "devtmpfs"} {
		dir := map[string]string{"sysfs": "/sys", "devtmpfs": "/dev"}[fs]
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(fs, dir, fs, 0, ""); err != nil {
			return fmt.Errorf("mount %s: %w", fs, err)
		}
	}
	port, err := wire.OpenPort()
	if err != nil {
		return err
	}
	mux := http.NewServeMux()
	mux.HandleFunc("POST /sink", func(w http.ResponseWriter, r *http.Request) {
		n, err := io.Copy(io.Discard, r.Body)
		fmt.Fprintf(w, "%d %v", n, err)
	})
	mux.HandleFunc("GET /source", func(w http.ResponseWriter, r *http.Request) {
		n, err := strconv.ParseInt(r.FormValue("bytes"), 10, 64)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		w.Header().Set("Content-Length", strconv.FormatInt(n, 10))
		chunk := make([]byte, 256<<10)
		for ; n > 0; n -= int64(len(chunk)) {
			chunk = chunk[:min(n, int64(len(chunk)))]
			if _, err := w.Write(chunk); err != nil {
				return
			}
		}
	})
	if err := port.Wait(); err != nil {
		return err
	}
	session, err := wire.Accept(port, nil)
	if err != nil {
		return err
	}
	return http.Serve(session, mux)
}
