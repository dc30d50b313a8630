//go:build vm

package vmm

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// fromTemplate is a configuration that shares its templates with other tests.
func fromTemplate(t testing.TB) Config {
	c := config(t)
	c.Start = Template
	return c
}

// ownTemplates gives a configuration a cache of its own.
func ownTemplates(t testing.TB, c Config) Config {
	var err error
	if c.CacheDir, err = os.MkdirTemp(shared.dir, "cache"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(c.CacheDir) })
	return c
}

func again(t testing.TB, c Config) Config {
	c.RunDir = filepath.Join(t.TempDir(), "run")
	return c
}

func templateOf(t testing.TB, m *Machine, c Config) TemplateInfo {
	t.Helper()
	info, err := OpenTemplates(c.CacheDir, c.Log).info(m.Info().Template)
	if err != nil {
		t.Fatal(err)
	}
	return info
}

// heldDigest hashes the sealed memory that this process's machines map.
func heldDigest(t testing.TB, name string) string {
	t.Helper()
	held.Lock()
	defer held.Unlock()
	for id, m := range held.memories {
		if strings.Contains(id, name) {
			_, digest, err := digestSparse(nil, m.file)
			if err != nil {
				t.Fatal(err)
			}
			return digest
		}
	}
	t.Fatal("this process holds no memory")
	return ""
}

// Nothing that is to be a pod's own may come from the template.
func TestVMTemplateMachinesAreIndividuals(t *testing.T) {
	c := fromTemplate(t)
	seen := map[string]bool{}
	for range 3 {
		before := time.Now()
		m := start(t, again(t, c))
		if m.Info().Start != Template {
			t.Fatalf("not from a template: %+v", m.Info())
		}
		for _, what := range []string{"random", "uuid", "bootid"} {
			var v string
			ask(t, m, what, nil, &v)
			if len(v) < 32 || seen[v] {
				t.Errorf("%s gives %q a second time", what, v)
			}
			seen[v] = true
		}
		var guest time.Time
		ask(t, m, "time", nil, &guest)
		if now := time.Now(); guest.Before(before) || guest.After(now.Add(time.Second)) {
			t.Errorf("the guest's clock says %v between %v and %v", guest, before, now)
		}
	}
}

// hostilePods is how many pods try to change their template.
func hostilePods(t *testing.T, n, dirtyMiB int) {
	c := fromTemplate(t)
	first := start(t, again(t, c))
	info := templateOf(t, first, c)
	for i := range n {
		m := start(t, again(t, c))
		ask(t, m, "dirty", url.Values{"mib": {fmt.Sprint(dirtyMiB)}}, nil)
		qemuTriesToWrite(t, m, i)
		if err := m.Kill(); err != nil {
			t.Fatal(err)
		}
	}
	if got := heldDigest(t, info.Name); got != info.RAM {
		t.Errorf("after %d pods the template's memory has digest %s, before %s", n, got, info.RAM)
	}
	if err := OpenTemplates(c.CacheDir, c.Log).Verify(info.Name); err != nil {
		t.Error(err)
	}
	var s string
	ask(t, first, "uuid", nil, &s)
}

// qemuTriesToWrite does to the template's memory what a QEMU that its guest has taken over could do, and more: it is root.
func qemuTriesToWrite(t *testing.T, m *Machine, i int) {
	t.Helper()
	found := false
	fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", m.Info().PID))
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range fds {
		target, _ := os.Readlink(path)
		if !strings.HasPrefix(target, "/memfd:cradle-template-") {
			continue
		}
		found = true
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if _, err := f.WriteAt([]byte("mine"), int64(i)*pageSize); !errors.Is(err, unix.EPERM) {
			t.Errorf("write: %v", err)
		}
		if err := f.Truncate(0); !errors.Is(err, unix.EPERM) {
			t.Errorf("truncate: %v", err)
		}
		if err := unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, 1<<20); !errors.Is(err, unix.EPERM) {
			t.Errorf("punch a hole: %v", err)
		}
		if _, err := unix.Mmap(int(f.Fd()), 0, pageSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); !errors.Is(err, unix.EPERM) {
			t.Errorf("map shared: %v", err)
		}
	}
	if !found {
		t.Error("QEMU has no template memory open")
	}
}

func TestVMTemplateIsTheSameAfterHostilePods(t *testing.T) { hostilePods(t, 3, 40) }

// Another process that starts machines of the template finds the memory that this one holds, and holds it on when this one lets go.
func TestVMTemplateMemoryIsShared(t *testing.T) {
	c := fromTemplate(t)
	m := start(t, again(t, c))
	other := startLauncher(t, again(t, c))
	defer other.Wait()
	defer other.Process.Kill()
	pid, _ := other.ready(t)
	want := mappedTemplate(t, m.Info().PID)
	if got := mappedTemplate(t, pid); got != want || got == 0 {
		t.Errorf("another launcher's machine maps memory %d, this one's %d", got, want)
	}
	if err := errors.Join(m.Kill(), m.Close()); err != nil {
		t.Fatal(err)
	}
	if next := start(t, again(t, c)); mappedTemplate(t, next.Info().PID) != want {
		t.Error("memory was filled again although another process held it")
	}
}

// mappedTemplate is the inode of the memory that a QEMU has open, 0 if it has none.
func mappedTemplate(t *testing.T, pid int) uint64 {
	t.Helper()
	fds, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	for _, path := range fds {
		if target, _ := os.Readlink(path); strings.HasPrefix(target, "/memfd:cradle-template-") {
			var st unix.Stat_t
			if err := unix.Stat(path, &st); err != nil {
				t.Fatal(err)
			}
			return st.Ino
		}
	}
	return 0
}

// Of many processes that start machines at once one fills the memory, and the others use the same.
func TestVMTemplateMemoryIsFilledOnce(t *testing.T) {
	c := fromTemplate(t)
	if _, err := OpenTemplates(c.CacheDir, c.Log).Build(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	launchers := make([]*launcher, 4)
	for i := range launchers {
		launchers[i] = startLauncher(t, again(t, c))
		defer launchers[i].Wait()
		defer launchers[i].Process.Kill()
	}
	memories := map[uint64]bool{}
	for _, l := range launchers {
		pid, _ := l.ready(t)
		memories[mappedTemplate(t, pid)] = true
	}
	if len(memories) != 1 || memories[0] {
		t.Errorf("%d launchers' machines have memories %v", len(launchers), memories)
	}
}

// What a process of another user holds is never trusted.
func TestVMTemplateMemoryIsAdoptedFromRootAlone(t *testing.T) {
	c := fromTemplate(t)
	m := start(t, again(t, c))
	info := templateOf(t, m, c)
	fds, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", m.Info().PID))
	for _, path := range fds {
		if target, _ := os.Readlink(path); strings.HasPrefix(target, "/memfd:") {
			fd, _ := strconv.ParseUint(filepath.Base(path), 10, 31)
			begun, err := startTime(m.Info().PID)
			if err != nil {
				t.Fatal(err)
			}
			if f := adoptFrom(m.Info().PID, begun, fd, info.Name, int64(info.Key.Memory)); f != nil {
				t.Error("memory was adopted from QEMU")
			}
			return
		}
	}
	t.Error("QEMU has no template memory open")
}

func TestVMDamagedTemplateIsMadeAgain(t *testing.T) {
	c := ownTemplates(t, fromTemplate(t))
	for _, file := range []string{ramFile, vmState, keyFile} {
		t.Run(file, func(t *testing.T) {
			m := start(t, again(t, c))
			before := templateOf(t, m, c)
			if err := errors.Join(m.Kill(), m.Close()); err != nil {
				t.Fatal(err)
			}
			path := filepath.Join(c.CacheDir, "templates", before.Name, file)
			f, err := os.OpenFile(path, os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			at := int64(0)
			if file == ramFile {
				if at, err = unix.Seek(int(f.Fd()), 0, unix.SEEK_DATA); err != nil {
					t.Fatal(err)
				}
			}
			var b [1]byte
			f.ReadAt(b[:], at)
			b[0] ^= 1
			if _, err := f.WriteAt(b[:], at); err != nil {
				t.Fatal(err)
			}
			f.Close()
			m = start(t, again(t, c))
			if after := templateOf(t, m, c); !after.Made.After(before.Made) {
				t.Error("the damaged template was used")
			}
		})
	}
}

// A template whose state QEMU does not take costs one cold start with a reason, and is not tried again and again.
func TestVMTemplateThatDoesNotRestore(t *testing.T) {
	c := ownTemplates(t, fromTemplate(t))
	c.Start = Auto
	m := start(t, again(t, c))
	info := templateOf(t, m, c)
	if err := errors.Join(m.Kill(), m.Close()); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(c.CacheDir, "templates", info.Name)
	state := []byte("no state of any machine")
	rewriteState(t, dir, state)
	for range 2 {
		m := start(t, again(t, c))
		if i := m.Info(); i.Start != Cold || !strings.Contains(i.StartWhy, "template") {
			t.Errorf("start %s, reason %q", i.Start, i.StartWhy)
		}
	}
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the template is still there: %v", err)
	}
}

func TestVMTemplatesAreListedAndRemoved(t *testing.T) {
	c := ownTemplates(t, fromTemplate(t))
	ts := OpenTemplates(c.CacheDir, c.Log)
	ctx, cancel := testContext()
	defer cancel()
	var made []string
	for _, cpus := range []int{1, 2} {
		c := again(t, c)
		c.CPUs = cpus
		info, err := ts.Build(ctx, c)
		if err != nil {
			t.Fatal(err)
		}
		made = append(made, info.Name)
	}
	list, err := ts.List()
	if err != nil || len(list) != 2 || list[0].RAMBytes == 0 || list[0].Used.IsZero() {
		t.Fatalf("%+v, %v", list, err)
	}
	old := time.Now().Add(-2 * time.Hour)
	os.Chtimes(filepath.Join(ts.Dir, made[0], keyFile), old, old)
	litter := filepath.Join(ts.Dir, "."+made[1]+".work")
	os.Mkdir(litter, 0o700)
	if gone, err := ts.GC(Limit{Unused: time.Hour}); err != nil || !slices.Equal(gone, made[:1]) {
		t.Errorf("GC by age removed %v, %v, want %v", gone, err, made[:1])
	}
	if _, err := os.Stat(litter); err == nil {
		t.Error("GC left what a killed process had begun")
	}
	if gone, err := ts.GC(Limit{Bytes: 1}); err != nil || !slices.Equal(gone, made[1:]) {
		t.Errorf("GC by size removed %v, %v, want %v", gone, err, made[1:])
	}
	if err := ts.Remove(made[0]); !errors.Is(err, ErrNoTemplate) {
		t.Errorf("Remove of nothing: %v", err)
	}
}

// A tap with a virtio-net header needs another template than one without.
func TestVMTemplateWithOffload(t *testing.T) {
	tap, err := spareTap()
	if err != nil {
		t.Fatal(err)
	}
	defer tap.Close()
	c := fromTemplate(t)
	c.Net = Net{Mode: NetTap, Tap: tap}
	m := start(t, again(t, c))
	if k := templateOf(t, m, c).Key; !k.Offload {
		t.Errorf("key %+v", k)
	}
}

func TestVMManyAtOnce(t *testing.T) {
	c := ownTemplates(t, fromTemplate(t))
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	var g sync.WaitGroup
	began := time.Now()
	for range 8 {
		c := again(t, c)
		g.Go(func() {
			m, err := Start(ctx, c)
			if err != nil {
				t.Error(err)
				return
			}
			if m.Info().Start != Template {
				t.Errorf("%+v", m.Info())
			}
			if err := errors.Join(m.Kill(), m.Close()); err != nil {
				t.Error(err)
			}
		})
	}
	g.Wait()
	t.Logf("8 machines and their template in %v", time.Since(began))
	if list, err := OpenTemplates(c.CacheDir, c.Log).List(); err != nil || len(list) != 1 {
		t.Errorf("templates: %v, %v, want one", list, err)
	}
	held.Lock()
	defer held.Unlock()
	for id := range held.memories {
		if strings.HasPrefix(id, c.CacheDir) {
			t.Error("memory is held after the last machine's end")
		}
	}
}

// rewriteState replaces a template's device state, digest included.
func rewriteState(t *testing.T, dir string, state []byte) {
	t.Helper()
	var info TemplateInfo
	path := filepath.Join(dir, keyFile)
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(data, &info); err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(state)
	info.State = hex.EncodeToString(sum[:])
	if data, err = json.Marshal(info); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.WriteFile(path, data, 0o600), os.WriteFile(filepath.Join(dir, vmState), state, 0o600)); err != nil {
		t.Fatal(err)
	}
}
