package pod

import (
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/driver-cradle/boot"
	"github.com/cradlestack/cradlestack/driver-cradle/image"
	"github.com/cradlestack/cradlestack/driver-cradle/vmm"
	"github.com/cradlestack/cradlestack/driver-cradle/wire"
	"github.com/cradlestack/cradlestack/spec"
)

func TestOpen(t *testing.T) {
	if _, err := Open(t.TempDir(), nil); !errors.Is(err, ErrNoPod) {
		t.Errorf("Open of an empty directory: %v", err)
	}
	if _, err := Open("/nonexistent/x", nil); !errors.Is(err, ErrNoPod) {
		t.Errorf("Open of nothing: %v", err)
	}
}

func TestEditedLaunchIsChecked(t *testing.T) {
	d := testPod(t)
	data, err := os.ReadFile(d.join(LaunchFile))
	if err != nil {
		t.Fatal(err)
	}
	edited := strings.Replace(string(data), `"cpus": 1`, `"cpus": -1`, 1)
	if err := os.WriteFile(d.join(LaunchFile), []byte(edited), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err = d.Start(t.Context(), StartOptions{CacheDir: t.TempDir()})
	if err == nil || !strings.Contains(err.Error(), LaunchFile+":8:") || !strings.Contains(err.Error(), "resources.cpus") {
		t.Errorf("Start: %v", err)
	}
	if pid, err := d.Attendant(); pid != 0 || err != nil {
		t.Errorf("the pod is still attended by %d, %v", pid, err)
	}
}

func TestAttendant(t *testing.T) {
	d := testPod(t)
	if pid, err := d.Attendant(); pid != 0 || err != nil {
		t.Fatalf("a new pod is attended by %d, %v", pid, err)
	}
	lock, err := d.attend()
	if err != nil {
		t.Fatal(err)
	}
	if pid, err := d.Attendant(); pid != os.Getpid() || err != nil {
		t.Errorf("attended by %d, %v, want %d", pid, err, os.Getpid())
	}
	var running *RunningError
	soon, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond) // of one that ends it would wait for the end
	defer cancel()
	if _, err := d.Start(soon, StartOptions{}); !errors.As(err, &running) || running.PID != os.Getpid() || !errors.Is(err, ErrRunning) {
		t.Errorf("a second Start: %v", err)
	}
	over, cancel := context.WithDeadline(t.Context(), time.Now())
	defer cancel()
	if err := d.AwaitSettled(over); !errors.Is(err, ErrUnsettled) {
		t.Errorf("AwaitSettled of a start whose time is over: %v", err)
	}
	if err := d.Remove(); !errors.Is(err, ErrRunning) {
		t.Errorf("Remove: %v", err)
	}
	if _, err := d.TakeUp(t.Context(), TakeUpOptions{}); !errors.Is(err, ErrRunning) {
		t.Errorf("TakeUp: %v", err)
	}
	if _, err := d.Report(); !errors.Is(err, ErrRunning) {
		t.Errorf("Report: %v", err)
	}
	lock.Close()
	if _, err := d.TakeUp(t.Context(), TakeUpOptions{}); !errors.Is(err, ErrNotRunning) {
		t.Errorf("TakeUp of a pod that does not run: %v", err)
	}
	if _, err := d.Report(); !errors.Is(err, ErrNotStarted) {
		t.Errorf("Report before the first run: %v", err)
	}
}

// Whoever asks for the end of a pod whose start is only claimed means that run, and not the one before.
func TestStopOfAClaimedRun(t *testing.T) {
	d := testPod(t)
	if err := os.MkdirAll(d.join(runDir), 0o700); err != nil {
		t.Fatal(err)
	}
	before := Report{Version: reportVersion, Status: wire.Status{State: wire.StateExited, ExitCode: 3}}
	if err := writeJSON(d.join(runDir, statusFile), before); err != nil {
		t.Fatal(err)
	}
	for name, end := range map[string]func() (*Report, error){
		"stop": func() (*Report, error) { return d.Stop(t.Context(), nil) },
		"kill": func() (*Report, error) { return d.Kill(t.Context()) },
	} {
		claim, err := d.Claim(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		var report *Report
		var eerr error
		var ended sync.WaitGroup
		ended.Go(func() { report, eerr = end() })
		for !d.wasKilled() {
			time.Sleep(time.Millisecond)
		}
		// Another process starts with the claim.
		fd, err := unix.Dup(int(claim.Fd()))
		if err != nil {
			t.Fatal(err)
		}
		claim.Close()
		_, err = d.Start(t.Context(), StartOptions{Claim: os.NewFile(uintptr(fd), "claim"), CacheDir: t.TempDir()})
		if !errors.Is(err, errStopped) {
			t.Errorf("%s: Start: %v", name, err)
		}
		ended.Wait()
		if eerr != nil || report.Status.ExitCode != exitKilled {
			t.Errorf("%s: report %+v, %v", name, report, eerr)
		}
		// The next run is another one, even of the same process.
		if _, err = d.Start(t.Context(), StartOptions{CacheDir: t.TempDir()}); errors.Is(err, errStopped) {
			t.Errorf("%s: the next Start: %v", name, err)
		}
	}
}

// A machine that ended while nobody attended to its pod is reported by the next who looks.
func TestBury(t *testing.T) {
	d := testPod(t)
	launch, err := d.Launch()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(d.join(runDir), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := writeJSON(d.join(runDir, launchedFile), launch); err != nil {
		t.Fatal(err)
	}
	if _, err := d.TakeUp(t.Context(), TakeUpOptions{}); !errors.Is(err, ErrNotRunning) {
		t.Fatalf("TakeUp: %v", err)
	}
	r, err := d.Report()
	if err != nil {
		t.Fatal(err)
	}
	if r.Failure == "" || r.Status.State != wire.StateExited || r.Status.ExitCode != exitLost || len(r.Status.Containers) != 1 {
		t.Errorf("report %+v", r)
	}
	if _, err := os.Stat(d.join(runDir, launchedFile)); err == nil {
		t.Error("the run's remains are still there")
	}

	// One whose attendant was killed after it had noted the end, and before it had put all away, has ended as was noted.
	r.Failure, r.Status.ExitCode = "", 3
	if err := errors.Join(writeJSON(d.join(runDir, statusFile), r), writeJSON(d.join(runDir, launchedFile), launch)); err != nil {
		t.Fatal(err)
	}
	if _, err := d.TakeUp(t.Context(), TakeUpOptions{}); !errors.Is(err, ErrNotRunning) {
		t.Fatalf("TakeUp: %v", err)
	}
	if r, err = d.Report(); err != nil || r.Failure != "" || r.Status.ExitCode != 3 {
		t.Errorf("report %+v, %v", r, err)
	}
	if _, err := os.Stat(d.join(runDir, launchedFile)); err == nil {
		t.Error("the run's remains are still there")
	}
}

func TestRemove(t *testing.T) {
	d := testPod(t)
	foreign := d.join("notes.txt")
	if err := os.WriteFile(foreign, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := d.Remove(); err != nil {
		t.Fatal(err)
	}
	entries, err := os.ReadDir(d.Path())
	if err != nil || len(entries) != 1 {
		t.Errorf("left: %v, %v; want the file that is not ours", entries, err)
	}
}

// What a Summon or Remove that was killed has left is no pod, and can be removed; what is anybody else's stays.
func TestRemoveRemains(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "p")
	if err := RemoveRemains(dir); !errors.Is(err, ErrNoPod) {
		t.Errorf("nothing there: %v", err)
	}
	for _, f := range []string{"notes.txt", LaunchFile} {
		if err := os.MkdirAll(filepath.Join(dir, runDir), 0o700); err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(dir, f)
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := RemoveRemains(dir); !errors.Is(err, ErrNoPod) {
			t.Errorf("%s: %v", f, err)
		}
		if err := os.Remove(path); err != nil {
			t.Errorf("%s is gone: %v", f, err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, scratchFile), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := RemoveRemains(dir); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(dir); err == nil {
		t.Error("the remains are still there")
	}
}

func summonOptions(t *testing.T) SummonOptions {
	t.Helper()
	store, err := image.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	return SummonOptions{Images: store, Boot: &boot.Package{Dir: t.TempDir()}}
}

func TestSummonRefuses(t *testing.T) {
	o := summonOptions(t)
	dir := filepath.Join(t.TempDir(), "p")
	p := &spec.Pod{Name: "p", Containers: []spec.PodContainer{{Name: "p", Image: "oci:/nonexistent"}}}
	if _, err := Summon(t.Context(), dir, p, o); err == nil || !strings.Contains(err.Error(), "/nonexistent") {
		t.Errorf("image that does not exist: %v", err)
	}
	if _, err := Summon(t.Context(), dir, &spec.Pod{Name: "p"}, o); err == nil {
		t.Error("pod without containers is summoned")
	}
	if _, err := os.Stat(dir); err == nil {
		t.Error("something is left after a refusal")
	}
}

func TestClaim(t *testing.T) {
	base := t.TempDir()
	dir := filepath.Join(base, "new")
	claimed, made, err := claim(dir)
	if !made || err != nil {
		t.Fatalf("new: %v, %v", made, err)
	}
	if fi, err := os.Stat(dir); err != nil || fi.Mode().Perm() != 0o700 {
		t.Errorf("mode %v, %v", fi.Mode(), err)
	}
	// As a Summon that was killed leaves it.
	for _, f := range []string{scratchFile, BootLink} {
		if err := os.WriteFile(filepath.Join(dir, f), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if _, _, err := claim(dir); err == nil || !strings.Contains(err.Error(), "another process") {
		t.Errorf("claimed by somebody else: %v", err)
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 2 {
		t.Errorf("of what somebody else is making there is left: %v", entries)
	}
	claimed.Close()
	if claimed, made, err = claim(dir); made || err != nil {
		t.Fatalf("half made: %v, %v", made, err)
	}
	claimed.Close()
	if entries, _ := os.ReadDir(dir); len(entries) != 0 {
		t.Errorf("left: %v", entries)
	}
	for _, f := range []string{"notes.txt", LaunchFile} {
		if err := os.WriteFile(filepath.Join(dir, f), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, _, err := claim(dir); err == nil || !strings.Contains(err.Error(), dir) {
			t.Errorf("directory with %s: %v", f, err)
		}
		if _, err := os.Stat(filepath.Join(dir, f)); err != nil {
			t.Errorf("%s is gone: %v", f, err)
		}
		os.Remove(filepath.Join(dir, f))
	}
	if _, _, err := claim(filepath.Join(base, "a", "b")); err == nil {
		t.Error("a directory whose parent is missing is made")
	}
}

// Of those who make a pod in one directory at once, one does, and the others leave it alone, whether it succeeds or not.
func TestClaimAtOnce(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "p")
	var wg sync.WaitGroup
	var made atomic.Int32
	for i := range 8 {
		wg.Go(func() {
			for {
				claimed, fresh, err := claim(dir)
				if err != nil {
					if !strings.Contains(err.Error(), "another process") && !strings.Contains(err.Error(), "a pod already") {
						t.Error(err)
					}
					if made.Load() > 0 {
						return
					}
					time.Sleep(time.Millisecond)
					continue
				}
				err = os.Mkdir(filepath.Join(dir, layersDir), 0o700)
				if err == nil && i%4 == 0 {
					err = os.WriteFile(filepath.Join(dir, LaunchFile), nil, 0o600)
					made.Add(1)
				} else if err == nil {
					err = clear(dir, fresh)
				}
				if err != nil {
					t.Error(err)
				}
				claimed.Close()
			}
		})
	}
	wg.Wait()
	entries, err := os.ReadDir(dir)
	if made.Load() != 1 || len(entries) != 2 || err != nil {
		t.Errorf("made %d times, there are %v, %v", made.Load(), entries, err)
	}
}

func need(t *testing.T, program, install string) {
	t.Helper()
	if _, err := exec.LookPath(program); err != nil {
		t.Fatalf("%s is missing: apt-get install %s", program, install)
	}
}

func sparse(t *testing.T, name string, size int64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, size); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestMakeScratch(t *testing.T) {
	need(t, "mke2fs", "e2fsprogs")
	for _, size := range []spec.Bytes{spec.MinScratch, 100 << 20, spec.DefaultScratchSize, 1 << 40} {
		path := filepath.Join(t.TempDir(), "scratch.img")
		if err := makeScratch(t.Context(), path, size); err != nil {
			t.Fatal(err)
		}
		fi, err := os.Stat(path)
		if err != nil || fi.Size() != int64(size) || fi.Mode().Perm() != 0o600 {
			t.Errorf("%v: %v, %v", size, fi, err)
		}
		if used := fi.Sys().(*syscall.Stat_t).Blocks * 512; used > 8<<20 {
			t.Errorf("scratch disk of %v takes %d bytes", size, used)
		}
		if out, err := exec.Command("e2fsck", "-fn", path).CombinedOutput(); err != nil {
			t.Errorf("%v: e2fsck: %v\n%s", size, err, out)
		}
	}
}

func TestPrepareBlock(t *testing.T) {
	need(t, "mke2fs", "e2fsprogs")
	need(t, "mkfs.xfs", "xfsprogs")
	prepareAs := func(path, fsType string, readOnly, mounted bool) error {
		v := &spec.Volume{Name: "data", Block: &spec.BlockVolume{Path: path, FSType: fsType, ReadOnly: readOnly}}
		return prepareBlock(t.Context(), v, path, mounted)
	}
	refused := func(err error, words ...string) {
		t.Helper()
		for _, w := range append(words, "volume data") {
			if err == nil || !strings.Contains(err.Error(), w) {
				t.Errorf("error %v does not say %q", err, w)
			}
		}
	}
	ext4, xfs := sparse(t, "a.img", 64<<20), sparse(t, "b.img", 400<<20)
	refused(prepareAs(ext4, "", true, true), "blank", "read-only")
	for range 2 { // the second time it is there already
		if err := prepareAs(ext4, "", false, true); err != nil {
			t.Fatal(err)
		}
		if err := prepareAs(xfs, "xfs", false, true); err != nil {
			t.Fatal(err)
		}
	}
	if out, err := exec.Command("e2fsck", "-fn", ext4).CombinedOutput(); err != nil {
		t.Errorf("e2fsck: %v\n%s", err, out)
	}
	if out, err := exec.Command("xfs_repair", "-n", xfs).CombinedOutput(); err != nil {
		t.Errorf("xfs_repair: %v\n%s", err, out)
	}
	refused(prepareAs(ext4, "xfs", false, true), "holds an ext4 file system", "fsType")
	refused(prepareAs(xfs, "", false, true), "holds an xfs file system")
	refused(prepareAs("/nonexistent.img", "", false, true), "truncate -s")
	refused(prepareAs(t.TempDir(), "", false, true), "neither")
	refused(prepareAs(sparse(t, "empty", 0), "", false, true), "empty")
	refused(prepareAs(sparse(t, "tiny.img", 4096), "", false, true), "make ext4")

	middle := sparse(t, "middle.img", 64<<20)
	m, err := os.OpenFile(middle, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	m.WriteAt([]byte("dear diary"), 40<<20)
	m.WriteAt(make([]byte, 1<<20), 20<<20) // zeros are no data
	m.Close()
	refused(prepareAs(middle, "", false, true), "no known kind", "truncate -s 0 "+middle+" && truncate -s 67108864 "+middle)
	m, err = os.OpenFile(middle, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	m.WriteAt(make([]byte, 10), 40<<20)
	m.Close()
	if err := prepareAs(middle, "", false, true); err != nil {
		t.Errorf("zeros in the middle: %v", err)
	}

	foreign := sparse(t, "c.img", 16<<20)
	f, err := os.OpenFile(foreign, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	f.WriteAt([]byte("_BHRfS_M"), 0x10040)
	f.Close()
	before, err := os.ReadFile(foreign)
	if err != nil {
		t.Fatal(err)
	}
	refused(prepareAs(foreign, "", false, true), "btrfs", "not overwritten")
	refused(prepareAs(sparse(t, "odd.img", 16<<20+1), "", false, true), "multiple of 512", "truncate -s 10G")
	if after, err := os.ReadFile(foreign); err != nil || !slices.Equal(before, after) {
		t.Error("a foreign file system was touched")
	}
	if err := prepareAs(foreign, "", false, false); err != nil {
		t.Errorf("used raw: %v", err)
	}
}

// An image that another pod has is refused: while it is prepared (a lock of ours), and while it runs (QEMU's locks).
func TestVolumeInUse(t *testing.T) {
	path := sparse(t, "a.img", 16<<20)
	first, _, err := openDisk(path, false)
	if err != nil {
		t.Fatal(err)
	}
	for _, readOnly := range []bool{false, true} {
		if f, _, err := openDisk(path, readOnly); err == nil || !strings.Contains(err.Error(), "in use") {
			f.Close()
			t.Errorf("opened twice: %v", err)
		}
	}
	first.Close()

	readers := make([]*os.File, 2)
	for i := range readers {
		if readers[i], _, err = openDisk(path, true); err != nil {
			t.Fatalf("a second reader: %v", err)
		}
	}
	for _, r := range readers {
		r.Close()
	}

	qemu, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer qemu.Close()
	for _, c := range []struct {
		name                 string
		bytes                []int64
		forWriter, forReader bool // refused
	}{
		{"writer", []int64{100, 101, 103, 201}, true, true},
		{"reader", []int64{100, 201}, true, false},
	} {
		for _, b := range c.bytes {
			lock := unix.Flock_t{Type: unix.F_RDLCK, Start: b, Len: 1}
			if err := unix.FcntlFlock(qemu.Fd(), unix.F_OFD_SETLK, &lock); err != nil {
				t.Fatal(err)
			}
		}
		for readOnly, want := range map[bool]bool{false: c.forWriter, true: c.forReader} {
			f, _, err := openDisk(path, readOnly)
			if err == nil {
				f.Close()
			}
			if (err != nil) != want {
				t.Errorf("QEMU is a %s, opened read-only %v: %v", c.name, readOnly, err)
			}
		}
		lock := unix.Flock_t{Type: unix.F_UNLCK}
		if err := unix.FcntlFlock(qemu.Fd(), unix.F_OFD_SETLK, &lock); err != nil {
			t.Fatal(err)
		}
	}
}

// The program that makes a file system is not cut short, and keeps others away until it has finished.
func TestMakeFilesystemHoldsLock(t *testing.T) {
	bin := t.TempDir()
	script := "#!/bin/sh\necho begun >" + bin + "/begun\nwhile [ ! -e " + bin + "/go ]; do sleep 0.01; done\necho done >" + bin + "/done\n"
	if err := os.WriteFile(filepath.Join(bin, "mke2fs"), []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", bin+":"+os.Getenv("PATH"))
	path := sparse(t, "a.img", 16<<20)
	f, _, err := openDisk(path, false)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	wait, err := beginFilesystem(ctx, "ext4", f, path)
	if err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(2 * time.Minute); ; time.Sleep(time.Millisecond) {
		if _, err := os.Stat(filepath.Join(bin, "begun")); err == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("mke2fs was not started")
		}
	}
	cancel()
	f.Close() // as at the end of a process that is killed
	if other, _, err := openDisk(path, false); err == nil {
		other.Close()
		t.Error("the disk is free while its file system is being made")
	}
	if err := os.WriteFile(filepath.Join(bin, "go"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := wait(); err != nil {
		t.Error(err)
	}
	other, _, err := openDisk(path, false)
	if err != nil {
		t.Fatalf("the disk is not free afterwards: %v", err)
	}
	other.Close()
}

func TestShortSocketPath(t *testing.T) {
	dir := filepath.Join(t.TempDir(), strings.Repeat("long/", 40))
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	d := &Dir{path: dir}
	r := &Running{dir: d}
	if err := r.bind(); err != nil {
		t.Fatal(err)
	}
	defer r.unlisten()
	go func() {
		c, err := r.listener.Accept()
		if err == nil {
			io.WriteString(c, "hello")
			c.Close()
		}
	}()
	fi, err := os.Stat(d.join(SocketFile))
	if err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", fi.Mode(), err)
	}
	c, err := d.Dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if got, err := io.ReadAll(c); err != nil || string(got) != "hello" {
		t.Errorf("got %q, %v", got, err)
	}
}

// The distribution's kernel has no 9p: directories reach its guests by virtiofs unless something else is asked for.
func TestShareOfStockKernel(t *testing.T) {
	for _, x := range []struct{ variant, transport, want string }{
		{boot.VariantDefault, "", "9p"}, {boot.VariantStock, "", "virtiofs"}, {boot.VariantDefault, "virtiofs", "virtiofs"}, {boot.VariantStock, "9p", "9p"},
	} {
		c := vmm.Config{Package: &boot.Package{Manifest: boot.Manifest{Variant: x.variant}}}
		var w wire.Launch
		v := &spec.Volume{Name: "d", Directory: &spec.DirectoryVolume{Path: t.TempDir(), Transport: x.transport}}
		if err := share(v, &c, &w); err != nil {
			t.Fatal(err)
		}
		if got := w.Directories[0].Type; got != x.want || (len(c.Virtiofs) == 1) != (x.want == "virtiofs") || len(c.Virtiofs)+len(c.Shares) != 1 {
			t.Errorf("%s, %q: %s, %+v", x.variant, x.transport, got, c)
		}
	}
}
