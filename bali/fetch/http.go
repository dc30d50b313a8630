package fetch

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
)

// httpSource remembers what the first answer said about the file's version, so
// that a later part can't come from another one.
type httpSource struct {
	url *url.URL

	mu        sync.Mutex
	validator string // strong ETag, or Last-Modified
}

func newHTTP(u *url.URL) *httpSource { return &httpSource{url: u} }

func (s *httpSource) String() string { return redacted(s.url) }

func (s *httpSource) Open(ctx context.Context, offset int64) (Part, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.url.String(), nil)
	if err != nil {
		return Part{}, permanent{err}
	}
	req.Header.Set("User-Agent", "bali")
	// the file as it is: no transport may unpack it
	req.Header.Set("Accept-Encoding", "identity")
	s.mu.Lock()
	validator := s.validator
	s.mu.Unlock()
	switch {
	case offset > 0:
		req.Header.Set("Range", fmt.Sprintf("bytes=%d-", offset))
		if validator != "" {
			req.Header.Set("If-Range", validator)
		}
	case offset < 0:
		req.Header.Set("Range", fmt.Sprintf("bytes=%d", offset))
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		var ue *url.Error
		if errors.As(err, &ue) {
			err = ue.Err // it names the URL, with its password
		}
		return Part{}, err
	}
	part, err := s.accept(resp, offset, validator)
	if err != nil {
		resp.Body.Close()
	}
	return part, err
}

// accept checks that the answer is the part asked for, or all of the same file.
func (s *httpSource) accept(resp *http.Response, offset int64, validator string) (Part, error) {
	now := resp.Header.Get("ETag")
	if now == "" || strings.HasPrefix(now, "W/") {
		now = resp.Header.Get("Last-Modified")
	}
	switch resp.StatusCode {
	case http.StatusOK:
		if offset < 0 {
			return Part{}, permanent{ErrWhole}
		}
		if offset > 0 && validator != "" && now != validator {
			return Part{}, permanent{ErrChanged}
		}
		if offset == 0 {
			s.mu.Lock()
			s.validator = now
			s.mu.Unlock()
		}
		return Part{resp.Body, 0, resp.ContentLength}, nil
	case http.StatusPartialContent:
		if offset > 0 && validator != "" && now != validator {
			return Part{}, permanent{ErrChanged}
		}
		start, size, err := partSize(resp.Header.Get("Content-Range"), offset)
		return Part{resp.Body, start, size}, err
	case http.StatusRequestTimeout, http.StatusTooManyRequests:
		return Part{}, errors.New(resp.Status)
	case http.StatusRequestedRangeNotSatisfiable:
		return Part{}, permanent{ErrChanged}
	}
	if resp.StatusCode >= 500 {
		return Part{}, errors.New(resp.Status)
	}
	return Part{}, permanent{fmt.Errorf("the server answers %s", resp.Status)}
}

// partSize reads "bytes FIRST-LAST/SIZE".
func partSize(header string, offset int64) (start, size int64, err error) {
	wrong := permanent{fmt.Errorf("the server's Content-Range %q is not what was asked for", header)}
	span, total, ok := strings.Cut(strings.TrimPrefix(header, "bytes "), "/")
	if !ok {
		return 0, 0, wrong
	}
	first, _, ok := strings.Cut(span, "-")
	start, err = strconv.ParseInt(first, 10, 64)
	if !ok || err != nil || offset > 0 && start != offset {
		return 0, 0, wrong
	}
	if total == "*" {
		return start, -1, nil
	}
	size, err = strconv.ParseInt(total, 10, 64)
	if err != nil || size < 0 || offset < 0 && start != max(size+offset, 0) {
		return 0, 0, wrong
	}
	return start, size, nil
}
