//go:build vm

package nomad

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// shared is a job with the volume of that name. One without a network of its own has QEMU's.
func (s *storehouse) shared(name, kind, network, access string, readOnly bool, script string) string {
	claim := fmt.Sprintf(`
      source          = "shared"
      attachment_mode = "file-system"
      access_mode     = %q
      read_only       = %t`, access, readOnly)
	return s.pod(name, kind, network, claim, "/v", script)
}

// TestVMFiler: two pods, in Nomad's bridge and in QEMU's network, have one volume from the filer, which is killed meanwhile and restarted by Nomad. The
// volume grows and is copied under them, and a file in it is rolled back; a third pod may only read. What each has written the others and this host see.
func TestVMFiler(t *testing.T) {
	s := startStorehouse(t, "")
	s.runFiler()
	s.shareVolume()
}

// TestVMFilerBackend: the same, of a plugin that has the filer keep the volumes.
func TestVMFilerBackend(t *testing.T) {
	s := startStorehouse(t, "")
	s.runFiler()
	s.Stop(t, "cradle-csi")
	text := strings.Replace(s.example("cradle-csi.nomad.hcl"), fmt.Sprintf(`"--pool", %q`, filepath.Join(s.node.Dir, "volumes")), `"--backend", "filer"`, 1)
	if !strings.Contains(text, `"--backend", "filer"`) {
		t.Fatalf("the plugin's job is\n%s", text)
	}
	s.Run(t, text)
	s.healthy()
	s.shareVolume()
}

func (s *storehouse) runFiler() {
	s.t.Helper()
	s.Run(s.t, s.example("cradle-filer.nomad.hcl"))
	s.eventually("a filer", func() bool {
		_, err := os.Stat(s.node.Path("/run/cradle/filer/api.sock"))
		return err == nil
	})
}

func (s *storehouse) shareVolume() {
	t := s.t
	t.Helper()
	// xfs, as some hosts take the capability to grow a mounted ext4 even from root.
	xfs := []string{"mount_options {}", "mount_options {\n  fs_type = \"xfs\"\n}"}
	s.volume("shared", append(xfs, `"64MiB"`, `"320MiB"`)...)

	const anyone, bridge = "multi-node-multi-writer", "network {\n mode = \"bridge\"\n}"
	w := &appenders{storehouse: s}
	w.start("bridged", bridge)
	w.start("plain", "")
	lines, goOn, last := w.allocs, w.goOn, w.last
	goOn("its start")

	s.kill("cradle-filer")
	goOn("the filer's end")

	letter := func(text string) {
		t.Helper()
		if err := os.WriteFile(s.node.Path("/run/cradle/filer/volumes/shared/letter"), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	letter("then\n")
	s.volume("shared", append(xfs, `"64MiB"`, `"448MiB"`)...)
	s.CLI(t, "volume", "snapshot", "create", "shared", "running")
	goOn("growth and a snapshot")
	letter("now, which is longer\n")
	if out, err := s.node.Output(t.Context(), filepath.Join(s.root, "bin/cradle-filer"), "rollback", "shared", "running", "letter"); err != nil {
		t.Errorf("rollback: %v: %s", err, out)
	}
	goOn("a rollback")
	read := s.UntilEnded(t, s.Run(t, s.shared("reader", "batch", "", "multi-node-reader-only", true,
		"grep -o ' /v nfs r[ow]' /proc/mounts; head -n 1 /v/bridged; head -n 1 /v/plain; cat /v/letter; touch /v/x 2>/dev/null || echo refused; df -P -m /v | tail -n 1 | while read dev size rest; do test $size -gt 350 && echo large; done")))
	if out := s.Logs(t, read.ID, "main", "stdout"); out != " /v nfs ro\n1\n1\nthen\nrefused\nlarge\n" {
		t.Errorf("the reader says %q", out)
	}

	target := filepath.Join(s.node.Dir, "volumes", "shared", "snapshots", "running")
	if _, err := os.Stat(target); err != nil {
		t.Errorf("the snapshot: %v", err)
	}
	files := s.node.Path("/run/cradle/filer/publications")
	s.eventually("the end of the reader's publication", func() bool {
		entries, err := os.ReadDir(files)
		return err == nil && len(entries) == 2
	})
	for name := range lines {
		s.Stop(t, name)
	}
	s.released("shared")
	if entries, err := os.ReadDir(files); err != nil || len(entries) != 0 {
		t.Errorf("without pods these publications are left: %v, %v", entries, err)
	}
	said := map[string]int{"bridged": last("bridged"), "plain": last("plain")}
	back := s.UntilEnded(t, s.Run(t, s.shared("after", "batch", "", anyone, false, "wc -l </v/bridged; wc -l </v/plain")))
	var bridged, plain int
	if _, err := fmt.Sscan(s.Logs(t, back.ID, "main", "stdout"), &bridged, &plain); err != nil || bridged < said["bridged"] || plain < said["plain"] {
		t.Errorf("%d and %d lines are in the volume, %v; %v were acknowledged", bridged, plain, err, said)
	}
	s.released("shared")
	s.CLI(t, "volume", "snapshot", "delete", "cradle", "shared@running")
}

// Appenders are pods that append lines to files of theirs in the volume shared, and say each number when its line is on the filer's disk.
type appenders struct {
	*storehouse
	allocs map[string]string // of a job → its allocation
}

// start starts one, whose file is called as it. more is of its job's group.
func (w *appenders) start(name, more string) {
	w.t.Helper()
	const script = "n=0; while :; do n=$((n+1)); echo $n >>/v/%[1]s && sync /v/%[1]s || { echo failed; exit 1; }; echo $n; sleep 0.1; done"
	job := w.Run(w.t, w.shared(name, "service", more, "multi-node-multi-writer", false, fmt.Sprintf(script, name)))
	if w.allocs == nil {
		w.allocs = map[string]string{}
	}
	w.allocs[name] = w.UntilRunning(w.t, job).ID
}

// last is the number that one has said last; it has said all before.
func (w *appenders) last(name string) int {
	w.t.Helper()
	text := w.Logs(w.t, w.allocs[name], "main", "stdout")
	said := strings.Fields(text[:strings.LastIndexByte(text, '\n')+1])
	if len(said) == 0 {
		return 0
	}
	n, err := strconv.Atoi(said[len(said)-1])
	if err != nil || n != len(said) {
		w.t.Fatalf("%s says %q after %d lines", name, said[len(said)-1], len(said))
	}
	return n
}

// goOn waits until each has said more.
func (w *appenders) goOn(after string) {
	w.t.Helper()
	for name := range w.allocs {
		from := w.last(name)
		w.eventually(fmt.Sprintf("%s going on after %s", name, after), func() bool { return w.last(name) >= from+3 })
	}
}
