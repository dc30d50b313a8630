//go:build vm

package main

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cradlestack/cradlestack/internal/nomadtest"
	"github.com/cradlestack/cradlestack/test/programs"
)

// A shop is the example, as docker compose runs it.
type shop struct {
	t      *testing.T
	dir    string // of the example
	docker func(ctx context.Context, args ...string) *exec.Cmd
	curl   func(ctx context.Context, args ...string) (string, error)

	said []string // what commands have printed that is no docker's own matter
}

// run runs docker, which has to succeed.
func (s *shop) run(args ...string) string {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), 2*nomadtest.Patience) // a database is made in a machine that is emulated
	defer cancel()
	var stderr strings.Builder
	cmd := s.docker(ctx, args...)
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		s.t.Fatalf("docker %s: %v\n%s%s", strings.Join(args, " "), err, out, &stderr)
	}
	return strings.TrimSpace(string(out))
}

func (s *shop) compose(args ...string) string {
	s.t.Helper()
	return s.run(slices.Concat([]string{"compose", "--progress", "quiet", "--project-directory", s.dir}, args)...)
}

// say notes what a command has printed; the order of its lines is nobody's promise.
func (s *shop) say(what, printed string) {
	lines := strings.Split(printed, "\n")
	for i := range lines {
		lines[i] = strings.TrimSpace(lines[i])
	}
	slices.Sort(lines)
	s.said = append(s.said, what+": "+strings.Join(lines, "; "))
}

// page is what the shop shows, and which application has made it.
func (s *shop) page() (text, name string) {
	s.t.Helper()
	out, err := s.curl(s.t.Context(), "-gsSf", "--retry", "60", "--retry-all-errors", "--retry-delay", "1", "http://127.0.0.1:8080/")
	if err != nil {
		s.t.Fatal(err)
	}
	text, name, _ = strings.Cut(strings.TrimSpace(out), ", says ")
	return text, name
}

// visit does with the shop what its README does, and more.
func (s *shop) visit() {
	t := s.t
	t.Cleanup(func() { // where it has failed before, the network is in others' way
		ctx, cancel := context.WithTimeout(context.Background(), nomadtest.Patience)
		defer cancel()
		_ = s.docker(ctx, "compose", "--project-directory", s.dir, "down", "-v").Run()
	})
	s.compose("up", "-d")
	text, _ := s.page()
	s.say("page", text)
	s.say("ps", s.compose("ps", "--format", "{{.Service}} {{.State}} {{.Health}}"))
	s.say("port", s.compose("port", "web", "80"))
	if out := s.compose("logs", "--no-log-prefix", "db"); !strings.Contains(out, "ran /docker-entrypoint-initdb.d/goods.sql") {
		t.Errorf("compose logs of the database:\n%s", out)
	}
	s.say("exec", s.compose("exec", "-T", "cache", "redis-cli", "incr", "visits"))
	s.say("secret", s.compose("exec", "-T", "db", "cat", "/run/secrets/password"))
	config := filepath.Join(t.TempDir(), "site")
	s.compose("cp", "web:/etc/nginx/conf.d/default.conf", config)
	data, err := os.ReadFile(config)
	if err != nil {
		t.Fatal(err)
	}
	s.say("config", string(data))
	s.say("run of a profile", s.compose("run", "--rm", "-T", "report"))

	s.compose("up", "-d", "--scale", "app=2")
	answered := map[string]bool{}
	for begin := time.Now(); len(answered) < 2; {
		_, name := s.page()
		if answered[name] = true; time.Since(begin) > nomadtest.Patience {
			t.Fatalf("only %v have answered", answered)
		}
	}
	s.compose("restart", "cache")
	s.compose("stop", "web")
	s.compose("start", "web")
	s.say("goods", s.goods())
}

func (s *shop) goods() string {
	text, _ := s.page()
	_, goods, _ := strings.Cut(text, ": ")
	return goods
}

// close ends the shop, and then removes its data.
func (s *shop) close() {
	s.compose("down")
	volumes := []string{"volume", "ls", "-q", "--filter", "name=shop"} // those without a name are none here, and dockerd keeps them
	s.say("volumes", s.run(volumes...))
	s.compose("down", "-v")
	s.say("left", s.run("ps", "-aq")+s.run("network", "ls", "-q", "--filter", "type=custom")+s.run(volumes...))
}

// takeCompose gives docker its compose.
func (h *host) takeCompose() {
	h.t.Helper()
	compose, err := programs.Tool("compose")
	if err != nil {
		h.t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(h.config, "cli-plugins"), 0o700); err != nil {
		h.t.Fatal(err)
	}
	if err := os.Symlink(compose, filepath.Join(h.config, "cli-plugins", "docker-compose")); err != nil {
		h.t.Fatal(err)
	}
}

// openShop is the example here; on is docker with another host.
func openShop(t *testing.T) (here *shop, on func(host string) func(context.Context, ...string) *exec.Cmd) {
	t.Helper()
	h := openBeside(t)
	h.c.RunVolumes(t)
	h.takeCompose()
	for _, name := range shopImages {
		if _, err := programs.Image(name); err != nil {
			t.Fatal(err)
		}
	}
	root, err := programs.Root()
	if err != nil {
		t.Fatal(err)
	}
	on = func(host string) func(context.Context, ...string) *exec.Cmd {
		return func(ctx context.Context, args ...string) *exec.Cmd {
			cmd := h.command(ctx, args...)
			cmd.Env = append(cmd.Env, "DOCKER_HOST="+host, "SHOP_PASSWORD=a secret")
			return cmd
		}
	}
	return &shop{t: t, dir: filepath.Join(root, "examples", "compose"), docker: on("unix://" + h.socket), curl: func(ctx context.Context, args ...string) (string, error) {
		return h.c.Server().Output(ctx, "curl", args...)
	}}, on
}

var shopImages = []string{"nginx", "postgres", "redis"}

// check is that the shop has said what it does everywhere.
func (s *shop) check() {
	s.t.Helper()
	for _, line := range []string{
		"page: visit 1: chair, lamp", "ps: app running; cache running healthy; db running healthy; web running", "port: 0.0.0.0:8080", "exec: 2",
		"secret: a secret", "run of a profile: chair; lamp", "goods: chair, lamp", "volumes: shop_data", "left: ",
	} {
		if !slices.Contains(s.said, line) {
			s.t.Errorf("%q is not among\n%s", line, strings.Join(s.said, "\n"))
		}
	}
}

// The example, by docker compose itself. TestVMSoakCompose compares it with dockerd.
func TestVMCompose(t *testing.T) {
	here, _ := openShop(t)
	here.visit()
	here.close()
	here.check()
}
