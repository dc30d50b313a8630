//go:build vm && soak

package main

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cradlestack/cradlestack/test/dockerd"
	"github.com/cradlestack/cradlestack/test/programs"
)

// enlarge gives the shop a larger database on the same volume: it is not made anew.
func (s *shop) enlarge() {
	s.compose("-f", filepath.Join(s.dir, "compose.yaml"), "-f", filepath.Join(s.dir, "compose.large.yaml"), "up", "-d", "--no-deps", "--wait", "db")
	s.say("memory", s.run("inspect", "-f", "{{.HostConfig.Memory}}", "shop-db-1"))
	if out := s.compose("logs", "--no-log-prefix", "db"); strings.Contains(out, "goods.sql") {
		s.t.Errorf("compose logs of the larger database:\n%s", out)
	}
	s.say("goods after it", s.goods())
}

// The example, here and with Debian's dockerd: what commands print is the same.
func TestVMSoakCompose(t *testing.T) {
	here, on := openShop(t)
	visit := func(t *testing.T, s *shop) {
		s.t = t
		s.visit()
		s.enlarge()
		s.close()
		s.check()
	}
	t.Run("here", func(t *testing.T) { visit(t, here) })
	there := &shop{dir: here.dir}
	t.Run("dockerd", func(t *testing.T) {
		home, err := os.MkdirTemp("", "dv")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { os.RemoveAll(home) })
		daemon := dockerd.ForNetworks(t, home)
		for _, name := range shopImages {
			layout, err := programs.Image(name)
			if err != nil {
				t.Fatal(err)
			}
			if err := daemon.LoadLayout(t.Context(), name+":latest", layout); err != nil {
				t.Fatal(err)
			}
		}
		there.docker = on(daemon.Host)
		there.curl = func(ctx context.Context, args ...string) (string, error) {
			out, err := daemon.Inside(ctx, "curl", args...).Output()
			return string(out), err
		}
		visit(t, there)
	})
	if got, want := strings.Join(here.said, "\n"), strings.Join(there.said, "\n"); got != want {
		t.Errorf("here it was\n%s\nwith dockerd\n%s", got, want)
	}
}
