package s3

import (
	"errors"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cradlestack/cradlestack/csi-plugin/filer/gateway"
)

func TestAccessKey(t *testing.T) {
	for _, c := range []struct{ header, query, want string }{
		{"AWS4-HMAC-SHA256 Credential=key/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0", "", "key"},
		{"AWS4-HMAC-SHA256 SignedHeaders=host,Credential=key/20260101/us-east-1/s3/aws4_request,Signature=0", "", "key"},
		{"", "X-Amz-Credential=key%2F20260101%2Fus-east-1%2Fs3%2Faws4_request", "key"},
		{"AWS4-HMAC-SHA256 Credential=a/x", "X-Amz-Credential=b%2Fx", "a"},
		{"AWS4-HMAC-SHA256 Signature=0", "X-Amz-Credential=b%2Fx", ""},
		{"AWS key:signature", "X-Amz-Credential=b%2Fx", ""},
		{"AWS4-HMAC-SHA256 Credential=key", "", ""},
		{"", "", ""},
	} {
		r := &http.Request{URL: &url.URL{RawQuery: c.query}, Header: http.Header{}}
		if c.header != "" {
			r.Header.Set("Authorization", c.header)
		}
		if got := accessKey(r); got != c.want {
			t.Errorf("%+v: %q", c, got)
		}
	}
}

func TestCheckBucket(t *testing.T) {
	for name, want := range map[string]bool{
		"abc": true, "a-b.c": true, strings.Repeat("a", 63): true,
		"": false, "ab": false, strings.Repeat("a", 64): false, "Abc": false, "a_b": false, "-ab": false, "ab-": false, "a..b": false, ".sgwtmp": false, "a/b": false,
	} {
		if err := CheckBucket(name); (err == nil) != want {
			t.Errorf("%q: %v", name, err)
		}
	}
}

// TestRevokedWhileWaiting: a request whose grant ends while it waits, for its turn, for memory, or for the end of a rollback, is not said to be done. A grant that is
// made again as it is ends none.
func TestRevokedWhileWaiting(t *testing.T) {
	for name, c := range map[string]struct {
		method, path string
		busy         func(t *testing.T, g *granted) // has it wait
	}{
		"turn": {"PUT", "/volume/object", func(t *testing.T, g *granted) {
			if _, err := g.limit.Begin(t.Context()); err != nil {
				t.Fatal(err)
			}
		}},
		"memory": {"POST", "/volume?delete", func(t *testing.T, g *granted) {
			if err := g.bodies.Acquire(t.Context(), maxBodies); err != nil {
				t.Fatal(err)
			}
		}},
		"rollback": {"PUT", "/volume/object", func(t *testing.T, g *granted) {
			go g.Gate.Hold(t.Context(), func() error { <-t.Context().Done(); return nil })
		}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s, err := New("/bin/true", filepath.Join(t.TempDir(), "s3"), 1e-6, slog.New(slog.NewTextHandler(t.Output(), nil))) // one request, and the next one in eleven days
				if err != nil {
					t.Fatal(err)
				}
				g := Grant{Key: "key", Secret: "secret", Volume: "volume", Root: t.TempDir(), Gate: &gateway.Gate{}}
				allow := func() {
					if err := s.Allow(g); err != nil {
						t.Fatal(err)
					}
				}
				allow()
				c.busy(t, s.grants["key"])
				synctest.Wait()
				answer := httptest.NewRecorder()
				r := httptest.NewRequest(c.method, c.path, strings.NewReader(strings.Repeat("x", 2*smallBody)))
				r.Header.Set("Authorization", "AWS4-HMAC-SHA256 Credential=key/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0")
				go s.ServeHTTP(answer, r)
				synctest.Wait()
				allow()
				synctest.Wait()
				if answer.Body.Len() > 0 {
					t.Errorf("one that waits is answered %d as its grant is made again: %s", answer.Code, answer.Body)
				}
				s.Forbid("key")
				if answer.Code != http.StatusServiceUnavailable {
					t.Errorf("what was not done is answered %d: %s", answer.Code, answer.Body)
				}
			})
		})
	}
}

// TestStuck: who ends a grant whose requests the storage keeps is told so, and waits for them once.
func TestStuck(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, err := New("/bin/true", filepath.Join(t.TempDir(), "s3"), 0, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		g := Grant{Key: "key", Secret: "secret", Volume: "volume", Root: t.TempDir()}
		if err := s.Allow(g); err != nil {
			t.Fatal(err)
		}
		kept := s.grants["key"]
		kept.working.Add(1)
		began := time.Now()
		for range 2 {
			if err := s.Forbid("key"); !errors.Is(err, gateway.ErrStuck) {
				t.Errorf("its end: %v", err)
			}
		}
		if err := s.Allow(g); !errors.Is(err, gateway.ErrStuck) {
			t.Errorf("made again: %v", err)
		}
		if waited := time.Since(began); waited != 10*time.Second {
			t.Errorf("all of that has taken %v", waited)
		}
		kept.working.Done()
		synctest.Wait()
		if err := errors.Join(s.Forbid("key"), s.Allow(g)); err != nil {
			t.Errorf("when the storage has answered: %v", err)
		}
		s.Close()
	})
}

// FuzzAccessKey: whatever a client says, a key is a part of what it has said.
func FuzzAccessKey(f *testing.F) {
	f.Add("AWS4-HMAC-SHA256 Credential=key/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0", "X-Amz-Credential=key%2Fx")
	f.Fuzz(func(t *testing.T, header, query string) {
		r := &http.Request{URL: &url.URL{RawQuery: query}, Header: http.Header{"Authorization": {header}}}
		key := accessKey(r)
		if strings.Contains(key, "/") || header != "" && !strings.Contains(header, key) {
			t.Errorf("%q", key)
		}
	})
}
