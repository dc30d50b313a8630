package main

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestContext(t *testing.T) {
	pem := filepath.Join(t.TempDir(), "x.pem")
	if err := os.WriteFile(pem, []byte("-----BEGIN CERTIFICATE-----\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	withTLS := []string{"--tls-ca", pem, "--tls-cert", pem, "--tls-key", pem}
	for _, test := range []struct {
		args []string
		want string // the files, or the error
	}{
		{[]string{"cradle"}, "meta.json"},
		{append([]string{"cloud", "--host", "tcp://cloud:2376"}, withTLS...), "meta.json tls/docker/ca.pem tls/docker/cert.pem tls/docker/key.pem"},
		{[]string{"cloud", "--host", "tcp://cloud:2376"}, "the server wants to see a certificate"},
		{append([]string{"cradle"}, withTLS...), "are for a host tcp://"},
		{[]string{"default"}, "docker allows no context of that name"},
		{[]string{"x/y"}, "docker allows no context of that name"},
		{[]string{"cradle", "--host", "http://x"}, "write unix:///path or tcp://host:port"},
	} {
		var out, errs bytes.Buffer
		code := run(t.Context(), append([]string{"context"}, test.args...), &out, &errs)
		got := errs.String()
		if code == 0 {
			got = strings.Join(names(t, &out), " ")
		}
		if !strings.Contains(got, test.want) {
			t.Errorf("context %v: %s; want %s", test.args, got, test.want)
		}
	}
}

func names(t *testing.T, r io.Reader) (all []string) {
	t.Helper()
	for archive := tar.NewReader(r); ; {
		h, err := archive.Next()
		if errors.Is(err, io.EOF) {
			return all
		}
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, h.Name)
	}
}

func TestServeRefuses(t *testing.T) {
	for want, args := range map[string][]string{
		"nothing to listen on":                       {"--socket", ""},
		"--listen needs --clients":                   {"--socket", "", "--listen", "127.0.0.1:0"},
		"stat /nonexistent":                          {"--socket", "", "--listen", "127.0.0.1:0", "--clients", "/nonexistent"},
		"--registry-listen needs --images":           {"--registry-listen", "127.0.0.1:0"},
		"give --registry-url":                        {"--images", t.TempDir(), "--registry-listen", "0.0.0.0:0"},
		"--registry-url x:1: write https://":         {"--images", t.TempDir(), "--registry-url", "x:1"},
		"--socket: /dev/null is there and no socket": {"--socket", "/dev/null"},
		"unknown flag: --tsl-ca":                     {"--tsl-ca", "x"},
	} {
		var out, errs bytes.Buffer
		if code := run(t.Context(), append([]string{"serve"}, args...), &out, &errs); code != 1 || !strings.Contains(errs.String(), want) {
			t.Errorf("serve %v: %d %s; want %s", args, code, errs.String(), want)
		}
	}
}
