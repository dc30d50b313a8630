package network

import (
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/cradlestack/cradlestack/driver-cradle/wire"
)

func TestHostDNS(t *testing.T) {
	const stub = "nameserver 127.0.0.53\noptions edns0 trust-ad\nsearch example.org\n"
	for _, c := range []struct {
		name, conf, upstreams string
		want                  wire.DNS
	}{
		{
			"plain", "# comment\nnameserver 192.0.2.1\nnameserver 2001:db8::1 # the second\nsearch a.example b.example\noptions ndots:2 rotate\n", "",
			wire.DNS{Servers: []string{"192.0.2.1", "2001:db8::1"}, Search: []string{"a.example", "b.example"}, Options: []string{"ndots:2", "rotate"}},
		},
		{
			"stub", stub, "nameserver 192.0.2.7\nnameserver fe80::1%eth0\nnameserver 127.0.0.1\nsearch other.example\n",
			wire.DNS{Servers: []string{"192.0.2.7"}, Search: []string{"example.org"}, Options: []string{"edns0", "trust-ad"}},
		},
		{"stub without upstreams", stub, "", wire.DNS{Search: []string{"example.org"}, Options: []string{"edns0", "trust-ad"}}},
		{"one of two is local", "nameserver ::1\nnameserver 192.0.2.1\n", "nameserver 192.0.2.9\n", wire.DNS{Servers: []string{"192.0.2.1"}}},
		{"root as search domain", "nameserver 192.0.2.1\nsearch .\n", "", wire.DNS{Servers: []string{"192.0.2.1"}, Search: []string{}}},
		{"the last search counts", "search a\ndomain b\n", "", wire.DNS{Search: []string{"b"}}},
		{"nothing", "", "", wire.DNS{}},
		{"rubbish", "nameserver\nfoo bar\n;nameserver 192.0.2.1\nnameserver x.example\n", "", wire.DNS{}},
	} {
		t.Run(c.name, func(t *testing.T) {
			conf, upstreams := filepath.Join(t.TempDir(), "resolv.conf"), filepath.Join(t.TempDir(), "missing")
			if err := os.WriteFile(conf, []byte(c.conf), 0o600); err != nil {
				t.Fatal(err)
			}
			if c.upstreams != "" {
				if err := os.WriteFile(upstreams, []byte(c.upstreams), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			got, err := hostDNS(conf, upstreams)
			if err != nil {
				t.Fatal(err)
			}
			if len(got.Servers) == 0 {
				got.Servers = nil
			}
			if !reflect.DeepEqual(got, c.want) {
				t.Errorf("got %+v, want %+v", got, c.want)
			}
		})
	}
	if d, err := hostDNS("/nonexistent", "/nonexistent"); err != nil || len(d.Servers) != 0 {
		t.Errorf("without a resolv.conf: %+v, %v", d, err)
	}
}

func FuzzResolvConf(f *testing.F) {
	f.Add("nameserver 192.0.2.1\nsearch a b\noptions c\n")
	f.Fuzz(func(t *testing.T, text string) {
		d, err := parseResolvConf(strings.NewReader(text))
		if err != nil {
			return
		}
		for _, word := range append(append(d.Servers, d.Search...), d.Options...) {
			if word == "" || strings.ContainsAny(word, " \t\n") {
				t.Errorf("word %q", word)
			}
		}
	})
}
