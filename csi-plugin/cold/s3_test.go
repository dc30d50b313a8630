package cold

import (
	"bufio"
	"context"
	"io"
	"net"
	"net/http"
	"sync"
	"testing"
	"time"
)

// A server that is there and stands still, in the middle of what it takes or gives, is one that is away: nobody waits for it for ever, as with it all other volumes' copies would.
func TestS3Stalled(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	over := make(chan struct{})
	var g sync.WaitGroup
	g.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			g.Go(func() {
				defer c.Close()
				r, err := http.ReadRequest(bufio.NewReaderSize(c, 1024))
				if err == nil && r.Method == http.MethodGet {
					_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 1000\r\nETag: \"e\"\r\nLast-Modified: Tue, 06 Jan 2026 16:00:00 GMT\r\n\r\nsome")
				}
				<-over // reads nothing more
			})
		}
	})
	defer g.Wait()
	defer close(over)
	defer l.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute) // guards against hanging
	defer cancel()
	b, err := OpenBucket(S3{Endpoint: "http://" + l.Addr().String(), Region: "us-east-1", Bucket: "copies", AccessKey: "a", SecretKey: "s", patience: 200 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	if data, err := b.Get(ctx, "x", 1000); err == nil || ctx.Err() != nil {
		t.Errorf("Get: %q, %v", data, err)
	}
	if err := b.Put(ctx, "x", make([]byte, 32<<20)); err == nil || ctx.Err() != nil { // more than the kernel's buffers take
		t.Errorf("Put: %v", err)
	}
}
