// Command agent is cradle-init with one more route, for measuring what the bare control stream carries.
package main

import (
	"io"
	"net/http"
	"os"
	"strconv"

	"github.com/cradlestack/cradlestack/driver-cradle/guest"
	"github.com/cradlestack/cradlestack/driver-cradle/guest/vdocker"
)

func main() {
	os.Exit(guest.Main(os.Args, func(p *guest.Pod) http.Handler {
		mux := http.NewServeMux()
		mux.Handle("/", vdocker.Handler(p))
		mux.HandleFunc("POST /raw", raw)
		return mux
	}))
}

// raw takes the connection over, takes n bytes and gives n bytes, with nothing done to them.
func raw(w http.ResponseWriter, r *http.Request) {
	in, _ := strconv.ParseInt(r.FormValue("in"), 10, 64)
	out, _ := strconv.ParseInt(r.FormValue("out"), 10, 64)
	conn, rw, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return
	}
	defer conn.Close()
	io.WriteString(conn, "HTTP/1.1 200 OK\r\n\r\n")
	buf := make([]byte, 1<<20)
	if _, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, io.LimitReader(rw.Reader, in), buf); err != nil {
		return
	}
	for out > 0 {
		n, err := conn.Write(buf[:min(out, int64(len(buf)))])
		if err != nil {
			return
		}
		out -= int64(n)
	}
	io.WriteString(conn, "!")
}
