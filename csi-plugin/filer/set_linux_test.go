package main

import (
	"context"
	"encoding/json"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	consulapi "github.com/hashicorp/consul/api"
)

// A filer that stands by asks anew where Consul does not answer a question that waits, as its leader is lost with the active filer's host: it would stand by for as long as
// Consul keeps the question.
func TestCampaignAsksAnew(t *testing.T) {
	lost := make(chan struct{}, 1)
	mux := http.NewServeMux()
	answer := func(w http.ResponseWriter, v any) { _ = json.NewEncoder(w).Encode(v) }
	mux.HandleFunc("GET /v1/kv/cradle-filer/files/active", func(w http.ResponseWriter, r *http.Request) {
		p := &consulapi.KVPair{Key: "cradle-filer/files/active", Value: tenure{Member: "a", Session: "its"}.bytes(), ModifyIndex: 7}
		switch {
		case r.URL.Query().Get("index") != "": // until it is another one's
			lost <- struct{}{}
			<-r.Context().Done()
			return
		case len(lost) == 0:
			p.Session = "its"
		}
		w.Header().Set("X-Consul-Index", "7")
		answer(w, consulapi.KVPairs{p})
	})
	mux.HandleFunc("PUT /v1/session/create", func(w http.ResponseWriter, _ *http.Request) { answer(w, map[string]string{"ID": "own"}) })
	mux.HandleFunc("PUT /v1/txn", func(w http.ResponseWriter, _ *http.Request) { answer(w, map[string]any{}) })
	mux.HandleFunc("GET /v1/health/service/files-member", func(w http.ResponseWriter, _ *http.Request) { answer(w, []consulapi.ServiceEntry{}) })
	consul := httptest.NewServer(mux)
	t.Cleanup(consul.Close)
	client, err := consulapi.NewClient(&consulapi.Config{Address: consul.URL})
	if err != nil {
		t.Fatal(err)
	}
	m := &member{server: &server{}, log: slog.New(slog.DiscardHandler), lock: lock{client, "files"}}
	m.set.name, m.set.member = "files", "b"
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	session, former, err := m.campaign(ctx)
	if err != nil || session != "own" || former.Member != "a" {
		t.Errorf("it has %q of %+v, %v", session, former, err)
	}
	if !m.hasConsul() {
		t.Error("it says that Consul does not answer")
	}
}
