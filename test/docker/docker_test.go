//go:build vm

package docker

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/cradlestack/cradlestack/test/dockerd"
	"github.com/cradlestack/cradlestack/test/programs"
)

// caseTimeout bounds one case on one side.
const caseTimeout = 5 * time.Minute

// maxOutput is how much of a stream is compared and shown.
const maxOutput = 1 << 20

// megabyte is one of bytes that are no text.
var megabyte = func() string {
	b := make([]byte, 1<<20)
	for i := range b {
		b[i] = byte(i*i>>3 ^ i)
	}
	return string(b)
}()

// An outcome is what a case shows of itself.
type outcome struct {
	stdout, stderr string
	code           int
}

// TestVMSameAsDocker runs every case on dockerd and on kcradle. What differs must be listed in docs/docker-differences.md, and what is
// listed there must differ.
func TestVMSameAsDocker(t *testing.T) {
	dir := shortTempDir(t)
	t.Setenv("CALLER_VARIABLE", "from the caller")
	all := images(t)
	d := newDocker(t, dir, all)
	k := newKcradle(t, dir, all)
	differ := kcradleDiffers(t)
	for i, c := range cases {
		if c.image == "" {
			c.image = "plain"
		}
		container := fmt.Sprintf("case%d", i)
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			differ.compare(t, c, func() outcome { return d.run(t, c, container) }, func() outcome { return k.run(t, c, container) })
		})
	}
}

func TestCasesAreNamedOnce(t *testing.T) {
	seen := map[string]bool{}
	for _, c := range cases {
		if seen[c.name] {
			t.Errorf("two cases are named %s", c.name)
		}
		seen[c.name] = true
	}
	if len(seen) < 60 {
		t.Errorf("%d cases; at least 60 are promised", len(seen))
	}
	for name := range kcradleDiffers(t).listed {
		if !seen[name] {
			t.Errorf("docs/docker-differences.md lists %q, which is no case", name)
		}
	}
}

// String shows an outcome in a failure.
func (o outcome) String() string {
	return fmt.Sprintf("exit code %d\n--- stdout\n%s\n--- stderr\n%s", o.code, shown(o.stdout), shown(o.stderr))
}

func shown(s string) string {
	if len(s) > 4096 {
		return fmt.Sprintf("%q… (%d bytes)", s[:512], len(s))
	}
	return s
}

// A comparison is of dockerd with something, whose differences a document lists: case → the row's last cell.
type comparison struct {
	document, with string
	listed         map[string]string
}

// differences reads the rows | `case` | … of a document.
func differences(t *testing.T, document, with string) comparison {
	t.Helper()
	root, err := programs.Root()
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join(root, "docs", document))
	if err != nil {
		t.Fatal(err)
	}
	listed := map[string]string{}
	for _, row := range regexp.MustCompile("(?m)^\\| `([^`]+/[^`]+|diff|export)` \\|.*\\| ([^|]+) \\|$").FindAllSubmatch(text, -1) {
		listed[string(row[1])] = string(row[2])
	}
	return comparison{document, with, listed}
}

// kcradleDiffers is what kcradle does otherwise.
func kcradleDiffers(t *testing.T) comparison {
	t.Helper()
	return differences(t, "docker-differences.md", "kcradle")
}

// compare runs a case on both at once.
func (d comparison) compare(t *testing.T, c testCase, docker, other func() outcome) {
	t.Helper()
	var want, got outcome
	var both sync.WaitGroup
	both.Go(func() { want = docker() })
	both.Go(func() { got = other() })
	both.Wait()
	if t.Failed() {
		return
	}
	if c.onlyCode || c.onlyFailure {
		want.stderr, got.stderr = "", ""
	}
	if c.onlyFailure && want.code != 0 && got.code != 0 {
		got.code = want.code
	}
	reason, differs := d.listed[c.name]
	switch {
	case want == got && differs:
		t.Errorf("no difference any more; take it out of docs/%s (%s)", d.document, reason)
	case want != got && !differs:
		t.Errorf("dockerd %s\n%s %s", want, d.with, got)
	}
}

// execute runs a command and takes an outcome from it.
func execute(t *testing.T, env []string, dir, stdin, program string, args ...string) outcome {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), caseTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), env...)
	cmd.Stdin = strings.NewReader(stdin)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	// A program that is killed may leave a child with its pipes open.
	cmd.WaitDelay = 5 * time.Second
	err := cmd.Run()
	var exit *exec.ExitError
	if ctx.Err() != nil {
		t.Errorf("%s %q: still running after %s\n%s%s", program, args, caseTimeout, shown(stdout.String()), shown(stderr.String()))
	} else if err != nil && !errors.As(err, &exit) {
		t.Errorf("%s %q: %v", program, args, err)
	}
	return outcome{stdout: first(stdout.String()), stderr: first(stderr.String()), code: cmd.ProcessState.ExitCode()}
}

func first(s string) string { return s[:min(len(s), maxOutput)] }

// script runs a case's script, which finds docker's host in its environment.
func script(t *testing.T, host, container, dir, text string) outcome {
	t.Helper()
	return execute(t, []string{"DOCKER_HOST=" + host, "c=" + container, "TMPDIR=" + dir}, dir, "", "sh", "-u", "-c", text)
}

// dockerSide is Debian's dockerd.
type dockerSide struct {
	host, dir string
}

func newDocker(t *testing.T, dir string, all map[string]v1.Image) *dockerSide {
	t.Helper()
	home := filepath.Join(dir, "d")
	if err := os.Mkdir(home, 0o700); err != nil {
		t.Fatal(err)
	}
	daemon := dockerd.ForTest(t, home)
	for name, image := range all {
		if err := daemon.Load(t.Context(), "compat/"+name+":1", image); err != nil {
			t.Fatal(err)
		}
	}
	return &dockerSide{daemon.Host, home}
}

func (d *dockerSide) run(t *testing.T, c testCase, container string) outcome {
	dir, err := os.MkdirTemp(d.dir, "case")
	if err != nil {
		t.Error(err)
		return outcome{}
	}
	args := []string{"-H", d.host, "run", "--name", container, "--network", "none"}
	if c.script != "" {
		args = append(args, "-d")
	}
	args = slices.Concat(args, c.flags, c.dockerFlags, []string{"compat/" + c.image + ":1"}, c.cmd)
	defer func() {
		// Where run was refused there may be no container.
		exec.Command("docker", "-H", d.host, "rm", "-fv", container).Run()
	}()
	ran := execute(t, nil, dir, c.stdin, "docker", args...)
	if c.script == "" {
		return ran
	}
	if ran.code != 0 {
		t.Errorf("docker run: %s", ran)
		return ran
	}
	return script(t, d.host, container, dir, c.script)
}

// refused is docker run's code for what it does not even try; kcradle summon fails with 1, as docker create does.
const refused = 125

// kcradleSide is ours.
type kcradleSide struct {
	program, dir string
	layouts      map[string]string
}

func newKcradle(t *testing.T, dir string, all map[string]v1.Image) *kcradleSide {
	t.Helper()
	program, err := programs.Path("kcradle")
	if err != nil {
		t.Fatal(err)
	}
	k := &kcradleSide{program, filepath.Join(dir, "k"), map[string]string{}}
	if err := os.Mkdir(k.dir, 0o700); err != nil {
		t.Fatal(err)
	}
	for name := range maps.Keys(all) {
		k.layouts[name] = writeLayout(t, k.dir, name, all[name])
	}
	return k
}

func (k *kcradleSide) run(t *testing.T, c testCase, container string) outcome {
	dir := filepath.Join(k.dir, container)
	args := append([]string{"summon", "--name", container, "--network", "none"}, c.flags...)
	args = append(args, dir, "oci:"+k.layouts[c.image])
	if len(c.cmd) > 0 {
		args = append(append(args, "--"), c.cmd...)
	}
	if summoned := execute(t, nil, k.dir, "", k.program, args...); summoned.code != 0 {
		if c.script != "" || !c.onlyCode {
			t.Errorf("kcradle summon: %s", summoned)
		}
		summoned.code = refused
		return summoned
	}
	if c.script == "" {
		return execute(t, nil, k.dir, c.stdin, k.program, "run", dir)
	}
	addKeeper(t, dir)
	if ran := execute(t, nil, k.dir, "", k.program, "run", "-d", dir); ran.code != 0 {
		t.Errorf("kcradle run -d: %s", ran)
		return ran
	}
	defer func() {
		// The pod's keeper still runs: there is a machine to end.
		if ended := execute(t, nil, k.dir, "", k.program, "kill", dir); ended.code != 0 {
			t.Errorf("kcradle kill: %s", ended)
		}
	}()
	return script(t, "unix://"+filepath.Join(dir, "vdocker.sock"), container, k.dir, c.script)
}

// addKeeper gives the pod a second container, so that it goes on when the case's own ends: a pod ends with its last container, a
// dockerd does not.
func addKeeper(t *testing.T, dir string) {
	t.Helper()
	path := filepath.Join(dir, "launch.json")
	data, err := os.ReadFile(path)
	if err != nil {
		t.Error(err)
		return
	}
	var launch map[string]any
	if err := json.Unmarshal(data, &launch); err != nil {
		t.Error(err)
		return
	}
	containers := launch["containers"].([]any)
	subject := containers[0].(map[string]any)
	delete(subject, "lifecycle")
	keeper := map[string]any{
		"id": strings.Repeat("0123456789abcdef", 4), "name": "keeper",
		"image": subject["image"], "layers": subject["layers"],
		"entrypoint": []string{"/bin/sleep"}, "command": []string{"100000"},
	}
	launch["containers"] = append(slices.Clone(containers), keeper)
	if data, err = json.Marshal(launch); err != nil {
		t.Error(err)
		return
	}
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Error(err)
	}
}

// shortTempDir is a folder whose sockets' paths stay under 108 bytes.
func shortTempDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "compat")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}
