// Package jsonhttp asks servers in JSON, at unix sockets or elsewhere. It imports nothing of the product.
package jsonhttp

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
)

// A Refusal is an answer that is an error.
type Refusal struct {
	Code int    // of HTTP
	Body []byte // as the server has sent it
}

func (r *Refusal) Error() string { return fmt.Sprintf("%d %s", r.Code, http.StatusText(r.Code)) }

// Call asks the server at a unix socket: in is what is sent and out what the answer is read into, nil for nothing. Errors wrap what connecting said, or a
// Refusal.
func Call(ctx context.Context, socket, method, path string, in, out any) error {
	transport := &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}}
	return Do(ctx, transport, method, "http://unix"+path, nil, in, out)
}

// maxAnswer bounds what is read of an answer.
const maxAnswer = 64 << 20

// Do is Call for the server of a URL.
func Do(ctx context.Context, transport http.RoundTripper, method, url string, header http.Header, in, out any) error {
	var body io.Reader
	if in != nil {
		data, err := json.Marshal(in)
		if err != nil {
			return err
		}
		body = bytes.NewReader(data)
	}
	req, err := http.NewRequestWithContext(ctx, method, url, body)
	if err != nil {
		return err
	}
	if header != nil {
		req.Header = header
	}
	resp, err := transport.RoundTrip(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	if err != nil {
		return err
	}
	if len(data) > maxAnswer {
		return fmt.Errorf("its answer: it has more than %d MiB", maxAnswer>>20)
	}
	if resp.StatusCode >= 300 {
		return &Refusal{resp.StatusCode, data}
	}
	if out == nil {
		return nil
	}
	if err := json.Unmarshal(data, out); err != nil {
		return fmt.Errorf("its answer: %w", err)
	}
	return nil
}
