package s3

import (
	"net/http"
	"net/url"
	"strings"
	"testing"
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
