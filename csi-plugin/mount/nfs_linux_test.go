package mount

import (
	"slices"
	"strings"
	"testing"
)

func TestNFSOptions(t *testing.T) {
	for options, want := range map[string][]string{
		"": {"hard"}, "vers=3,hard,timeo=100,retrans=3": {"vers=3", "hard", "timeo=100", "retrans=3"}, "vers=4.1,,sec=sys": {"vers=4.1", "sec=sys", "hard"},
	} {
		if got, err := parseNFSOptions(options); err != nil || !slices.Equal(got, want) {
			t.Errorf("%q: %q, %v", options, got, err)
		}
	}
	for _, options := range []string{
		"soft", "hard,softerr", "suid", "dev", "exec", "ro", "addr=192.0.2.1", "mountaddr=192.0.2.1", "clientaddr=::", "source=h:/", "fsc", "context=x", "hard timeo=1", "timeo=1 soft",
		"timeo=1\nsoft", "vers=4.1\x00", "timeo=-1", "sec=krb5/../x", "HARD", "hard\t", "x-systemd.automount", "_netdev", "nofail", "user",
	} {
		if got, err := parseNFSOptions(options); err == nil {
			t.Errorf("%q passes as %q", options, got)
		}
	}
}

func FuzzNFSOptions(f *testing.F) {
	f.Add("vers=3,hard,timeo=100,retrans=3")
	f.Add("vers=3,,=,soft=")
	f.Fuzz(func(t *testing.T, s string) {
		all, err := parseNFSOptions(s)
		if err != nil {
			return
		}
		for _, o := range all {
			if name, value, _ := strings.Cut(o, "="); !nfsOptions[name] || strings.ContainsAny(value, ", \t\n\x00=") {
				t.Errorf("%q lets %q pass", s, o)
			}
		}
	})
}
