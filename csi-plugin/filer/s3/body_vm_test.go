//go:build vm

package s3

import (
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"
)

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// TestRootBodies: what is no object's content is taken up to a bound, whether its length is said before or not, of who has the secret and who has not; nothing is kept
// in memory of what is one.
func TestRootBodies(t *testing.T) {
	w := serve(t)
	w.put(w.client("key", "secret"), "object", "x")
	const much, most = 256 << 20, 200 << 20
	for _, r := range []struct {
		method, object, query, secret string
		told                          bool
		code                          int
	}{
		{http.MethodPut, "large", "", "secret", true, http.StatusOK},
		{http.MethodPut, "object", "tagging", "secret", true, http.StatusBadRequest},
		{http.MethodPut, "object", "tagging", "secret", false, http.StatusBadRequest},
		{http.MethodPut, "object", "tagging", "wrong", false, http.StatusForbidden},
		{http.MethodPut, "object", "partNumber=1", "secret", true, http.StatusBadRequest},
		{http.MethodPost, "", "delete", "secret", false, http.StatusBadRequest},
		{http.MethodPost, "object", "uploadId=x", "secret", true, http.StatusBadRequest},
		{http.MethodGet, "object", "", "secret", true, http.StatusBadRequest},
	} {
		q, err := url.ParseQuery(r.query)
		if err != nil {
			t.Fatal(err)
		}
		u, err := w.client("key", r.secret).Presign(t.Context(), r.method, "bucket", r.object, time.Hour, q)
		if err != nil {
			t.Fatal(err)
		}
		req, err := http.NewRequestWithContext(t.Context(), r.method, u.String(), io.LimitReader(zeros{}, much))
		if err != nil {
			t.Fatal(err)
		}
		if req.ContentLength = -1; r.told {
			req.ContentLength = much
		}
		// The server may end the connection before it has taken all.
		if resp, err := http.DefaultTransport.RoundTrip(req); err != nil {
			t.Logf("%+v: %v", r, err)
		} else if resp.Body.Close(); resp.StatusCode != r.code {
			t.Errorf("%+v is answered by %s", r, resp.Status)
		}
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", w.process("key")))
		if err != nil {
			t.Fatal(err)
		}
		_, peak, _ := strings.Cut(string(text), "VmHWM:")
		kib, err := strconv.Atoi(strings.Fields(peak)[0])
		if err != nil || kib<<10 > most {
			t.Errorf("%+v: the process has had %d KiB, %v", r, kib, err)
		}
	}
	w.want(w.client("key", "secret"), "object", "x")
}
