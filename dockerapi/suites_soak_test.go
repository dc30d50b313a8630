//go:build vm && soak

// Suites of tests that docker's makers have written for dockerd, run against this server. For each test of a list it is known whether it passes, and why
// not where it does not. They are compiled from the Go module proxy by tools/build.sh; nothing of them is in this repository.
package main

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	"github.com/cradlestack/cradlestack/internal/golden"
	"github.com/cradlestack/cradlestack/internal/nomadtest"
	"github.com/cradlestack/cradlestack/test/programs"
)

// A suite is a list of tests, of packages each of which is a program.
type suite struct {
	name   string                                       // for tools/build.sh, and of its list in testdata/suites
	env    []string                                     // of its programs
	at     func(h *host, home string) ([]string, error) // where its programs find the server, where not by DOCKER_HOST: more of their environment
	more   []string                                     // of serve's options
	images map[string][]string                          // that it wants: names by the example image that they get, with what altered changes
}

// A suiteTest is a line of a list.
type suiteTest struct {
	program, name string
	quick         bool   // it belongs to the short form
	foreign       bool   // it asks for what this server is not to have
	reason        string // why it does not pass, "" where it has to

	result, said string // of the run: pass, skip or fail, and what the test itself says
}

func (s *suiteTest) String() string { return s.program + "/" + s.name }

// tell logs a result, with what the test says of a failure.
func (s *suiteTest) tell(t *testing.T) {
	t.Helper()
	if s.result == "fail" {
		t.Logf("%s %s\n%s", s.result, s, s.said)
		return
	}
	t.Logf("%s %s", s.result, s)
}

// suiteLine is a line: "+" for the short form, package and test, and a reason where it does not pass; "n/a: " before that where it is not to.
var suiteLine = regexp.MustCompile(`^(\+ )?(\S+)/(Test\w+)(?:: (n/a: )?(.+))?$`)

func (s *suite) list(t *testing.T) []*suiteTest {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("testdata", "suites", s.name+".txt"))
	if err != nil {
		t.Fatal(err)
	}
	var all []*suiteTest
	for line := range strings.Lines(string(text)) {
		if line = strings.TrimSpace(line); line == "" || line[0] == '#' {
			continue
		}
		m := suiteLine.FindStringSubmatch(line)
		if m == nil {
			t.Fatalf("%s.txt: %q is no line of a list", s.name, line)
		}
		all = append(all, &suiteTest{program: m[2], name: m[3], quick: m[1] != "", foreign: m[4] != "", reason: m[5]})
	}
	return all
}

// run runs tests and notes their results.
func (s *suite) run(h *host, tests []*suiteTest) {
	h.t.Helper()
	source, err := programs.Tool(s.name)
	if err != nil {
		h.t.Fatal(err)
	}
	modules, err := exec.Command("go", "env", "GOMODCACHE").Output()
	if err != nil {
		h.t.Fatal("go env GOMODCACHE: ", err)
	}
	byProgram := map[string][]*suiteTest{}
	for _, test := range tests {
		byProgram[test.program] = append(byProgram[test.program], test)
	}
	for _, program := range slices.Sorted(maps.Keys(byProgram)) {
		left := byProgram[program]
		work := filepath.Join(h.t.TempDir(), "source")
		if err := os.CopyFS(work, os.DirFS(filepath.Join(source, program))); err != nil {
			h.t.Fatal(err)
		}
		// gotest.tools/skip tells the condition by which a test skips itself, from its source: compiled with -trimpath, it is looked for here by its module.
		if err := os.Symlink(filepath.Join(strings.TrimSpace(string(modules)), "github.com"), filepath.Join(work, "github.com")); err != nil {
			h.t.Fatal(err)
		}
		// A test that takes the program down, or that hangs, has failed; another process runs those after it.
		for len(left) > 0 {
			s.once(h, filepath.Join(filepath.Dir(source), strings.ReplaceAll(program, "/", "-")+".test"), work, left)
			left = slices.DeleteFunc(left, func(s *suiteTest) bool { return s.result != "" })
		}
	}
}

// once runs a program until it ends, and notes at least one result.
func (s *suite) once(h *host, program, work string, tests []*suiteTest) {
	h.t.Helper()
	var names []string
	byName := map[string]*suiteTest{}
	for _, test := range tests {
		names, byName[test.name] = append(names, test.name), test
	}
	ctx, cancel := context.WithCancel(h.t.Context())
	defer cancel()
	node := h.c.Server()
	cmd := node.Command(ctx, "sh", "-c", `cd "$0" && exec "$@"`, work, program,
		"-test.v=test2json", "-test.parallel=1", "-test.timeout=0", "-test.run=^("+strings.Join(names, "|")+")$")
	home := h.t.TempDir()
	cmd.Env = slices.Concat(h.c.Env(), []string{"DOCKER_HOST=unix://" + h.socket, "DOCKER_CONFIG=" + h.config, "HOME=" + home, "TMPDIR=" + h.t.TempDir()}, s.env)
	if s.at != nil {
		more, err := s.at(h, home)
		if err != nil {
			h.t.Fatal(err)
		}
		cmd.Env = append(cmd.Env, more...)
	}
	told, err := cmd.StdoutPipe()
	if err != nil {
		h.t.Fatal(err)
	}
	cmd.Stderr = cmd.Stdout
	events := exec.CommandContext(ctx, "go", "tool", "test2json")
	events.Stdin = told
	out, err := events.StdoutPipe()
	if err != nil {
		h.t.Fatal(err)
	}
	if err := events.Start(); err != nil {
		h.t.Fatal(err)
	}
	if err := node.Launch(cmd); err != nil {
		h.t.Fatal(err)
	}
	hangs := time.AfterFunc(nomadtest.Patience, cancel)
	defer hangs.Stop()
	var current *suiteTest
	var beside strings.Builder // what is said outside of tests
	said := map[*suiteTest]*strings.Builder{}
	for lines := bufio.NewScanner(out); lines.Scan(); {
		var event struct{ Action, Test, Output string }
		if json.Unmarshal(lines.Bytes(), &event) != nil {
			continue
		}
		top, _, below := strings.Cut(event.Test, "/")
		test := byName[top]
		switch {
		case test == nil:
			beside.WriteString(event.Output)
		case event.Action == "run" && !below:
			current, said[test] = test, &strings.Builder{}
			hangs.Reset(nomadtest.Patience)
		case event.Action == "output":
			said[test].WriteString(event.Output)
		case !below && slices.Contains([]string{"pass", "skip", "fail"}, event.Action):
			test.result, test.said, current = event.Action, said[test].String(), nil
			test.tell(h.t)
		}
	}
	events.Wait()
	ended := cmd.Wait()
	switch {
	case current != nil:
		current.result, current.said = "fail", fmt.Sprintf("%sit has taken the program down: %v\n%s", said[current], ended, &beside)
		current.tell(h.t)
	case !slices.ContainsFunc(tests, func(s *suiteTest) bool { return s.result != "" }):
		h.t.Fatalf("%s has run none of %s: %v\n%s", program, strings.Join(names, ", "), ended, &beside)
	}
}

// judge compares the results with the list.
func judge(t *testing.T, tests []*suiteTest) {
	t.Helper()
	for _, s := range tests {
		switch {
		case s.result == "fail" && s.reason == "":
			t.Errorf("%s fails: see above", s)
		case s.result != "fail" && s.reason != "":
			t.Errorf("%s does not fail: it needs no reason any more (%s)", s, s.result)
		}
	}
}

// least is the part of a suite's tests that apply which has to pass.
const least = 0.9

// skipped is where a test says why it skips itself.
var skipped = regexp.MustCompile(`(?m)^\s+\S+\.go:\d+: (.*)$`)

// table is what docs/dockerapi-compat.md tells of a suite.
func (s *suite) table(t *testing.T, tests []*suiteTest) string {
	t.Helper()
	var rows strings.Builder
	var passing, failing, foreign int
	for _, test := range tests {
		result, reason := "", test.reason
		switch {
		case test.result == "pass":
			passing++
			result = "passes"
		case test.result == "skip":
			foreign++
			result = "not applicable"
			if m := skipped.FindStringSubmatch(test.said); m != nil {
				reason = "skips itself: `" + strings.ReplaceAll(m[1], "|", `\|`) + "`"
			}
		case test.foreign:
			foreign++
			result = "not applicable"
		default:
			failing++
			result = "**fails**"
		}
		fmt.Fprintf(&rows, "| %s | %s | %s |\n", test, result, reason)
	}
	part := float64(passing) / float64(passing+failing)
	if part < least {
		t.Errorf("%d of %d tests that apply pass, which is less than %.0f %%", passing, passing+failing, 100*least)
	}
	return fmt.Sprintf("%d pass, %d fail (%.1f %% of those that apply pass), %d do not apply.\n\n| test | result | reason |\n|---|---|---|\n%s", passing, failing, 100*part, foreign, &rows)
}

var moby = suite{
	name: "moby", env: []string{"DOCKER_REMOTE_DAEMON=1"},
	images: map[string][]string{
		"busybox": {"busybox:latest", "busybox:glibc", "hello-world:frozen", "hello-world:amd64", "hello-world:arm64", "arm32v7/hello-world:latest"},
		"debian":  {"debian:bookworm-slim"},
	},
}

// host is a server with the images that the suite wants.
func (s *suite) host(t *testing.T) *host {
	t.Helper()
	c := openCluster(t)
	h := openHostOn(t, c, append([]string{"--images", t.TempDir(), "--registry-listen", plainRegistry, "--volume-driver", "nfs", "--pods", filepath.Join(c.Server().Dir, "cradle")}, s.more...)...)
	c.RunVolumes(t)
	for from, names := range s.images {
		dir, err := programs.Image(from)
		if err != nil {
			t.Fatal(err)
		}
		img, err := programs.OnlyImage(dir)
		if err != nil {
			t.Fatal(err)
		}
		for i, name := range names {
			alter := altered[name]
			if i > 0 && alter == nil {
				h.run("tag", names[0], name)
				continue
			}
			own := img
			if alter != nil {
				own = alter(t, img)
			}
			if i == 0 {
				img = own
			}
			h.run("load", "-q", "-i", archive(t, name, own))
		}
	}
	return h
}

// altered are names whose images differ from the example images in what their tests look at.
var altered = map[string]func(*testing.T, v1.Image) v1.Image{
	"alpine:latest":                likeAlpine,
	"alpine/socat:latest":          datagrams,
	"arm32v7/hello-world:latest":   forARM,
	"influxdb:1.8.10-alpine":       pinged,
	"menedev/delayed-nginx:1.15.2": late,
	"nginx:alpine":                 nginxAlpine,
}

// likeAlpine is busybox with what alpine has: /var/run is /run.
func likeAlpine(t *testing.T, img v1.Image) v1.Image {
	t.Helper()
	return withFiles(t, img, nil, tar.Header{Name: "var/", Typeflag: tar.TypeDir, Mode: 0o755}, tar.Header{Name: "var/run", Typeflag: tar.TypeSymlink, Linkname: "/run", Mode: 0o777})
}

// nginxAlpine is nginx with busybox's programs that are in alpine's nginx, and not in Debian's.
func nginxAlpine(t *testing.T, img v1.Image) v1.Image {
	t.Helper()
	dir, err := programs.Image("busybox")
	if err != nil {
		t.Fatal(err)
	}
	busybox, err := programs.OnlyImage(dir)
	if err != nil {
		t.Fatal(err)
	}
	all := mutate.Extract(busybox)
	defer all.Close()
	for r := tar.NewReader(all); ; {
		f, err := r.Next()
		if err != nil {
			t.Fatal("the program of busybox: ", err)
		}
		if f.Typeflag != tar.TypeReg || path.Dir(f.Name) != "bin" { // all of them are links to the first
			continue
		}
		program, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		files := []tar.Header{{Name: "usr/bin/busybox", Typeflag: tar.TypeReg, Mode: 0o755, Size: int64(len(program))}}
		for _, name := range []string{"ash", "nc", "wget"} {
			files = append(files, tar.Header{Name: "usr/bin/" + name, Typeflag: tar.TypeSymlink, Linkname: "busybox", Mode: 0o777})
		}
		return withFiles(t, img, program, files...)
	}
}

// withFiles is an image with a layer more. Content is that of the one which is a regular file.
func withFiles(t *testing.T, img v1.Image, content []byte, files ...tar.Header) v1.Image {
	t.Helper()
	var packed bytes.Buffer
	w := tar.NewWriter(&packed)
	for _, f := range files {
		if err := w.WriteHeader(&f); err != nil {
			t.Fatal(err)
		}
		if f.Typeflag == tar.TypeReg {
			if _, err := w.Write(content); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(packed.Bytes())), nil })
	if err == nil {
		img, err = mutate.AppendLayers(img, layer)
	}
	if err != nil {
		t.Fatal(err)
	}
	return img
}

// late is an image whose command begins some seconds later.
func late(t *testing.T, img v1.Image) v1.Image {
	t.Helper()
	return configured(t, img, func(c *v1.ConfigFile) {
		c.Config.Entrypoint = append([]string{"sh", "-c", `sleep 5; exec "$0" "$@"`}, c.Config.Entrypoint...)
	})
}

// datagrams is busybox that answers at UDP port 8080, whatever its arguments.
func datagrams(t *testing.T, img v1.Image) v1.Image {
	t.Helper()
	return configured(t, img, func(c *v1.ConfigFile) { c.Config.Entrypoint = []string{"sh", "-c", "exec nc -l -u -p 8080 -e cat"} })
}

// pinged is nginx that answers as influxdb does whether it is there.
func pinged(t *testing.T, img v1.Image) v1.Image {
	t.Helper()
	conf := []byte("server { listen 8086; location /ping { return 204; } }\n")
	return withFiles(t, img, conf, tar.Header{Name: "etc/nginx/conf.d/ping.conf", Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(conf))})
}

// forARM is an image that says it is of another platform than the nodes are.
func forARM(t *testing.T, img v1.Image) v1.Image {
	t.Helper()
	return configured(t, img, func(c *v1.ConfigFile) { c.Architecture, c.Variant = "arm", "v7" })
}

// configured is an image with another configuration.
func configured(t *testing.T, img v1.Image, change func(*v1.ConfigFile)) v1.Image {
	t.Helper()
	c, err := img.ConfigFile()
	if err == nil {
		c = c.DeepCopy()
		change(c)
		img, err = mutate.ConfigFile(img, c)
	}
	if err != nil {
		t.Fatal(err)
	}
	return img
}

// The tests of moby's list that take little time.
func TestVMMoby(t *testing.T) {
	tests := slices.DeleteFunc(moby.list(t), func(s *suiteTest) bool { return !s.quick })
	moby.run(moby.host(t), tests)
	judge(t, tests)
}

var testcontainers = suite{
	// Where it runs in a container itself it would look for published ports at the gateway.
	name: "testcontainers", env: []string{"TESTCONTAINERS_RYUK_DISABLED=true", "TESTCONTAINERS_HOST_OVERRIDE=localhost"},
	images: map[string][]string{
		"busybox":  {"alpine:latest", "registry.hub.docker.com/library/alpine:latest", "alpine/socat:latest"},
		"debian":   {"bash:5.2.26", "public.ecr.aws/amazonlinux/amazonlinux:2023"},
		"nginx":    {"nginx:latest", "nginx:alpine", "nginx:mainline", "menedev/delayed-nginx:1.15.2", "influxdb:1.8.10-alpine"},
		"redis":    {"redis:latest"},
		"mariadb":  {"mysql:8.0.36"},
		"postgres": {"postgis/postgis:latest"},
	},
}

var composeE2E = suite{
	name: "compose-e2e", at: composeContext, more: []string{"--host-paths"},
	images: map[string][]string{
		"busybox": {"alpine:latest", "busybox:latest"},
		"debian":  {"bash:latest"},
		"nginx":   {"nginx:latest", "nginx:alpine"},
	},
}

// composeContext makes docker's context cradle: each of these tests gives its docker commands an environment of their own, which knows contexts alone.
func composeContext(h *host, home string) ([]string, error) {
	compose, err := programs.Tool("compose")
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(h.t.Context(), "docker", "context", "create", "cradle", "--docker", "host=unix://"+h.socket)
	cmd.Env = append(os.Environ(), "DOCKER_CONFIG="+filepath.Join(home, ".docker"), "DOCKER_HOST=", "DOCKER_CONTEXT=")
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("docker context create: %w: %s", err, out)
	}
	if err := os.WriteFile(filepath.Join(home, ".docker", "config.json"), []byte("{}"), 0o600); err != nil { // they copy it where there is none
		return nil, err
	}
	return []string{"DOCKER_CONTEXT=cradle", "COMPOSE_E2E_BIN_PATH=" + compose}, nil
}

func TestVMSoakComposeE2E(t *testing.T) { composeE2E.soak(t) }

func TestVMSoakMoby(t *testing.T) { moby.soak(t) }

func TestVMSoakTestcontainers(t *testing.T) { testcontainers.soak(t) }

// Single tests of a list: -run TestVMSoakMoby -only 'TestLogs$'.
var only = flag.String("only", "", "of a suite's tests, run those whose names match alone, and leave the page that tells of them")

// soak runs all of a list, and compares the page that tells of it: -update writes it.
func (s *suite) soak(t *testing.T) {
	tests := s.list(t)
	if *only != "" {
		chosen, err := regexp.Compile(*only)
		if err != nil {
			t.Fatal(err)
		}
		tests = slices.DeleteFunc(tests, func(s *suiteTest) bool { return !chosen.MatchString(s.String()) })
	}
	s.run(s.host(t), tests)
	judge(t, tests)
	if *only != "" {
		return
	}
	page := filepath.Join("..", "docs", "dockerapi-compat.md")
	text, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	begin, end := "<!-- "+s.name+" -->\n", "<!-- /"+s.name+" -->"
	before, rest, ok := strings.Cut(string(text), begin)
	_, after, closed := strings.Cut(rest, end)
	if !ok || !closed {
		t.Fatalf("%s has no place for a table: %s…%s", page, strings.TrimSpace(begin), end)
	}
	golden.Compare(t, page, []byte(before+begin+s.table(t, tests)+end+after))
}
