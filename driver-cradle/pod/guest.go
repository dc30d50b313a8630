package pod

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"net/url"
)

// A Guest is the HTTP server of a pod that runs: the control calls of package wire and, for everything else, docker's container API (moby
// api/swagger.yaml). The host in URLs means nothing.
type Guest struct {
	Dial func(context.Context) (net.Conn, error)
}

// Guest is the server of a pod that some process attends to.
func (d *Dir) Guest() *Guest { return &Guest{Dial: d.Dial} }

// A GuestError is the guest's refusal of a call.
type GuestError struct {
	Code    int // HTTP status
	Message string
}

func (e *GuestError) Error() string { return e.Message }

// maxAnswer bounds an answer that is decoded: a guest may be hostile.
const maxAnswer = 16 << 20

// Call makes a call with a JSON body and a JSON answer; both may be nil.
func (g *Guest) Call(ctx context.Context, method, path string, query url.Values, in, out any) error {
	resp, err := g.Get(ctx, method, path, query, in)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if out == nil {
		return nil
	}
	return json.NewDecoder(io.LimitReader(resp.Body, maxAnswer)).Decode(out)
}

// Get makes a call and leaves the answer's body to the caller.
func (g *Guest) Get(ctx context.Context, method, path string, query url.Values, in any) (*http.Response, error) {
	req, err := newRequest(ctx, method, path, query, in)
	if err != nil {
		return nil, err
	}
	client := http.Client{
		Transport: &http.Transport{
			DialContext:        func(ctx context.Context, _, _ string) (net.Conn, error) { return g.Dial(ctx) },
			DisableKeepAlives:  true, // a stream costs nothing, and an idle one could be of a session that is gone
			DisableCompression: true,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	resp, err := client.Do(req)
	if err != nil {
		var u *url.Error
		if errors.As(err, &u) {
			err = u.Err
		}
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return nil, err
	}
	if err := refused(resp); err != nil {
		resp.Body.Close()
		return nil, err
	}
	return resp, nil
}

// A Stream is a connection that HTTP was upgraded to docker's raw stream on.
type Stream struct {
	net.Conn
	r *bufio.Reader
}

func (s *Stream) Read(p []byte) (int, error) { return s.r.Read(p) }

// CloseWrite tells the other side that its input has ended.
func (s *Stream) CloseWrite() error {
	if w, ok := s.Conn.(interface{ CloseWrite() error }); ok {
		return w.CloseWrite()
	}
	return nil
}

// Hijack makes a call that becomes a stream; in may be nil.
func (g *Guest) Hijack(ctx context.Context, path string, query url.Values, in any) (*Stream, error) {
	req, err := newRequest(ctx, http.MethodPost, path, query, in)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Connection", "Upgrade")
	req.Header.Set("Upgrade", "tcp")
	conn, err := g.Dial(ctx)
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	s := &Stream{conn, bufio.NewReaderSize(conn, 32<<10)}
	err = req.Write(conn)
	if err == nil {
		var resp *http.Response
		if resp, err = http.ReadResponse(s.r, req); err == nil { //nolint:bodyclose // the body is the stream, which the caller closes
			err = refused(resp) // what follows an upgrade is the stream, not a body
		}
	}
	if !stop() {
		err = context.Cause(ctx)
	}
	if err != nil {
		conn.Close()
		return nil, err
	}
	return s, nil
}

func newRequest(ctx context.Context, method, path string, query url.Values, in any) (*http.Request, error) {
	var body io.Reader
	if in != nil {
		data, err := json.Marshal(in)
		if err != nil {
			return nil, err
		}
		body = bytes.NewReader(data)
	}
	u := url.URL{Scheme: "http", Host: "guest", Path: path, RawQuery: query.Encode()}
	req, err := http.NewRequestWithContext(ctx, method, u.String(), body)
	if err == nil && in != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	return req, err
}

// refused turns docker's error answer into an error.
func refused(resp *http.Response) error {
	if resp.StatusCode < 300 || resp.StatusCode == http.StatusNotModified {
		return nil
	}
	var e struct{ Message string }
	data, err := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
	if err != nil || json.Unmarshal(data, &e) != nil || e.Message == "" {
		e.Message = resp.Status
	}
	return &GuestError{resp.StatusCode, e.Message}
}
