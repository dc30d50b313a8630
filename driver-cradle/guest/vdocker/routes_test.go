package vdocker

import (
	"net/http/httptest"
	"testing"
)

// TestRoutes asks what needs no pod.
func TestRoutes(t *testing.T) {
	h := Handler(nil)
	for _, tt := range []struct {
		method, target string
		status         int
		body           string
	}{
		{"GET", "/_ping", 200, "OK"},
		{"HEAD", "/_ping", 200, ""},
		{"GET", "/v1.43/_ping", 200, "OK"},
		{"GET", "/v1.23/_ping", 400, `{"message":"client version 1.23 is too old. Minimum supported API version is 1.24, please upgrade your client to a newer version"}` + "\n"},
		{"GET", "/v1.99/_ping", 400, `{"message":"client version 1.99 is too new. Maximum supported API version is 1.51"}` + "\n"},
		{"GET", "/v1.x/_ping", 404, `{"message":"page not found"}` + "\n"},
		{"GET", "/nosuch", 404, `{"message":"page not found"}` + "\n"},
		{"GET", "/images/json", 501, `{"message":"` + noImages + `"}` + "\n"},
		{"GET", "/images/a/b:c/json", 404, `{"message":"No such image: a/b:c"}` + "\n"},
		{"POST", "/v1.40/images/create", 501, `{"message":"` + noImages + `"}` + "\n"},
		{"GET", "/networks/x", 404, `{"message":"No such network: x"}` + "\n"},
		{"DELETE", "/networks/x", 501, `{"message":"` + noNetworks + `"}` + "\n"},
		{"DELETE", "/containers/x", 501, `{"message":"` + unsupported["DELETE /containers/{id}"] + `"}` + "\n"},
		{"GET", "/containers/x/attach/ws", 501, `{"message":"` + unsupported["GET /containers/{id}/attach/ws"] + `"}` + "\n"},
		{"POST", "/swarm/init", 501, `{"message":"` + noSwarm + `"}` + "\n"},
	} {
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequest(tt.method, tt.target, nil))
		if w.Code != tt.status || w.Body.String() != tt.body {
			t.Errorf("%s %s: %d %q, want %d %q", tt.method, tt.target, w.Code, w.Body, tt.status, tt.body)
		}
		if v := w.Header().Get("Api-Version"); v != "1.51" {
			t.Errorf("%s %s: Api-Version %q", tt.method, tt.target, v)
		}
	}
}
