//go:build vm

package main

import (
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/driver-cradle/pod"
	"github.com/cradlestack/cradlestack/internal/locked"
)

// Whatever kcradle is doing when it is killed, the next ones find their way: no process is left that nobody owns, no tap, mount or cgroup, no file that
// the cache's collectors do not know, and the pod runs.
func TestVMKilledAtSomeSteps(t *testing.T) { killedAtSteps(t, 5, 1) }

// killedAtSteps kills kcradle at n of the steps, which are others each time, as often as there are rounds. 0 are all steps.
func killedAtSteps(t *testing.T, n, rounds int) {
	w := theWorld(t)
	base := t.TempDir()
	// A cache of its own: templates and images are made, and removed, while somebody is killed.
	root, fresh := filepath.Join(base, "cache"), filepath.Join(base, "fresh")
	dir, other := filepath.Join(base, "pod"), filepath.Join(base, "other")
	ns := newNamespace(t)
	k := func(args ...string) []string { return append([]string{"--root", root}, args...) }
	image := "oci:" + w.images + "/busybox"
	w.must(t, k("summon", dir, image, "--netns", ns.path, "-v", filepath.Join(base, "v.img")+":/v:size=32M", "-v", base+"/d:/d", "--", "sh", "-c", "trap 'exit 0' TERM; echo up; while :; do sleep 0.05; done")...)
	d, err := pod.Open(dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.run(t, k("rm", "-f", dir)...) })
	settings := ns.settings(t)
	running := func() { w.must(t, k("run", "-d", dir)...) }
	nothing := func() {}
	noTemplates := func() { os.RemoveAll(filepath.Join(root, "templates")) }
	unattended := func() {
		running()
		if pid, err := d.Attendant(); err == nil && pid > 0 {
			killAndWait(t, pid)
		}
	}
	steps := []struct {
		name    string
		prepare func()
		args    []string
		monitor bool // is killed instead of the command
	}{
		{"summon", func() { w.run(t, "rm", other); os.RemoveAll(fresh) }, []string{"summon", other, image, "--root", fresh}, false},
		{"template build", noTemplates, []string{"template", "build"}, false},
		{"run that makes a template", noTemplates, []string{"run", dir}, false},
		{"run", nothing, []string{"run", dir}, false},
		{"run -d", nothing, []string{"run", "-d", dir}, false},
		{"run -d, its monitor", nothing, []string{"run", "-d", dir}, true},
		{"exec", running, []string{"exec", dir, "true"}, false},
		{"logs", running, []string{"logs", "-f", dir}, false},
		{"stop", running, []string{"stop", dir}, false},
		{"stop, the monitor", running, []string{"stop", dir}, true},
		{"kill", running, []string{"kill", dir}, false},
		{"status that takes up", unattended, []string{"status", dir}, false},
		{"stop that takes up", unattended, []string{"stop", dir}, false},
		{"rm", func() { w.run(t, k("rm", other)...); w.must(t, k("summon", other, image)...) }, []string{"rm", other}, false},
		{"images gc", nothing, []string{"images", "gc"}, false},
	}
	if n > 0 {
		rand.Shuffle(len(steps), func(i, j int) { steps[i], steps[j] = steps[j], steps[i] })
		steps = steps[:n]
	}
	for _, s := range steps {
		took := time.Second
		for range rounds {
			s.prepare()
			moment := time.Duration(rand.Int64N(int64(took)))
			begin := time.Now()
			cmd := w.start(t, io.Discard, k(s.args...)...)
			ended := make(chan struct{})
			go func() { cmd.Wait(); close(ended) }()
			select {
			case <-ended: // so long a step takes
				took = time.Since(begin)
			case <-time.After(moment):
				took = min(took+took/20, 4*time.Second) // it may take longer than that, or not end by itself
			}
			if pid, err := d.Attendant(); s.monitor && err == nil && pid > 0 && pid != cmd.Process.Pid {
				_ = unix.Kill(pid, unix.SIGKILL)
			} else {
				cmd.Process.Kill()
			}
			<-ended
			// What goes on does so for somebody: it can be stopped, or run again where it does not go on, and killed.
			next := [][]string{{"kill"}, {"stop", "-t", "0"}, {"run", "-d"}}[rand.IntN(3)]
			if _, stderr, code := w.run(t, k(append(next, dir)...)...); code != 0 && !strings.Contains(stderr, "pod is not running") && (next[0] != "run" || !strings.Contains(stderr, "is running")) {
				t.Errorf("%s, killed after %v: %v: %s", s.name, moment, next, stderr)
			}
			if _, stderr, code := w.run(t, k("kill", dir)...); code != 0 && !strings.Contains(stderr, "pod is not running") {
				t.Errorf("%s, killed after %v: kill: %s", s.name, moment, stderr)
			}
			nothingRemains(t, base)
			now, links := "", ""
			for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
				if now, links = ns.settings(t), ns.links(t); now == settings && !strings.Contains(links, "cradle0") {
					break
				}
			}
			if now != settings || strings.Contains(links, "cradle0") {
				t.Errorf("the namespace was\n%sand is\n%s%s", settings, now, links)
			}
			if t.Failed() {
				t.Fatalf("%s was killed %v after its start, then %v", s.name, moment, next)
			}
		}
		t.Logf("%s: killed %d times, the last within %v", s.name, rounds, took)
	}
	w.run(t, "rm", other)
	w.must(t, "images", "gc", "--root", fresh)
	w.must(t, k("images", "gc")...)
	w.must(t, k("template", "gc")...)
	w.must(t, k("images", "pull", image)...)
	w.must(t, k("verify", dir)...)
	out := new(locked.Buffer)
	cmd := w.start(t, out, k("run", dir)...)
	within(t, "the pod runs after all that", func() bool { return strings.Contains(out.String(), "up\n") })
	w.must(t, k("exec", dir, "true")...)
	w.must(t, k("stop", dir)...)
	if code := exit(t, cmd); code != 0 {
		t.Errorf("exit code %d", code)
	}
	left := append(entries(t, filepath.Join(root, "tmp"), filepath.Join(fresh, "tmp")), slices.DeleteFunc(entries(t, filepath.Join(root, "templates")), func(path string) bool {
		return !strings.HasPrefix(filepath.Base(path), ".") && !strings.HasSuffix(path, ".broken")
	})...)
	if len(left) > 0 {
		t.Errorf("left in the caches: %v", left)
	}
	if left := entries(t, base); !slices.Equal(left, []string{root, filepath.Join(base, "d"), fresh, dir, filepath.Join(base, "v.img")}) {
		t.Errorf("left: %v", left)
	}
}
