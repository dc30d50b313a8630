//go:build vm

package main

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/cradlestack/cradlestack/test/programs"
)

// The example, by docker compose itself.
func TestVMCompose(t *testing.T) {
	h := openHost(t)
	for _, name := range []string{"nginx", "postgres", "redis"} {
		if _, err := programs.Image(name); err != nil {
			t.Fatal(err)
		}
	}
	compose, err := programs.Tool("compose")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(h.config, "cli-plugins"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(compose, filepath.Join(h.config, "cli-plugins", "docker-compose")); err != nil {
		t.Fatal(err)
	}
	root, err := programs.Root()
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("SHOP_PASSWORD", "a secret")
	project := func(args ...string) []string {
		return append([]string{"compose", "--progress", "quiet", "--project-directory", filepath.Join(root, "examples", "compose")}, args...)
	}
	page := func() string {
		out, err := h.c.Server().Output(t.Context(), "curl", "-gsSf", "--retry", "60", "--retry-all-errors", "--retry-delay", "1", "http://127.0.0.1:8080/")
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(out)
	}
	t.Cleanup(func() { _, _ = h.try("", project("down", "-v")...) }) // where it has failed before, the network is in others' way
	// A database is made in a machine that is emulated: that takes as long as it takes.
	if out, err := h.command(t.Context(), project("up", "-d")...).CombinedOutput(); err != nil {
		t.Fatalf("compose up: %v\n%s", err, out)
	}
	if got := page(); !strings.HasPrefix(got, "visit 1: chair, lamp, says ") {
		t.Errorf("the page is %q", got)
	}
	services := strings.Split(h.run(project("ps", "--format", "{{.Service}} {{.State}}{{.Health}}")...), "\n")
	if slices.Sort(services); strings.Join(services, ",") != "app running,cache runninghealthy,db runninghealthy,web running" {
		t.Errorf("compose ps tells of %q", services)
	}
	if out := h.run(project("logs", "--no-log-prefix", "db")...); !strings.Contains(out, "ran /docker-entrypoint-initdb.d/goods.sql") {
		t.Errorf("compose logs of the database:\n%s", out)
	}
	h.want("2", project("exec", "-T", "cache", "redis-cli", "incr", "visits")...)
	h.want("chair\nlamp", project("run", "--rm", "-T", "report")...)
	h.run(project("up", "-d", "--scale", "app=2")...)
	answered := map[string]bool{}
	h.until("both to answer", func() bool {
		_, name, _ := strings.Cut(page(), "says ")
		answered[name] = true
		return len(answered) == 2
	})
	h.run(project("restart", "cache")...)
	h.run(project("stop", "web")...)
	h.run(project("start", "web")...)
	h.run(project("down", "-v")...)
	h.want("", "ps", "-aq")
	h.want("bridge\nnone", "network", "ls", "--format", "{{.Name}}")
}
