package main

import (
	"archive/tar"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"regexp"
	"strings"

	"github.com/cradlestack/cradlestack/dockerapi/server"
)

// contextOptions are what a docker context says.
type contextOptions struct {
	host string
	tls  server.TLSFiles
}

// contextName is docker's rule for names of contexts (docker/cli cli/context/store).
var contextName = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.+-]+$`)

// writeContext writes the archive that docker context import takes (docker/cli cli/context/store: meta.json, tls/ENDPOINT/FILE).
func writeContext(w io.Writer, name string, o contextOptions) error {
	if !contextName.MatchString(name) || name == "default" {
		return errors.New("docker allows no context of that name: two or more letters, digits, _ . + and -, a letter or digit first, and not default")
	}
	u, err := url.Parse(o.host)
	if err != nil {
		return fmt.Errorf("--host: %w", err)
	}
	withTLS := o.tls != server.TLSFiles{}
	switch u.Scheme {
	case "unix":
		if withTLS {
			return errors.New("--tls-ca, --tls-cert and --tls-key are for a host tcp://…")
		}
	case "tcp":
		if o.tls.CA == "" || o.tls.Cert == "" || o.tls.Key == "" {
			return errors.New("the server wants to see a certificate: give --tls-ca, --tls-cert and --tls-key")
		}
	default:
		return fmt.Errorf("--host %s: write unix:///path or tcp://host:port", o.host)
	}
	meta, err := json.Marshal(map[string]any{
		"Name":     name,
		"Metadata": map[string]any{"Description": "microVM pods in Nomad"},
		"Endpoints": map[string]any{
			"docker": map[string]any{"Host": o.host, "SkipTLSVerify": false},
		},
	})
	if err != nil {
		return err
	}
	archive := tar.NewWriter(w)
	file := func(name string, data []byte) error {
		if err := archive.WriteHeader(&tar.Header{Name: name, Mode: 0o600, Size: int64(len(data)), Typeflag: tar.TypeReg}); err != nil {
			return err
		}
		_, err := archive.Write(data)
		return err
	}
	if err := file("meta.json", meta); err != nil {
		return err
	}
	if withTLS {
		for _, f := range [][2]string{{"ca.pem", o.tls.CA}, {"cert.pem", o.tls.Cert}, {"key.pem", o.tls.Key}} {
			data, err := os.ReadFile(f[1])
			if err != nil {
				return err
			}
			if !strings.Contains(string(data), "-----BEGIN ") {
				return fmt.Errorf("%s is no PEM file", f[1])
			}
			if err := file("tls/docker/"+f[0], data); err != nil {
				return err
			}
		}
	}
	return archive.Close()
}
