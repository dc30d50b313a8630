package server

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"

	"github.com/hashicorp/nomad/api"
)

// idleConnections to Nomad are kept, for as many requests as come at once.
const idleConnections = 32

// newNomad makes a client of Nomad's that says what the policy of a token lacks where Nomad refuses something. c is not changed.
func newNomad(c api.Config) (*api.Client, error) {
	var base http.Client
	if c.HttpClient != nil {
		base = *c.HttpClient
	} else {
		t := http.DefaultTransport.(*http.Transport).Clone()
		t.TLSClientConfig, t.MaxIdleConnsPerHost = &tls.Config{MinVersion: tls.VersionTLS12}, idleConnections
		base.Transport = t
		if err := api.ConfigureTLS(&base, c.TLSConfig); err != nil {
			return nil, err
		}
		if u, err := url.Parse(c.Address); err == nil && u.Scheme == "unix" {
			t.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
				return new(net.Dialer).DialContext(ctx, "unix", u.EscapedPath())
			}
			c.Address = "http://127.0.0.1"
		}
	}
	if base.Transport == nil {
		base.Transport = http.DefaultTransport
	}
	base.Transport = denials{base.Transport}
	c.HttpClient = &base
	return api.NewClient(&c)
}

// denials completes Nomad's refusals, which say no more than "Permission denied".
type denials struct{ http.RoundTripper }

func (d denials) RoundTrip(r *http.Request) (*http.Response, error) {
	answer, err := d.RoundTripper.RoundTrip(r)
	if err != nil || answer.StatusCode != http.StatusForbidden {
		return answer, err
	}
	text, err := refusalText(answer)
	answer.Body.Close()
	if needed := capability(r); err == nil && needed != "" && strings.Contains(string(text), "Permission denied") { // an unknown token is another matter
		text = append(bytes.TrimSpace(text), []byte(": "+needed+" is needed")...)
	}
	answer.Body, answer.ContentLength = io.NopCloser(bytes.NewReader(text)), int64(len(text))
	answer.Header.Del("Content-Length")
	answer.Header.Del("Content-Encoding")
	return answer, nil
}

// refusalText reads what Nomad says, which it packs where nomad/api has asked for that.
func refusalText(answer *http.Response) ([]byte, error) {
	body := io.Reader(answer.Body)
	if answer.Header.Get("Content-Encoding") == "gzip" {
		z, err := gzip.NewReader(body)
		if err != nil {
			return nil, err
		}
		body = z
	}
	return io.ReadAll(io.LimitReader(body, 4<<10))
}

// CloseIdleConnections is what http.Client looks for.
func (d denials) CloseIdleConnections() {
	if c, ok := d.RoundTripper.(interface{ CloseIdleConnections() }); ok {
		c.CloseIdleConnections()
	}
}

// capability is what Nomad's policies call the right to a request (Nomad's HTTP API, "ACL Required" of each endpoint).
func capability(r *http.Request) string {
	read := r.Method == http.MethodGet
	of := func(name string) string {
		return "capability " + name + " in namespace " + or(r.URL.Query().Get("namespace"), api.DefaultNamespace)
	}
	either := func(reading, writing string) string {
		if read {
			return of(reading)
		}
		return of(writing)
	}
	path := strings.TrimPrefix(r.URL.Path, "/v1/")
	switch first, rest, _ := strings.Cut(path, "/"); first {
	case "jobs":
		return either("list-jobs", "submit-job")
	case "job":
		return either("read-job", "submit-job")
	case "allocations", "allocation", "evaluations", "evaluation", "event":
		return of("read-job")
	case "client":
		return of("alloc-exec")
	case "vars":
		return variable("list", r.URL.Query().Get("prefix")+"*", r)
	case "var":
		action := map[string]string{http.MethodGet: "read", http.MethodDelete: "destroy"}[r.Method]
		return variable(or(action, "write"), rest, r)
	case "volumes":
		return either("csi-list-volume", "csi-write-volume")
	case "volume":
		return either("csi-read-volume", "csi-write-volume")
	case "nodes", "node":
		return `node { policy = "read" }`
	}
	return ""
}

func variable(action, path string, r *http.Request) string {
	return "capability " + action + " of variables " + path + " in namespace " + or(r.URL.Query().Get("namespace"), api.DefaultNamespace)
}
