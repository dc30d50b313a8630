package gateway

import (
	"io"
	"net/http"
	"sync"
	"time"
)

// pace gives clients time as long as bytes come and go: so much without one.
func pace(handler http.Handler, stalled time.Duration) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		p := &paced{ResponseWriter: w, rc: http.NewResponseController(w), stalled: stalled}
		defer p.end()
		if r.Body != nil && r.Body != http.NoBody {
			r.Body = &pacedBody{r.Body, p}
		}
		handler.ServeHTTP(p, r)
	})
}

type paced struct {
	http.ResponseWriter
	rc      *http.ResponseController
	stalled time.Duration

	mu    sync.Mutex
	ended bool // the handler: what still reads the body has nothing to say about the connection
}

// end gives the server time for what is left of body and answer.
func (p *paced) end() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.ended = true
	_ = p.rc.SetReadDeadline(time.Now().Add(p.stalled))
	_ = p.rc.SetWriteDeadline(time.Now().Add(p.stalled))
}

func (p *paced) read(until time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.ended {
		_ = p.rc.SetReadDeadline(until)
	}
}

// Unwrap is for http.ResponseController.
func (p *paced) Unwrap() http.ResponseWriter { return p.ResponseWriter }

func (p *paced) Write(b []byte) (int, error) {
	_ = p.rc.SetWriteDeadline(time.Now().Add(p.stalled))
	return p.ResponseWriter.Write(b)
}

type pacedBody struct {
	io.ReadCloser
	by *paced
}

func (b *pacedBody) Read(p []byte) (int, error) {
	b.by.read(time.Now().Add(b.by.stalled))
	n, err := b.ReadCloser.Read(p)
	if err != nil {
		// From its end on the server reads in order to know when the client goes, which may be long.
		b.by.read(time.Time{})
	}
	return n, err
}
