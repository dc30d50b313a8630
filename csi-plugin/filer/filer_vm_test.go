//go:build vm

package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/csi-plugin/dir"
	"github.com/cradlestack/cradlestack/csi-plugin/filer/api"
	"github.com/cradlestack/cradlestack/csi-plugin/volume"
	"github.com/cradlestack/cradlestack/internal/filertest"
	"github.com/cradlestack/cradlestack/internal/mountns"
	"github.com/cradlestack/cradlestack/test/programs"
)

func TestMain(m *testing.M) {
	mountns.Own()
	os.Exit(m.Run())
}

// A pod is a microVM with busybox in it; its guest's kernel is the NFS client.
type pod struct {
	t       *testing.T
	kcradle string
	dir     string
	cmd     *exec.Cmd
	out     bytes.Buffer
}

// start runs a script in a pod.
func start(t *testing.T, script string, flags ...string) *pod {
	t.Helper()
	return startImage(t, "busybox", script, flags...)
}

func startImage(t *testing.T, name, script string, flags ...string) *pod {
	t.Helper()
	kcradle, err := programs.Path("kcradle")
	if err != nil {
		t.Fatal(err)
	}
	image, err := programs.Image(name)
	if err != nil {
		t.Fatal(err)
	}
	p := &pod{t: t, kcradle: kcradle, dir: filepath.Join(t.TempDir(), "pod")}
	args := append([]string{"summon", p.dir, "oci:" + image, "-m", "128m"}, flags...)
	if out, err := exec.Command(kcradle, append(args, "--", "sh", "-c", script)...).CombinedOutput(); err != nil {
		t.Fatalf("kcradle summon: %v\n%s", err, out)
	}
	t.Cleanup(func() { _ = exec.Command(kcradle, "rm", "-f", p.dir).Run() })
	p.cmd = exec.CommandContext(t.Context(), kcradle, "run", p.dir)
	p.cmd.Stdout, p.cmd.Stderr = &p.out, &p.out
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return p
}

// says checks the output of a pod that has to end well.
func (p *pod) says(want string) {
	p.t.Helper()
	if err := p.cmd.Wait(); err != nil || p.out.String() != want {
		p.t.Errorf("the pod says (%v)\n%s\nand should\n%s", err, &p.out, want)
	}
}

// TestVMFiles does with files on the filer, by a guest's kernel, what other tests do by hand: as several users, in two pods at once, and with many names.
func TestVMFiles(t *testing.T) {
	for _, engine := range []string{embedded, byGanesha} {
		t.Run(engine, func(t *testing.T) { files(t, engine) })
	}
}

func files(t *testing.T, engine string) {
	f := filertest.Start(t, "--engine", engine)
	host := f.Volume("v", 256<<20, map[string]string{"fs": "xfs"})
	f.Volume("full", 16<<20, nil)
	if err := os.Symlink("/etc/hostname", filepath.Join(host, "out")); err != nil {
		t.Fatal(err)
	}
	writable, readable := f.Publish("v"), f.Publish("v", "--read-only")
	devices := "no devices\n"
	if engine == byGanesha {
		devices = "" // which lead nowhere on this host
	}
	start(t, `cd /v; umask 022
		set -C; echo one >exclusive; (echo two >exclusive) 2>/dev/null || echo refused; set +C; cat exclusive
		echo two >>exclusive; cat exclusive; mv exclusive renamed; ln renamed hard; stat -c %h hard; rm renamed; cat hard
		ln -s hard soft; readlink soft; truncate -s 1M hole; stat -c %s hole; test $(stat -c %b hole) -lt 64 && echo sparse
		exec 3<hard; rm hard; cat <&3; ls | sort | tr '\n' ' '; exec 3<&-; mkdir dir; rmdir dir; mkdir dir; touch dir/x; rmdir dir 2>/dev/null || echo full
		cmp -s out /etc/hostname && echo "the link leads to this pod"
		mknod null c 1 3 2>/dev/null || echo no devices; mkfifo fifo && stat -c %F fifo
		mkdir -m 1777 everyone; chown 1000:1000 hole; chmod 4755 hole; stat -c %a:%u hole
		sed -i 's/.*1000.*//' /etc/passwd; echo 'u:x:1000:1000::/:/bin/sh' >>/etc/passwd; echo 'w:x:1001:1001::/:/bin/sh' >>/etc/passwd
		su u -c 'echo mine >/v/everyone/u; chmod 600 /v/everyone/u; mkdir -m 700 /v/everyone/d; echo x >/v/everyone/d/x'
		su w -c 'cat /v/everyone/u /v/everyone/d/x 2>/dev/null || echo not mine; rm -f /v/everyone/u 2>/dev/null || echo sticky; touch /v/nothing 2>/dev/null || echo closed'
		stat -c %u:%g:%a everyone/u everyone/d/x
		dd if=/dev/zero of=/f/x bs=1M count=64 conv=fsync 2>&1 | grep -o 'No space left on device'; rm /f/x; echo room >/f/x && cat /f/x`,
		"--privileged", "--mount", writable.Mount("/v"), "--mount", f.Publish("full").Mount("/f")).says(`refused
one
one
two
2
one
two
hard
1048576
sparse
one
two
hole out soft full
the link leads to this pod
` + devices + `fifo
4755:1000
not mine
sticky
closed
1000:1000:600
1000:1000:644
No space left on device
room
`)
	for name, want := range map[string]uint32{"everyone/u": 1000, "everyone/d": 1000, "hole": 1000, "soft": 0} {
		var st unix.Stat_t
		if err := unix.Lstat(filepath.Join(host, name), &st); err != nil || st.Uid != want {
			t.Errorf("%s belongs to %d on this host, %v", name, st.Uid, err)
		}
	}
	// Ten thousand names, a part of them made by a client.
	many := filepath.Join(host, "many")
	if err := os.Mkdir(many, 0o777); err != nil {
		t.Fatal(err)
	}
	for i := range 9800 {
		if err := os.WriteFile(filepath.Join(many, fmt.Sprintf("%05d", i)), nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	start(t, `cd /v/many; for i in $(seq 9800 9999); do : >0$i; done; ls | wc -l; ls | sort -u | wc -l; ls -l | grep -c ' 0 '; find . -name '*777' | xargs rm; ls | wc -l`,
		"--mount", writable.Mount("/v")).says("10000\n10000\n10000\n9990\n")
	// The other publication is of the same files, and changes none.
	start(t, `cat /v/everyone/d/x; ls /v/many | wc -l; touch /v/new 2>/dev/null || echo refused; mount -o remount,rw /v 2>/dev/null; touch /v/new 2>/dev/null || echo refused`,
		"--privileged", "--mount", readable.Mount("/v")).says("x\n9990\nrefused\nrefused\n")
	if out, err := f.Command("publications"); err != nil || strings.Count(out, "\n") != 4 || strings.Contains(out, writable.Export) {
		t.Errorf("the publications: %v\n%s", err, out)
	}
}

// TestVMFilerKilled kills the filer again and again while a pod writes. What the pod was told is written is there, and it has seen no error.
func TestVMFilerKilled(t *testing.T) {
	f := filertest.Start(t)
	host := f.Volume("v", 0, nil)
	p := start(t, `cd /v; i=0; until [ -e stop ]; do i=$((i+1)); head -c 20000 /dev/urandom >/tmp/x; cp /tmp/x $i && sync $i || exit 1; echo $(sha256sum </tmp/x | cut -c1-64) $i; done`,
		"--mount", f.Publish("v").Mount("/v"))
	awaitFile(t, f, host, "1")
	for range 6 {
		time.Sleep(1500 * time.Millisecond) // some calls come in between, some meet nobody
		f.Signal(syscall.SIGKILL)
		f.Run()
	}
	if err := os.WriteFile(filepath.Join(host, "stop"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := p.cmd.Wait(); err != nil {
		t.Errorf("the pod: %v\n%s", err, &p.out)
	}
	sums := filepath.Join(t.TempDir(), "sums")
	if err := os.WriteFile(sums, []byte(strings.ReplaceAll(p.out.String(), " ", "  ")), 0o600); err != nil {
		t.Fatal(err)
	}
	check := exec.Command("sha256sum", "--check", "--strict", "--quiet", sums) // which refuses an empty list
	check.Dir = host
	if out, err := check.CombinedOutput(); err != nil {
		t.Errorf("what was acknowledged: %v\n%s", err, out)
	}
	t.Logf("%d files", strings.Count(p.out.String(), "\n"))
}

// TestRootFiler: publications outlast the process, an end of one ends what it mounted, and what can't be published is refused with the reason.
func TestRootFiler(t *testing.T) {
	f := filertest.Start(t)
	f.Volume("v", 32<<20, nil)
	f.Volume("w", 0, nil)
	p := f.Publish("v", "--id", "mine")
	if again := f.Publish("v", "--id", "mine"); again != p {
		t.Errorf("published again it is %+v, not %+v", again, p)
	}
	if other := f.Publish("v"); other.Export == p.Export || other.ID == p.ID {
		t.Errorf("another publication is the same: %+v", other)
	}
	f.Publish("w", "--id", "w", "--read-only")
	refused := func(want string, args ...string) {
		t.Helper()
		if out, err := f.Command(args...); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v: %s, %v; want %s", args, out, err, want)
		}
	}
	refused("publication mine exists, and is another: it is of volume v", "publish", "w", "--id", "mine", "--client", "10.0.0.1")
	refused("volume x: not found", "publish", "x", "--client", "10.0.0.1")
	refused(`"client" not set`, "publish", "v")
	refused("neither an address nor a network", "publish", "v", "--client", "everybody")
	refused("publication: ", "publish", "v", "--id", "../x", "--client", "10.0.0.1")
	refused("switch: this filer is alone", "switch")

	list, err := f.Command("publications", "-o", "json")
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []os.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		f.Signal(s)
		f.Run()
		if now, err := f.Command("publications", "-o", "json"); err != nil || now != list {
			t.Errorf("after %v there are %s, %v", s, now, err)
		}
	}
	if out, err := f.Command("status"); err != nil || !strings.Contains(out, "volumes  2, published 3 times") {
		t.Errorf("status: %s, %v", out, err)
	}
	for _, id := range []string{"mine", "mine", "nobody"} {
		if _, err := f.Command("unpublish", id); err != nil {
			t.Error(err)
		}
	}
}

// TestVMSnapshots: a pod looks into a snapshot, and goes on with the files that it has open when the volume is rolled back under it.
func TestVMSnapshots(t *testing.T) {
	f := filertest.Start(t)
	host := f.Volume("v", 64<<20, nil)
	publication := f.Publish("v")
	publication.Options += ",actimeo=1"
	p := start(t, `cd /v; echo first >file; mkdir d; echo a >d/a; exec 4<file; cd d; touch ../ready
		until [ -e ../taken ]; do sleep 0.2; done; cd ..
		echo second >file; rm -r d; echo new >new; ls -A | tr '\n' ' '; ls .snapshots; cat .snapshots/s/file .snapshots/s/d/a
		(cd .snapshots/s/d/../../..; ls -A | tr '\n' ' '); diff -q file .snapshots/s/file
		touch .snapshots/s/x 2>/dev/null || echo read-only; mkdir .snapshots/x 2>/dev/null || echo read-only; rmdir .snapshots 2>/dev/null || echo stays
		touch changed
		while [ -e changed ]; do sleep 0.2; done; cat file d/a; cat <&4; ls -A | tr '\n' ' '; ls .snapshots | wc -l; echo third >file; cat .snapshots/s/file file`,
		"--mount", publication.Mount("/v"))
	wait := func(name string) { t.Helper(); awaitFile(t, f, host, name) }
	wait("ready")
	f.Must("snapshot", "v", "s")
	if err := os.WriteFile(filepath.Join(host, "taken"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	wait("changed")
	f.Must("rollback", "v", "s")
	p.says(`file new ready taken s
first
a
file new ready taken Files file and .snapshots/s/file differ
read-only
read-only
stays
first
a
first
d file ready 2
first
third
`)
	f.Must("unpublish", publication.ID)
	for _, s := range snapshotsOf(t, f, "v") {
		removeSnapshot(t, f, "v", s.Name)
	}
}

// snapshotsOf lists a volume's snapshots.
func snapshotsOf(t *testing.T, f *filertest.Filer, id string) (all []api.Snapshot) {
	t.Helper()
	if err := json.Unmarshal([]byte(f.Must("snapshots", id, "-o", "json")), &all); err != nil {
		t.Fatal(err)
	}
	return all
}

// removeSnapshot removes one as cradle-csi does.
func removeSnapshot(t *testing.T, f *filertest.Filer, id, name string) {
	t.Helper()
	b, err := dir.Open([]dir.Pool{{Name: "default", Path: f.Pool}})
	if err == nil {
		err = errors.Join(b.DeleteSnapshot(t.Context(), volume.SnapshotID{Volume: id, Name: name}), b.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
}

// TestRootSnapshots: what a volume was can be listed, compared, and made again, whole or in part, published or not, also where the filer was killed meanwhile. Who has
// done what is told.
func TestRootSnapshots(t *testing.T) {
	f := filertest.Start(t)
	refused := func(want string, args ...string) {
		t.Helper()
		if out, err := f.Command(args...); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v: %s, %v; want %s", args, out, err, want)
		}
	}
	for name, size := range map[string]int64{"image": 64 << 20, "directory": 0} {
		t.Run(name, func(t *testing.T) {
			host := f.Volume(name, size, nil)
			put := func(path, text string) {
				t.Helper()
				path = filepath.Join(host, path)
				if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o640)); err != nil {
					t.Fatal(err)
				}
			}
			holds := func(want map[string]string) {
				t.Helper()
				got := map[string]string{}
				err := filepath.WalkDir(host, func(path string, e fs.DirEntry, err error) error {
					if err != nil || e.IsDir() {
						return err
					}
					text, err := os.ReadFile(path)
					got[strings.TrimPrefix(path, host+"/")] = string(text)
					return err
				})
				if err != nil || !maps.Equal(got, want) {
					t.Errorf("the volume has %v, %v; want %v", got, err, want)
				}
			}
			number := func(path string) uint64 {
				t.Helper()
				var st unix.Stat_t
				if err := unix.Stat(filepath.Join(host, path), &st); err != nil {
					t.Fatal(err)
				}
				return st.Ino
			}
			first, second := name+"-first", name+"-second"
			put("a/file", "first")
			put("a/gone", "first")
			put("b", "first")
			kept := number("a/file")
			if out := f.Must("snapshot", name, first); out != first+"\n" {
				t.Errorf("snapshot says %q", out)
			}
			put("a/file", "second")
			put("b", "second")
			put("c/new", "second")
			if err := os.Remove(filepath.Join(host, "a/gone")); err != nil {
				t.Fatal(err)
			}
			f.Must("snapshot", name, second)
			if out := strings.Join(strings.Fields(f.Must("diff", name, first, second)), " "); out != "changed a/file removed a/gone changed b added c added c/new" {
				t.Errorf("the difference is %q", out)
			}
			if out := f.Must("diff", name, second); out != "" {
				t.Errorf("since the newest snapshot there is changed: %q", out)
			}
			put("b", "third")
			if out := strings.Fields(f.Must("diff", name, second)); !slices.Equal(out, []string{"changed", "b"}) {
				t.Errorf("the difference is %q", out)
			}

			f.Must("rollback", name, first, "/a/")
			holds(map[string]string{"a/file": "first", "a/gone": "first", "b": "third", "c/new": "second"})
			f.Must("rollback", name, second, "a/file")
			holds(map[string]string{"a/file": "second", "a/gone": "first", "b": "third", "c/new": "second"})
			f.Publish(name, "--id", name)
			out := f.Must("rollback", name, first)
			holds(map[string]string{"a/file": "first", "a/gone": "first", "b": "first"})
			if number("a/file") != kept {
				t.Error("a file that is in both is another one")
			}
			_, undo, found := strings.Cut(out, "cradle-filer rollback "+name+" ")
			if !found {
				t.Fatalf("rollback says %q", out)
			}
			f.Must("rollback", name, strings.TrimSpace(undo))
			holds(map[string]string{"a/file": "second", "a/gone": "first", "b": "third", "c/new": "second"})

			refused("not found", "rollback", name, "none")
			refused("not found in snapshot", "rollback", name, first, "c")
			refused("snapshots stay as they are", "rollback", name, first, ".snapshots/"+second)
			if err := os.RemoveAll(filepath.Join(host, "a")); err != nil {
				t.Fatal(err)
			}
			refused("roll that back", "rollback", name, first, "a/file")
			f.Must("rollback", name, first, "../a/../../a")
			holds(map[string]string{"a/file": "first", "a/gone": "first", "b": "third", "c/new": "second"})

			// A filer that was killed in the middle has left this.
			f.Signal(syscall.SIGKILL)
			pending := filepath.Join(f.State(), "rollbacks", name+".json")
			text := fmt.Sprintf(`{"volume": %q, "snapshot": %q, "path": ".", "undo": "killed", "who": %q}`, name, first, map[string]string{"image": "somebody"}[name])
			if err := os.WriteFile(pending, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			f.Run()
			holds(map[string]string{"a/file": "first", "a/gone": "first", "b": "first"})
			if _, err := os.Stat(pending); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("what was pending still is: %v", err)
			}

			taken := map[string]int{}
			for _, s := range snapshotsOf(t, f, name) {
				what, _, _ := strings.Cut(s.Name, "-2")
				if taken[what]++; s.Automatic != (what != first && what != second) {
					t.Errorf("snapshot %s goes with its volume: %t", s.Name, s.Automatic)
				}
			}
			if want := map[string]int{first: 1, second: 1, "before-rollback": 5, "killed": 1}; !maps.Equal(taken, want) {
				t.Errorf("there are these snapshots: %v, not %v", taken, want)
			}
			removeSnapshot(t, f, name, first)
			removeSnapshot(t, f, name, second)
		})
	}
	refused("volume none: not found", "snapshots", "none")
	refused("volume none: not found", "snapshot", "none", "s")
	refused("snapshot name: ", "snapshot", "image", "a@b")

	text, err := os.ReadFile(filepath.Join(f.State(), "audit.log"))
	if err != nil {
		t.Fatal(err)
	}
	told := map[string]int{}
	for line := range strings.Lines(string(text)) {
		var e event
		if err := json.Unmarshal([]byte(line), &e); err != nil || e.Time.IsZero() {
			t.Fatalf("audit.log has the line %q, %v", line, err)
		}
		told[fmt.Sprint(e.What, " by ", e.Who, " ", e.Error == "", " ", e.Undo != "")]++
	}
	want := map[string]int{
		"snapshot by root true false": 4, "snapshot by root false false": 2, "rollback by root true true": 10, "rollback by root false false": 8,
		"rollback completed after an interruption by somebody true true": 1, "rollback completed after an interruption by cradle-filer true true": 1,
	}
	if !maps.Equal(told, want) {
		t.Errorf("audit.log tells %v, not %v", told, want)
	}
}
