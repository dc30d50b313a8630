//go:build vm

package ganesha

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/csi-plugin/filer/lease"
	"github.com/cradlestack/cradlestack/csi-plugin/filer/nfs"
	"github.com/cradlestack/cradlestack/csi-plugin/filer/snapshots"
	"github.com/cradlestack/cradlestack/internal/mountns"
	"github.com/cradlestack/cradlestack/internal/netnstest"
)

func TestMain(m *testing.M) {
	mountns.Own()
	os.Exit(m.Run())
}

// A world is two volumes, each a file system, and a server.
type world struct {
	t    *testing.T
	s    *Server
	base string
	by   *lease.Lease
}

func run(t testing.TB, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
}

func newWorld(t *testing.T) *world {
	t.Helper()
	if os.Getuid() != 0 {
		t.Fatal("this needs root")
	}
	// A name that the configuration has to be told with care.
	w := &world{t: t, base: filepath.Join(t.TempDir(), `with "quotes"; } \ and # more`), by: lease.New()}
	w.by.Extend(lease.Forever)
	w.by.Open()
	for _, name := range []string{"v", "w"} {
		root, image := w.root(name), filepath.Join(w.base, name+".img")
		if err := errors.Join(os.MkdirAll(root, 0o755), os.WriteFile(image, nil, 0o600), os.Truncate(image, 32<<20)); err != nil {
			t.Fatal(err)
		}
		run(t, "mkfs.ext4", "-q", image)
		run(t, "mount", "-o", "loop,dirsync", image, root)
		t.Cleanup(func() { _ = exec.Command("umount", root).Run() })
		if err := os.WriteFile(filepath.Join(root, "of-"+name), []byte(name), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	w.open()
	return w
}

func (w *world) root(name string) string { return filepath.Join(w.base, name) }

// open makes a server at a port that was free a moment ago.
func (w *world) open(trust ...bool) {
	w.t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		w.t.Fatal(err)
	}
	at := l.Addr().(*net.TCPAddr).AddrPort()
	if len(trust) > 0 {
		l.Close()
	}
	w.s, err = New(Config{Listen: at, State: filepath.Join(w.base, "state"), Run: filepath.Join(w.base, "run"), Mounts: filepath.Join(w.base, "mounts"), Key: bytes.Repeat([]byte{7}, 32), Lease: w.by, Trust: len(trust) > 0, Log: slog.New(slog.NewTextHandler(w.t.Output(), nil))})
	if err != nil {
		w.t.Fatal(err)
	}
	s := w.s
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	if len(trust) == 0 {
		go func() { served <- s.Serve(ctx, l) }()
	} else {
		served <- nil
	}
	w.t.Cleanup(func() {
		cancel()
		if err := errors.Join(s.Close(), <-served); err != nil {
			w.t.Error(err)
		}
	})
}

func (w *world) export(name string, clients ...string) nfs.Export {
	return nfs.Export{Path: "/" + name + ".secret", Root: w.root(name), Volume: name, Clients: prefixes(clients...)}
}

func (w *world) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

// Statuses of NFSv4 (RFC 7530 §13.1).
const (
	statusOK, statusNoEnt, statusAccess, statusROFS, statusStale, statusBadHandle, statusDelay, statusBadName = 0, 2, 13, 30, 70, 10001, 10008, 10041
)

func opaque(b []byte) []byte {
	out := binary.BigEndian.AppendUint32(nil, uint32(len(b)))
	return append(append(out, b...), make([]byte, -len(b)&3)...)
}

func op(number uint32, args ...[]byte) []byte {
	return append(binary.BigEndian.AppendUint32(nil, number), bytes.Join(args, nil)...)
}

func number(n uint32) []byte { return binary.BigEndian.AppendUint32(nil, n) }

// request is a call of version 4.0, as root.
func request(ops ...[]byte) []byte {
	call := number(1)
	for _, v := range []uint32{0, 2, 100003, 4, 1, 1, 24, 0, 1, 0x78000000, 0, 0, 0, 0, 0, 0, 0, uint32(len(ops))} { // AUTH_SYS, machine "x"; no verifier; no tag, minor version 0
		call = binary.BigEndian.AppendUint32(call, v)
	}
	return append(call, bytes.Join(ops, nil)...)
}

// compound does operations of version 4.0 in one call, as root. It returns the status, and what the last operation that was done has answered after its own.
func (w *world) compound(ops ...[]byte) (status uint32, result []byte) {
	w.t.Helper()
	call := request(ops...)
	var reply []byte
	var err error
	for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(5 * time.Millisecond) { // the server may be starting, or ending
		if reply, err = w.exchange(call); err == nil && (len(reply) < 28 || binary.BigEndian.Uint32(reply[24:]) != statusDelay) {
			break
		}
	}
	w.must(err)
	if len(reply) < 36 || binary.BigEndian.Uint32(reply[8:]) != 0 || binary.BigEndian.Uint32(reply[20:]) != 0 {
		w.t.Fatalf("the call is not accepted: %x", reply)
	}
	status = binary.BigEndian.Uint32(reply[24:])
	if status != statusOK {
		return status, nil
	}
	// What has results is asked for at the end alone.
	return status, reply[min(len(reply), 36+8*(len(ops)-1)+8):]
}

// exchange sends a call and returns the reply.
func (w *world) exchange(call []byte) ([]byte, error) {
	conn, err := net.Dial("tcp", w.s.Listen.String())
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(time.Minute))
	if _, err := conn.Write(append(binary.BigEndian.AppendUint32(nil, 1<<31|uint32(len(call))), call...)); err != nil {
		return nil, err
	}
	head := make([]byte, 4)
	if _, err := io.ReadFull(conn, head); err != nil {
		return nil, err
	}
	reply := make([]byte, binary.BigEndian.Uint32(head)&(1<<31-1))
	_, err = io.ReadFull(conn, reply)
	return reply, err
}

// handle looks for the handle of what is at names below the root.
func (w *world) handle(names ...string) (status uint32, handle []byte) {
	w.t.Helper()
	ops := [][]byte{op(opPutrootfh)}
	for _, name := range names {
		if name == ".." {
			ops = append(ops, op(opLookupp))
		} else {
			ops = append(ops, op(opLookup, opaque([]byte(name))))
		}
	}
	status, result := w.compound(append(ops, op(opGetfh))...)
	if status != statusOK {
		return status, nil
	}
	n := binary.BigEndian.Uint32(result)
	return status, result[4 : 4+n]
}

// opens says how a handle is answered.
func (w *world) opens(handle []byte) (status uint32) {
	w.t.Helper()
	status, _ = w.compound(op(opPutfh, opaque(handle)), op(opGetattr, []byte{0, 0, 0, 1, 0, 0, 0, 2})) // the type
	return status
}

// TestRootConfinement: file handles that were made up, or that are of another volume, lead nowhere; nor does the way up, or a link.
func TestRootConfinement(t *testing.T) {
	w := newWorld(t)
	w.must(os.Symlink("/etc", filepath.Join(w.root("v"), "link")))
	w.must(w.s.Export(w.export("v", "127.0.0.1/32")))
	w.must(w.s.Export(w.export("w", "127.0.0.1/32")))
	w.must(w.s.Start())
	_, v := w.handle("v.secret")
	s, file := w.handle("w.secret", "of-w")
	if s != statusOK || w.opens(v) != statusOK || w.opens(file) != statusOK {
		t.Fatalf("the volumes are not served: %d", s)
	}
	// From now on this host has v alone.
	w.must(w.s.Export(w.export("w", "10.255.255.0/24")))
	if s := w.opens(file); s != statusAccess && s != statusStale {
		t.Errorf("a file of a volume that is another client's: %d", s)
	}
	if s, _ := w.handle("w.secret"); s != statusNoEnt && s != statusAccess {
		t.Errorf("a volume that is another client's: %d", s)
	}
	if bytes.Equal(v[2:4], file[2:4]) {
		t.Fatalf("the handles %x and %x are not what this test takes them for", v, file)
	}
	forged := bytes.Clone(file)
	copy(forged[2:4], v[2:4]) // the number of v's export
	if s := w.opens(forged); s != statusBadHandle {
		t.Errorf("a file of another volume, by this one's number: %d", s)
	}
	for i := range len(v) * 8 {
		forged := bytes.Clone(v)
		forged[i/8] ^= 1 << (i % 8)
		if s := w.opens(forged); s != statusBadHandle {
			t.Errorf("a handle with another bit %d: %d", i, s)
		}
	}
	for _, names := range [][]string{{"v.secret", "..", "w.secret"}, {"v.secret", "..", "..", "etc"}, {"v.secret", "link", "passwd"}, {"v.secret", "../w"}, {"v"}, {"v.secret", "lost+found", "..", "..", "w.secret"}} {
		if s, h := w.handle(names...); s == statusOK {
			t.Errorf("%v leads to %x", names, h)
		}
	}
	// After the end of its export a handle leads nowhere, though the number is one that another export could have.
	w.must(w.s.Unexport("/v.secret"))
	w.must(w.s.Unexport("/v.secret"))
	if s := w.opens(v); s != statusStale {
		t.Errorf("after the end: %d", s)
	}
	run(t, "umount", w.root("v"))
	for _, e := range []nfs.Export{
		{Path: "/d.secret", Root: filepath.Join(w.base, "none"), Volume: "d", Clients: prefixes("127.0.0.1/32")},
		{Path: "/d.secret", Root: "/proc", Volume: "d", Clients: prefixes("127.0.0.1/32")},
	} {
		if err := w.s.Export(e); err == nil {
			t.Errorf("%+v is exported", e)
		}
	}
}

// TestRootForged: of two volumes that are directories of one file system, a client of one makes up handles of the other, and of what is beside them. NFS-Ganesha would
// open all of that.
func TestRootForged(t *testing.T) {
	w := newWorld(t)
	shared := w.root("v")
	for _, name := range []string{"a", "b"} {
		dir := filepath.Join(shared, name)
		w.must(os.Mkdir(dir, 0o755))
		w.must(os.WriteFile(filepath.Join(dir, "of-"+name), []byte(name), 0o644))
		run(t, "mount", "--bind", dir, dir)
		t.Cleanup(func() { _ = exec.Command("umount", dir).Run() })
	}
	kernel := func(names ...string) []byte {
		t.Helper()
		h, _, err := unix.NameToHandleAt(unix.AT_FDCWD, filepath.Join(append([]string{shared}, names...)...), 0)
		w.must(err)
		return h.Bytes()
	}
	a, b := w.export("v/a", "127.0.0.1/32"), w.export("v/b", "127.0.0.1/32")
	a.Path, b.Path = "/a.secret", "/b.secret"
	outside := map[string][]byte{"another volume": kernel("b"), "its file": kernel("b", "of-b"), "the pool": kernel(), "what is in the pool": kernel("of-v")}
	for _, trust := range []bool{true, false} {
		if !trust {
			w.must(w.s.Close())
			w.open()
		} else {
			w.must(w.s.Close())
			w.open(true)
		}
		w.must(w.s.Export(a))
		w.must(w.s.Export(b))
		w.must(w.s.Start())
		s, file := w.handle("a.secret", "of-a")
		if s != statusOK || w.opens(file) != statusOK {
			t.Fatalf("the volume is not served: %d", s)
		}
		own := kernel("a", "of-a")
		raw := file
		if !trust {
			raw = file[:len(file)-macSize]
		}
		if bytes.Count(raw, own) != 1 {
			t.Fatalf("handle %x has not %x in it", raw, own)
		}
		if s := w.opens(raw); !trust && s != statusBadHandle {
			t.Errorf("a handle without authentication: %d", s)
		}
		for what, its := range outside {
			forged := bytes.Replace(raw, own, its, 1)
			if trust {
				if s := w.opens(forged); s != statusOK {
					t.Errorf("where clients are trusted, %s by a handle that is made up: %d", what, s)
				}
				continue
			}
			other := newSeal([]byte("of another filer"))
			for how, mac := range map[string][]byte{"no": nil, "the other's": file[len(raw):], "zero": make([]byte, macSize), "another key's": other.mac(forged), "a long": make([]byte, 64)} {
				if s := w.opens(slices.Concat(forged, mac)); s != statusBadHandle {
					t.Errorf("%s, with %s authentication: %d", what, how, s)
				}
			}
			// Nothing else stands between.
			if s := w.opens(slices.Concat(forged, w.s.front.mac(forged))); s != statusOK {
				t.Errorf("%s, as if it were authentic: %d", what, s)
			}
		}
		if trust {
			continue
		}
		// An authentic handle is its clients' alone, whatever else they may have.
		_, file = w.handle("b.secret", "of-b")
		b.Clients = prefixes("10.255.255.0/24")
		w.must(w.s.Export(b))
		if s := w.opens(file); s != statusAccess && s != statusStale {
			t.Errorf("a file of a volume that is another client's now: %d", s)
		}
		copy(file[2:4], raw[2:4])
		if s := w.opens(file); s != statusBadHandle {
			t.Errorf("by the number of an export that is its own: %d", s)
		}
		s, result := w.compound(op(opPutrootfh), op(opReaddir, make([]byte, 16), number(1000), number(1000), number(1), number(1<<attributeFilehandle)))
		if s != statusOK || !bytes.Contains(result, []byte("a.secret")) || bytes.Contains(result, []byte("b.secret")) {
			t.Errorf("the root has %q, %d", result, s)
		}
		// What can't be read to its end is not passed on: there could be handles in it.
		hidden := op(opPutfh, opaque(bytes.Replace(raw, own, kernel("b"), 1)))
		for what, before := range map[string][]byte{
			"of version 4.1 that is known to be last": op(42), "that there is none of": op(9999), "with attributes without an end": op(opGetattr, number(1<<30)),
			"to open in an unknown way": op(opOpen, make([]byte, 20), opaque(nil), number(0), number(7)),
		} {
			if reply, err := w.exchange(request(before, hidden, op(opGetattr, number(1), number(2)))); err == nil {
				t.Errorf("an operation %s, and a handle after it, is answered by %x", what, reply)
			}
		}
		if s, _ := w.compound(op(opPutrootfh), op(opGetattr, number(4), make([]byte, 16)), hidden); s != statusBadHandle {
			t.Errorf("after many attributes a handle that is made up: %d", s)
		}
		// By version 3 there is nothing.
		call := request()
		binary.BigEndian.PutUint32(call[16:], 3)
		reply, err := w.exchange(call)
		if w.must(err); binary.BigEndian.Uint32(reply[20:]) != 2 { // PROG_MISMATCH
			t.Errorf("version 3 is answered by %x", reply)
		}
	}
}

// TestRootProcess: handles and numbers outlast the process, which is there when it should be, and only then; and nothing is left of it.
func TestRootProcess(t *testing.T) {
	w := newWorld(t)
	w.must(w.s.Export(w.export("v", "127.0.0.1/32")))
	w.must(w.s.Start())
	_, v := w.handle("v.secret", "of-v")
	pid := func() int {
		t.Helper()
		c := w.s.alive()
		if c == nil {
			t.Fatal("there is no process")
		}
		return c.cmd.Process.Pid
	}
	away := func(what string) {
		t.Helper()
		if c := w.s.alive(); c != nil {
			t.Errorf("%s: there is a process", what)
		}
		conn, err := net.Dial("tcp", w.s.Listen.String())
		if err != nil {
			return
		}
		defer conn.Close()
		call := request(op(opPutrootfh))
		conn.Write(append(binary.BigEndian.AppendUint32(nil, 1<<31|uint32(len(call))), call...))
		conn.SetReadDeadline(time.Now().Add(2 * firstRetry))
		if n, err := conn.Read(make([]byte, 1)); n > 0 || err == nil {
			t.Errorf("%s: somebody answers", what)
		}
	}
	here := func(what string) {
		t.Helper()
		if s := w.opens(v); s != statusOK {
			t.Errorf("%s: the handle is answered by %d", what, s)
		}
	}
	first := pid()
	w.must(unix.Kill(first, unix.SIGKILL))
	here("killed")
	w.must(w.s.Export(w.export("w", "127.0.0.1/32")))
	w.s.Rest()
	away("at rest")
	w.must(w.s.Unexport("/w.secret"))
	time.Sleep(3 * firstRetry)
	away("still at rest")
	w.s.Wake()
	here("awake")
	w.must(w.s.Hold("v", func() error {
		away("held")
		w.s.Wake()
		time.Sleep(3 * firstRetry)
		away("still held")
		return nil
	}))
	here("no longer held")
	w.s.Drain()
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid()))
	if w.must(err); !strings.Contains(string(stat), ") T ") {
		t.Errorf("drained it is not still: %s", stat)
	}
	w.must(w.s.Close())
	away("closed")
	w.s.Wake()
	away("closed for good")

	// The next one, which a lease that has lapsed keeps from starting.
	w.by.Lapse()
	w.open()
	w.must(w.s.Export(w.export("v", "127.0.0.1/32")))
	others := filepath.Join(w.base, "state/v4recov/node0.others") // the list that another filer writes which has the lease
	w.must(os.Mkdir(others, 0o700))
	epoch, err := os.ReadFile(filepath.Join(w.base, "state/epoch"))
	w.must(err)
	w.must(w.s.Start())
	away("without a lease")
	if now, err := os.ReadFile(filepath.Join(w.base, "state/epoch")); err != nil || !bytes.Equal(now, epoch) {
		t.Errorf("without a lease the epoch was %s and is %s, %v", epoch, now, err)
	}
	w.must(os.Remove(others)) // it has stayed
	w.by.Extend(lease.Forever)
	w.by.Open()
	w.s.Wake()
	here("with a lease")

	// What it does not take over it is replaced for: a mount that was busy is free after the end of the export.
	c := w.s.alive()
	w.must(c.cmd.Process.Signal(unix.SIGSTOP))
	go func() {
		time.Sleep(100 * time.Millisecond)
		c.cmd.Process.Kill()
	}()
	w.must(w.s.Unexport("/v.secret"))
	run(t, "umount", w.root("v"))
	w.must(w.s.Close())

	entries, err := os.ReadDir(filepath.Join(w.base, "state/v4recov"))
	w.must(err)
	if len(entries) > 3 { // the list that counts, the link to it, and that of the last process
		t.Errorf("recovery has %v", entries)
	}
	if _, err := os.Stat(filepath.Join(w.base, "run/ganesha.conf.new")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("there is a file left: %v", err)
	}
}

// A museum has snapshots, each an image.
type museum struct {
	w    *world
	mu   sync.Mutex
	all  []snapshots.Snapshot
	away bool // they can't be mounted
}

func (m *museum) image(name string) string { return filepath.Join(m.w.base, "snapshot-"+name) }

// take takes one, in which a file has a text.
func (m *museum) take(name, text string) {
	m.w.t.Helper()
	at := m.w.t.TempDir()
	image := m.image(name)
	m.w.must(os.WriteFile(filepath.Join(at, "file"), []byte(text), 0o644))
	m.w.must(errors.Join(os.RemoveAll(image), os.WriteFile(image, nil, 0o600), os.Truncate(image, 16<<20)))
	run(m.w.t, "mkfs.ext4", "-q", "-d", at, image)
	m.mu.Lock()
	defer m.mu.Unlock()
	m.all = append(slices.DeleteFunc(m.all, func(s snapshots.Snapshot) bool { return s.Name == name }), snapshots.Snapshot{Name: name, Taken: time.Now()})
}

func (m *museum) source() *snapshots.Source {
	return &snapshots.Source{
		List: func() ([]snapshots.Snapshot, error) {
			m.mu.Lock()
			defer m.mu.Unlock()
			return slices.Clone(m.all), nil
		},
		Mount: func(name, path string) error {
			if m.away {
				return errors.New("it can't be mounted")
			}
			return exec.Command("mount", "-o", "loop,ro", m.image(name), path).Run()
		},
	}
}

// mounted are the snapshots that are.
func (w *world) mounted() (all []string) {
	w.t.Helper()
	points, err := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) { return !strings.Contains(m.Mountpoint, mountPrefix), false })
	w.must(err)
	entries, err := os.ReadDir(filepath.Join(w.base, "mounts"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		w.t.Fatal(err)
	}
	if len(entries) != len(points) {
		w.t.Errorf("there are %d mounts at %v", len(points), entries)
	}
	for _, m := range points {
		all = append(all, m.Source)
	}
	return all
}

// at is what a name in a directory leads to.
func (w *world) at(directory []byte, name string) (status uint32, handle []byte) {
	w.t.Helper()
	status, result := w.compound(op(opPutfh, opaque(directory)), op(opLookup, opaque([]byte(name))), op(opGetfh))
	if status != statusOK {
		return status, nil
	}
	n := binary.BigEndian.Uint32(result)
	return status, result[4 : 4+n]
}

// reads says what a file has.
func (w *world) reads(what string, handle []byte, text string) {
	w.t.Helper()
	status, result := w.compound(op(opPutfh, opaque(handle)), op(opRead, make([]byte, sizeStateid), number(0), number(0), number(100)))
	if status != statusOK || len(result) < 8+len(text) || string(result[8:8+len(text)]) != text {
		w.t.Errorf("%s: a snapshot's file is answered by %d, %q; want %q", what, status, result, text)
	}
}

// names are what a directory lists.
func (w *world) names(directory []byte) (all []string) {
	w.t.Helper()
	status, result := w.compound(op(opPutfh, opaque(directory)), op(opReaddir, make([]byte, 8+sizeVerifier), number(4096), number(8192), number(0)))
	if status != statusOK {
		w.t.Fatalf("a directory is listed by %d", status)
	}
	c := &cursor{b: result, at: sizeVerifier}
	for c.number() != 0 && !c.bad {
		c.skip(8)
		all = append(all, string(c.opaque()))
		c.attributes()
	}
	return all
}

// TestRootSnapshots: snapshots are there for whom the volume is there, to be read; handles of theirs are the same when they are mounted anew, by the next process and the
// next server. One that is deleted is away, one that is taken anew is another. What nobody looks at is not mounted.
func TestRootSnapshots(t *testing.T) {
	w := newWorld(t)
	m := &museum{w: w}
	m.take("first", "text")
	m.take("second", "another text")
	export := w.export("v", "127.0.0.1/32")
	export.Snapshots = m.source()
	elsewhere := w.export("w", "10.255.255.255/32")
	elsewhere.Snapshots = m.source()
	w.must(errors.Join(w.s.Export(export), w.s.Export(elsewhere)))
	w.must(w.s.Start())
	_, root := w.handle("v.secret")
	status, dir := w.at(root, ".snapshots")
	if status != statusOK {
		t.Fatalf(".snapshots is answered by %d", status)
	}
	if got := w.names(dir); !slices.Equal(got, []string{"first", "second"}) {
		t.Errorf("there are %v", got)
	}
	if got := w.mounted(); len(got) > 0 {
		t.Errorf("listing mounts %v", got)
	}
	if list := w.names(root); slices.ContainsFunc(list, func(name string) bool { return strings.HasPrefix(name, ".") }) {
		t.Errorf("the volume's root lists %v", list)
	}
	status, first := w.at(dir, "first")
	if status != statusOK {
		t.Fatalf("a snapshot is answered by %d", status)
	}
	status, file := w.at(first, "file")
	if status != statusOK {
		t.Fatalf("a snapshot's file is answered by %d", status)
	}
	w.reads("at first", file, "text")
	devices := w.mounted()
	if len(devices) != 1 {
		t.Fatalf("there are %v mounted", devices)
	}
	// What leads nowhere, and what can't be changed.
	for what, c := range map[string]struct {
		directory []byte
		ops       [][]byte
		want      uint32
	}{
		"what is not there":            {dir, [][]byte{op(opLookup, opaque([]byte("third")))}, statusNoEnt},
		"what keeps the directory":     {dir, [][]byte{op(opLookup, opaque([]byte(keeper)))}, statusNoEnt},
		"a directory beside snapshots": {dir, [][]byte{op(opCreate, number(2), opaque([]byte("new")), number(0), number(0)), op(opGetfh)}, statusROFS},
		"a directory in one":           {first, [][]byte{op(opCreate, number(2), opaque([]byte("new")), number(0), number(0)), op(opGetfh)}, statusROFS},
		"one of its name":              {root, [][]byte{op(opCreate, number(2), opaque([]byte(".snapshots")), number(0), number(0)), op(opGetfh)}, statusROFS},
		"a file removed":               {first, [][]byte{op(opRemove, opaque([]byte("file")))}, statusROFS},
		"in a snapshot of a snapshot":  {first, [][]byte{op(opLookup, opaque([]byte(".snapshots"))), op(opGetfh)}, statusNoEnt},
	} {
		if status, _ := w.compound(append([][]byte{op(opPutfh, opaque(c.directory))}, c.ops...)...); status != c.want {
			t.Errorf("%s is answered by %d, not by %d", what, status, c.want)
		}
	}
	_, top := w.handle()
	if got := w.names(top); !slices.Equal(got, []string{"v.secret"}) {
		t.Errorf("the server's root has %q", got)
	}
	for _, is := range w.s.shelfs {
		if status, _ := w.handle(is.dir); status != statusNoEnt {
			t.Errorf("a directory of snapshots in the server's root is answered by %d", status)
		}
	}
	if status, _ := w.handle("w.secret", ".snapshots", "first"); status == statusOK {
		t.Error("a snapshot of somebody else's volume is there")
	}
	if got := w.mounted(); len(got) != 1 {
		t.Errorf("who may not see a snapshot has it mounted: %v", got)
	}
	// In other directories it is a name like others.
	w.must(os.MkdirAll(filepath.Join(w.root("v"), "d/.snapshots/ordinary"), 0o755))
	_, d := w.at(root, "d")
	if _, ordinary := w.at(d, ".snapshots"); !slices.Equal(w.names(ordinary), []string{"ordinary"}) {
		t.Error("a directory of that name elsewhere is none of its own")
	}

	// In one call with all names of a path.
	if status, by := w.handle("v.secret", ".snapshots", "first", "file"); status != statusOK || !bytes.Equal(by, file) {
		t.Errorf("by its path a snapshot's file is answered by %d, %x", status, by)
	}

	// Mounted anew it has another device, and the same handles.
	idle := func() {
		t.Helper()
		w.must(w.s.forgetIdle(time.Now().Add(time.Hour)))
		if got := w.mounted(); len(got) > 0 {
			t.Errorf("idle ones are mounted: %v", got)
		}
	}
	idle()
	// Its device is another's meanwhile, as soon as the kernel has it free.
	for exec.Command("losetup", "--read-only", devices[0], m.image("second")).Run() != nil {
		if of, err := exec.Command("losetup", "--noheadings", "--output", "BACK-FILE", devices[0]).Output(); err == nil && len(of) > 0 && !strings.Contains(string(of), "snapshot-first") {
			break // of somebody else's
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Cleanup(func() {
		if of, _ := exec.Command("losetup", "--associated", m.image("second"), "--noheadings", "--output", "NAME").Output(); slices.Contains(strings.Fields(string(of)), devices[0]) {
			_ = exec.Command("losetup", "--detach", devices[0]).Run()
		}
	})
	w.reads("mounted anew", file, "text")
	if got := w.mounted(); len(got) != 1 || got[0] == devices[0] {
		t.Errorf("%v is mounted anew as %v", devices, got)
	}
	w.must(unix.Kill(w.s.alive().cmd.Process.Pid, unix.SIGKILL))
	w.reads("by the next process", file, "text")
	idle()
	w.must(unix.Kill(w.s.alive().cmd.Process.Pid, unix.SIGKILL))
	w.reads("by the next process, mounted anew", file, "text")
	left := filepath.Join(w.base, "mounts", mountPrefix+"7") // as a server that was killed has left it
	w.must(w.s.Close())
	if got := w.mounted(); len(got) > 0 {
		t.Errorf("after the end %v is mounted", got)
	}
	w.must(errors.Join(os.MkdirAll(left, 0o700), unix.Mount("/", left, "", unix.MS_BIND, "")))
	w.open()
	if got := w.mounted(); len(got) > 0 {
		t.Errorf("by the next server %v is left mounted", got)
	}
	w.must(errors.Join(w.s.Export(export), w.s.Forget(), w.s.Start()))
	w.reads("by the next server", file, "text")
	if s := w.opens(first); s != statusOK {
		t.Errorf("by the next server its directory is answered by %d", s)
	}

	// Taken anew it is another one; what can't be mounted is not there, until it can.
	m.take("first", "new text")
	if _, now := w.at(dir, "first"); bytes.Equal(now, first) {
		t.Error("taken anew it has the same handle")
	}
	if s := w.opens(file); s != statusStale {
		t.Errorf("of the former one a file is answered by %d", s)
	}
	m.away = true
	if status, _ := w.at(dir, "second"); status != statusNoEnt {
		t.Errorf("what can't be mounted is answered by %d", status)
	}
	m.away = false
	if status, _ := w.at(dir, "second"); status != statusOK {
		t.Errorf("what can be mounted again is answered by %d", status)
	}
	// One whose number can't be kept is not shown: after a crash that number could be another's.
	kept, err := os.ReadFile(w.s.idsFile())
	w.must(errors.Join(err, os.Remove(w.s.idsFile()), os.Mkdir(w.s.idsFile(), 0o700)))
	m.take("third", "text")
	if status, _ := w.at(dir, "third"); status != statusNoEnt {
		t.Errorf("a snapshot whose number can't be kept is answered by %d", status)
	}
	w.must(errors.Join(os.Remove(w.s.idsFile()), os.WriteFile(w.s.idsFile(), kept, 0o600)))
	if status, _ := w.at(dir, "third"); status != statusOK {
		t.Errorf("once its number can be kept it is answered by %d", status)
	}
	export.Clients = prefixes("10.255.255.255/32")
	w.must(w.s.Export(export))
	if s := w.opens(first); s == statusOK {
		t.Error("whom the volume is no longer for has its snapshots")
	}
	w.must(w.s.Unexport(export.Path))
	if got := w.mounted(); len(got) > 0 {
		t.Errorf("what is no longer exported is mounted: %v", got)
	}
	if len(w.s.ids.Of) > 0 {
		t.Errorf("numbers are kept of %v", w.s.ids.Of)
	}
}

// TestRootHidden: a client neither sees nor changes what is hidden in a volume's root, whichever way it asks; below, the same name is one like others.
func TestRootHidden(t *testing.T) {
	w := newWorld(t)
	export := w.export("v", "127.0.0.1/32")
	export.Hidden = []string{".helper", ".other"}
	export.Snapshots = (&museum{w: w}).source()
	own := filepath.Join(w.root("v"), ".helper")
	w.must(errors.Join(os.Mkdir(filepath.Join(w.root("v"), "d"), 0o755), os.WriteFile(own, []byte("text"), 0o644), os.WriteFile(filepath.Join(w.root("v"), "d/.helper"), nil, 0o644),
		os.MkdirAll(filepath.Join(w.root("v"), ".snapshots/own"), 0o755)))
	w.must(errors.Join(w.s.Export(export), w.s.Start()))
	_, root := w.handle("v.secret")
	_, d := w.handle("v.secret", "d")
	names := w.names(root)
	if slices.Sort(names); !slices.Equal(names, []string{"d", "lost+found", "of-v"}) {
		t.Errorf("there are %q", names)
	}
	if names := w.names(d); !slices.Equal(names, []string{".helper"}) {
		t.Errorf("in another directory there are %q", names)
	}
	name := func(name string) []byte { return opaque([]byte(name)) }
	get := op(opGetattr, number(0))
	makes := [][]byte{number(2), name(".helper"), number(0), number(0)}
	for what, c := range map[string]struct {
		ops  [][]byte
		want uint32
	}{
		"looked up":                    {[][]byte{op(opPutfh, opaque(root)), op(opLookup, name(".helper"))}, statusNoEnt},
		"looked up after another call": {[][]byte{op(opPutfh, opaque(root)), get, op(opLookup, name(".helper")), get}, statusNoEnt},
		"looked up by its path":        {[][]byte{op(opPutrootfh), op(opLookup, name("v.secret")), op(opLookup, name(".helper"))}, statusNoEnt},
		"looked up with a saved root":  {[][]byte{op(opPutfh, opaque(root)), op(opSavefh), op(opPutfh, opaque(d)), op(opRestorefh), op(opLookup, name(".helper"))}, statusNoEnt},
		"looked up from below":         {[][]byte{op(opPutfh, opaque(d)), op(opLookupp), op(opLookup, name(".helper"))}, statusNoEnt},
		"removed":                      {[][]byte{op(opPutfh, opaque(root)), op(opRemove, name(".helper"))}, statusNoEnt},
		"the snapshots removed":        {[][]byte{op(opPutfh, opaque(root)), op(opRemove, name(".snapshots"))}, statusNoEnt},
		"renamed":                      {[][]byte{op(opPutfh, opaque(root)), op(opSavefh), op(opPutfh, opaque(d)), op(opRename, name(".helper"), name("taken"))}, statusNoEnt},
		"renamed over":                 {[][]byte{op(opPutfh, opaque(d)), op(opSavefh), op(opPutfh, opaque(root)), op(opRename, name(".helper"), name(".helper"))}, statusBadName},
		"made":                         {[][]byte{op(opPutfh, opaque(root)), op(opCreate, makes...)}, statusBadName},
		"another made":                 {[][]byte{op(opPutfh, opaque(root)), op(opCreate, number(2), name(".other"), number(0), number(0)), get}, statusBadName},
		"linked":                       {[][]byte{op(opPutfh, opaque(root)), op(opLookup, name("of-v")), op(opSavefh), op(opPutfh, opaque(root)), op(opLink, name(".helper"))}, statusBadName},
		"in another directory":         {[][]byte{op(opPutfh, opaque(d)), op(opLookup, name(".helper"))}, statusOK},

		// To the server a name ends with a zero byte, and what is beyond three words of attributes is nothing.
		"looked up with more behind its name": {[][]byte{op(opPutfh, opaque(root)), op(opLookup, name(".helper\x00")), get}, statusNoEnt},
		"removed with more behind its name":   {[][]byte{op(opPutfh, opaque(root)), op(opRemove, name(".helper\x00more"))}, statusNoEnt},
		"made with many attributes":           {[][]byte{op(opPutfh, opaque(root)), op(opCreate, number(2), name(".other"), number(4), make([]byte, 4*4), number(0))}, statusBadName},
		"looked up from above":                {[][]byte{op(opPutfh, opaque(root)), op(opLookupp), op(opLookup, name("v.secret")), op(opLookup, name(".helper"))}, statusNoEnt},
		"looked up from far above":            {[][]byte{op(opPutfh, opaque(d)), op(opLookupp), op(opLookupp), op(opLookup, name("v.secret")), op(opLookup, name("d")), op(opLookupp), op(opLookup, name(".helper"))}, statusNoEnt},
	} {
		if status, _ := w.compound(c.ops...); status != c.want {
			t.Errorf("%s it is answered by %d, not by %d", what, status, c.want)
		}
	}
	for what, attributes := range map[string][]byte{"usual": number(0), "many": append(number(5), make([]byte, 5*4)...)} {
		list := op(opReaddir, make([]byte, 8+sizeVerifier), number(4096), number(8192), attributes)
		for where, ops := range map[string][][]byte{"the volume's root": {op(opPutfh, opaque(root)), list}, "the server's root, from below": {op(opPutfh, opaque(root)), op(opLookupp), list}} {
			status, result := w.compound(ops...)
			if status != statusOK || bytes.Contains(result, []byte(".helper")) || bytes.Contains(result, []byte(dirPrefix)) {
				t.Errorf("with %s attributes %s is listed by %d as %q", what, where, status, result)
			}
		}
	}
	if text, err := os.ReadFile(own); err != nil || string(text) != "text" {
		t.Errorf("what is hidden is %q, %v", text, err)
	}
}

// TestRootStable: what was written as stable, and a directory that was made, are there after a power cut, as the file system is mounted with dirsync.
func TestRootStable(t *testing.T) {
	w := newWorld(t)
	w.must(w.s.Export(w.export("v", "127.0.0.1/32")))
	w.must(w.s.Start())
	for i := range 6 {
		name := fmt.Sprint("made-", i)
		// Into a file that is there: a new one's name would come with its content.
		write := func(stable uint32, data string) []byte {
			return op(opWrite, make([]byte, 16), make([]byte, 8), []byte{0, 0, 0, byte(stable)}, opaque([]byte(data)))
		}
		text := fmt.Sprint("text ", i)
		file := [][]byte{op(opPutrootfh), op(opLookup, opaque([]byte("v.secret"))), op(opLookup, opaque([]byte("of-v")))}
		ops := append(file, write(2, text)) // FILE_SYNC4
		if i%2 == 0 {
			ops = append(file, write(0, text), op(opCommit, make([]byte, 12)))
		}
		if s, _ := w.compound(ops...); s != statusOK {
			t.Fatalf("writing: %d", s)
		}
		if s, _ := w.compound(op(opPutrootfh), op(opLookup, opaque([]byte("v.secret"))), op(opCreate, []byte{0, 0, 0, 2}, opaque([]byte(name)), make([]byte, 8))); s != statusOK {
			t.Fatalf("making a directory: %d", s)
		}
		// What has been written to the device by now, and is not only in the file system's memory.
		after := filepath.Join(w.base, "after")
		run(t, "cp", "--sparse=always", filepath.Join(w.base, "v.img"), after+".img")
		w.must(os.MkdirAll(after, 0o755))
		run(t, "mount", "-o", "loop", after+".img", after)
		if _, err := os.Stat(filepath.Join(after, name)); err != nil {
			t.Errorf("after a power cut: %v", err)
		}
		if got, err := os.ReadFile(filepath.Join(after, "of-v")); err != nil || string(got) != text {
			t.Errorf("after a power cut the file has %q, %v; not %q", got, err, text)
		}
		run(t, "umount", after)
	}
}

// TestRootRefused: what keeps it from starting is said.
func TestRootRefused(t *testing.T) {
	w := newWorld(t)
	w.must(w.s.Close())
	w.open(true) // else it is not at the port
	l, err := net.Listen("tcp", w.s.Listen.String())
	w.must(err)
	if err := w.s.Start(); err == nil || !strings.Contains(err.Error(), "Address already in use") {
		t.Errorf("at a port that is taken: %v", err)
	}
	l.Close()
	// Nor does it go on without being served.
	w.must(w.s.Start())
	w.s.giveUp = 0
	w.s.Rest()
	l, err = net.Listen("tcp", w.s.Listen.String())
	w.must(err)
	w.s.Wake()
	if err := w.s.Serve(t.Context(), nil); err == nil || !strings.Contains(err.Error(), "Address already in use") {
		t.Errorf("at a port that was taken meanwhile: %v", err)
	}
	l.Close()
	t.Setenv("PATH", t.TempDir())
	if _, err := New(w.s.Config); err == nil || !strings.Contains(err.Error(), "install the packages nfs-ganesha and nfs-ganesha-vfs") {
		t.Errorf("without the program: %v", err)
	}
	if _, err := New(Config{Listen: netip.MustParseAddrPort("127.0.0.1:0")}); err == nil || !strings.Contains(err.Error(), "a port") {
		t.Errorf("without a port: %v", err)
	}
}

// TestRootVersion3: where clients are trusted and there is a portmapper, those of version 3 find the server by it.
func TestRootVersion3(t *testing.T) {
	const inside = "GANESHA_TEST_INSIDE"
	if os.Getenv(inside) == "" {
		space, err := netnstest.New("ganesha")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := space.Close(); err != nil {
				t.Error(err)
			}
		})
		// The portmapper's socket is this namespace's own, as its command has a mount namespace as well.
		const script = `mount -t tmpfs tmpfs /run && { rpcbind -f & } && until [ -S /run/rpcbind.sock ]; do sleep 0.05; done; "$0" -test.run '^TestRootVersion3$' -test.v; status=$?; kill $!; exit $status`
		cmd := space.Command(t.Context(), "sh", "-c", script, os.Args[0])
		cmd.Env = append(os.Environ(), inside+"=1")
		if out, err := cmd.CombinedOutput(); err != nil || !bytes.Contains(out, []byte("--- PASS: TestRootVersion3")) {
			t.Errorf("%v\n%s", err, out)
		}
		return
	}
	w := newWorld(t)
	w.must(w.s.Close())
	w.open(true)
	w.must(w.s.Export(w.export("v", "127.0.0.1/32")))
	w.must(w.s.Export(w.export("w", "10.255.255.255/32")))
	w.must(w.s.Start())
	list := func(name string) (string, error) {
		out, err := exec.Command("nfs-ls", fmt.Sprintf("nfs://127.0.0.1/%s.secret?nfsport=%d&version=3&auto-traverse-mounts=0", name, w.s.Listen.Port())).CombinedOutput()
		return string(out), err
	}
	if out, err := list("v"); err != nil || !strings.Contains(out, " 1 of-v\n") {
		t.Errorf("v has %s, %v", out, err)
	}
	if out, err := list("w"); err == nil {
		t.Errorf("a volume that is another client's has %s", out)
	}
	if s, _ := w.handle("v.secret", "of-v"); s != statusOK {
		t.Errorf("by version 4: %d", s)
	}
}
