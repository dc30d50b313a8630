//go:build vm

package nfs

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sync/semaphore"
	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/csi-plugin/filer/lease"
	"github.com/cradlestack/cradlestack/csi-plugin/filer/snapshots"
	"github.com/cradlestack/cradlestack/internal/locked"
	"github.com/cradlestack/cradlestack/internal/mountns"
)

func TestMain(m *testing.M) {
	mountns.Own()
	os.Exit(m.Run())
}

// A world is a directory that is served, with something beside it that nobody may see.
type world struct {
	t      *testing.T
	server *Server
	addr   string
	root   string // of the export
	above  string
	export Export
	image  string // of the file system that root is on
	before func(*Server)
}

func command(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
	return string(out)
}

// mounted makes a file system in a file and mounts it until the test's end.
func mounted(t testing.TB, image, at, fsType string, size int64) {
	t.Helper()
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(image, size); err != nil {
		t.Fatal(err)
	}
	command(t, "mkfs."+fsType, "-q", image)
	attach(t, image, at)
}

func attach(t testing.TB, image, at string) {
	t.Helper()
	if err := os.MkdirAll(at, 0o755); err != nil {
		t.Fatal(err)
	}
	command(t, "mount", "-o", "loop", image, at)
	t.Cleanup(func() { command(t, "umount", "--lazy", at) })
}

// serve serves a directory of an ext4 file system to this host.
func serve(t *testing.T) *world {
	t.Helper()
	if os.Getuid() != 0 {
		t.Fatal("this needs root")
	}
	old := unix.Umask(0)
	t.Cleanup(func() { unix.Umask(old) })
	dir := t.TempDir()
	// An image on xfs can be copied in an instant: what is in the copy has been on the device.
	mounted(t, filepath.Join(dir, "pool.img"), filepath.Join(dir, "pool"), "xfs", 400<<20)
	w := &world{t: t, image: filepath.Join(dir, "pool/volume.img"), above: filepath.Join(dir, "fs")}
	mounted(t, w.image, w.above, "ext4", 64<<20)
	w.root = filepath.Join(dir, "root")
	for _, path := range []string{w.root, filepath.Join(w.above, "volume")} {
		if err := os.Mkdir(path, 0o777); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(w.above, "secret"), []byte("classified"), 0o644); err != nil {
		t.Fatal(err)
	}
	command(t, "mount", "--bind", filepath.Join(w.above, "volume"), w.root)
	t.Cleanup(func() { command(t, "umount", "--lazy", w.root) })
	w.export = Export{Path: "/volume/0123456789", Root: w.root, Volume: "volume", Clients: []netip.Prefix{netip.MustParsePrefix("127.0.0.1/32")}}
	w.start()
	return w
}

// start serves until the test's end, or until what it returns is called.
func (w *world) start() (stop func()) {
	w.t.Helper()
	w.server = New(testKey, slog.New(slog.NewTextHandler(w.t.Output(), nil)))
	if w.before != nil {
		w.before(w.server)
	}
	if err := w.server.Export(w.export); err != nil {
		w.t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		w.t.Fatal(err)
	}
	w.addr = l.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	var g sync.WaitGroup
	server := w.server // a test may start another one
	g.Go(func() {
		if err := server.Serve(ctx, l); err != nil {
			w.t.Error(err)
		}
	})
	stop = sync.OnceFunc(func() {
		cancel()
		g.Wait()
		if err := w.server.Close(); err != nil {
			w.t.Error(err)
		}
	})
	w.t.Cleanup(stop)
	return stop
}

// A client is one user on one connection.
type client struct {
	t    testing.TB
	conn net.Conn
	r    *bufio.Reader
	user *user
	root []byte
}

func (w *world) dial(u *user) *client {
	w.t.Helper()
	conn, err := net.Dial("tcp", w.addr)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { conn.Close() })
	return &client{t: w.t, conn: conn, r: bufio.NewReader(conn), user: u}
}

// client has the export mounted.
func (w *world) client(u *user) *client {
	w.t.Helper()
	c := w.dial(u)
	s, handle := c.mount(w.export.Path)
	if s != ok {
		w.t.Fatalf("mount: %d", s)
	}
	c.root = handle
	return c
}

// numbers of calls.
var numbers atomic.Uint32

var errHungUp = errors.New("the server hangs up")

// try sends a record and returns what is after the reply's head.
func (c *client) try(record []byte) (reply []byte, err error) {
	if _, err := c.conn.Write(seal(append(make([]byte, 4), record...))); err != nil {
		return nil, errHungUp
	}
	n, err := readLength(c.r)
	if err != nil {
		return nil, errHungUp
	}
	reply = make([]byte, n)
	if _, err := io.ReadFull(c.r, reply); err != nil {
		return nil, errHungUp
	}
	return reply[8:], nil
}

// call makes a call that the server accepts.
func (c *client) call(program, proc uint32, args func(e *encoder)) (status, *decoder) {
	c.t.Helper()
	record := newCall(program, 3, proc, c.user, args)
	binary.BigEndian.PutUint32(record, numbers.Add(1))
	reply, err := c.try(record)
	if err != nil {
		c.t.Fatal(err)
	}
	d := &decoder{b: reply}
	if d.uint32() != accepted || d.uint64() != 0 || d.uint32() != acceptSuccess {
		c.t.Fatalf("call %d.%d: not accepted: %x", program, proc, reply)
	}
	return status(d.uint32()), d
}

func (c *client) mount(path string) (status, []byte) {
	c.t.Helper()
	s, d := c.call(programMount, 1, func(e *encoder) { e.opaque([]byte(path)) })
	return s, bytes.Clone(d.opaque(maxHandle))
}

// in makes a call of NFS whose arguments begin with a name in a directory.
func (c *client) in(proc uint32, dir []byte, name string, rest func(e *encoder)) (status, *decoder) {
	c.t.Helper()
	return c.call(programNFS, proc, func(e *encoder) {
		e.opaque(dir)
		e.opaque([]byte(name))
		if rest != nil {
			rest(e)
		}
	})
}

// on makes one whose arguments begin with a handle.
func (c *client) on(proc uint32, handle []byte, rest func(e *encoder)) (status, *decoder) {
	c.t.Helper()
	return c.call(programNFS, proc, func(e *encoder) {
		e.opaque(handle)
		if rest != nil {
			rest(e)
		}
	})
}

// Procedures that tests call by name.
const (
	procSetattr  = 2
	procReadlink = 5
)

const (
	procCreate = 8 + iota
	procMkdir
	procSymlink
	procMknod
	procRemove
	procRmdir
	procRename
	procLink
)

const procFsstat, procCommit = 18, 21

func (c *client) lookup(dir []byte, name string) (status, []byte) {
	c.t.Helper()
	s, d := c.in(procLookup, dir, name, nil)
	return s, bytes.Clone(d.opaque(maxHandle))
}

// attributes is sattr3 with a mode alone, or nothing where it is 0.
func attributes(mode uint32) func(e *encoder) {
	return func(e *encoder) {
		e.bool(mode != 0)
		if mode != 0 {
			e.uint32(mode)
		}
		for range 5 {
			e.uint32(0)
		}
	}
}

func (c *client) create(dir []byte, name string, how uint32, attributes func(e *encoder)) (status, []byte) {
	c.t.Helper()
	s, d := c.in(procCreate, dir, name, func(e *encoder) {
		e.uint32(how)
		attributes(e)
	})
	if s != ok || d.uint32() == 0 {
		return s, nil
	}
	return s, bytes.Clone(d.opaque(maxHandle))
}

func (c *client) write(handle []byte, offset uint64, data string, stable uint32) (s status, verifier uint64) {
	c.t.Helper()
	s, d := c.on(procWrite, handle, func(e *encoder) {
		e.uint64(offset)
		e.uint32(uint32(len(data)))
		e.uint32(stable)
		e.opaque([]byte(data))
	})
	if s != ok {
		return s, 0
	}
	d.uint32()
	if d.uint32() != 0 {
		d.take(fattrSize)
	}
	if n, how := d.uint32(), d.uint32(); n != uint32(len(data)) || how < stable {
		c.t.Errorf("%d bytes are written, as stable as %d; %d were sent as %d", n, how, len(data), stable)
	}
	return s, d.uint64()
}

func (c *client) read(handle []byte, offset uint64, count uint32) (status, string) {
	c.t.Helper()
	s, d := c.on(procRead, handle, func(e *encoder) {
		e.uint64(offset)
		e.uint32(count)
	})
	if s != ok {
		return s, ""
	}
	d.uint32()
	d.take(fattrSize + 8)
	return s, string(d.opaque(maxData))
}

var (
	asRoot = &user{}
	asUser = &user{uid: 1000, gid: 1000, groups: []uint32{2000}}
)

// What is above the export or beside it nobody sees, whatever is tried.
func TestRootConfinement(t *testing.T) {
	w := serve(t)
	c := w.client(asRoot)
	if s, up := c.lookup(c.root, ".."); s != ok || !bytes.Equal(up, c.root) {
		t.Errorf("above the root is %x, %d", up, s)
	}
	for _, name := range []string{"../secret", "/", "", "a/..", "volume/../..", "x\x00"} {
		if s, _ := c.lookup(c.root, name); s != errAcces {
			t.Errorf("lookup of %q: %d", name, s)
		}
		if s, _ := c.create(c.root, name, unchecked, attributes(0o644)); s != errAcces {
			t.Errorf("create of %q: %d", name, s)
		}
	}
	for proc, rest := range map[uint32]func(e *encoder){procMkdir: attributes(0o755), procRemove: nil, procRmdir: nil} {
		for name, want := range map[string]status{"..": errExist, ".": errInval} {
			if s, _ := c.in(proc, c.root, name, rest); s != want {
				t.Errorf("%d of %q: %d", proc, name, s)
			}
		}
	}
	// Links that lead out are texts.
	for name, target := range map[string]string{"out": filepath.Join(w.above, "secret"), "up": "../secret", "dir": w.above} {
		s, _ := c.in(procSymlink, c.root, name, func(e *encoder) {
			attributes(0o777)(e)
			e.opaque([]byte(target))
		})
		if s != ok {
			t.Fatalf("symlink: %d", s)
		}
		s, link := c.lookup(c.root, name)
		if s != ok {
			t.Fatalf("lookup: %d", s)
		}
		if s, _ := c.read(link, 0, 100); s != errInval {
			t.Errorf("reading %s: %d", name, s)
		}
		if s, _ := c.write(link, 0, "x", fileSync); s != errInval {
			t.Errorf("writing to %s: %d", name, s)
		}
		if s, _ := c.lookup(link, "secret"); s != errNotDir {
			t.Errorf("lookup through %s: %d", name, s)
		}
		if s, _ := c.create(c.root, name, unchecked, attributes(0o644)); s != errExist {
			t.Errorf("create of %s: %d", name, s)
		}
		if s, _ := c.on(procSetattr, link, func(e *encoder) {
			for _, v := range []uint32{0, 0, 0, 1, 0, 0, 0, 0, 0} { // its size: 0
				e.uint32(v)
			}
		}); s != errInval {
			t.Errorf("truncating %s: %d", name, s)
		}
		s, d := c.on(procReadlink, link, nil)
		d.take(4 + fattrSize)
		if got := string(d.opaque(4096)); s != ok || got != target {
			t.Errorf("%s leads to %q, %d", name, got, s)
		}
	}
	// What the host has moved out: its own handle still opens it, and the way up ends there.
	if s, _ := c.in(procMkdir, c.root, "inner", attributes(0o755)); s != ok {
		t.Fatalf("mkdir: %d", s)
	}
	_, inner := c.lookup(c.root, "inner")
	if err := os.Rename(filepath.Join(w.above, "volume/inner"), filepath.Join(w.above, "moved")); err != nil {
		t.Fatal(err)
	}
	if s, up := c.lookup(inner, ".."); s == ok {
		t.Errorf("above what was moved out is %x", up)
	}
	// Device nodes can't be made, and those that the host has don't open.
	for kind, want := range map[uint32]status{3: errPerm, 4: errPerm, 6: ok, 7: ok} {
		s, _ := c.in(procMknod, c.root, fmt.Sprint("node", kind), func(e *encoder) {
			e.uint32(kind)
			attributes(0o666)(e)
			if kind < 5 {
				e.uint64(1<<32 | 3)
			}
		})
		if s != want {
			t.Errorf("mknod of type %d: %d", kind, s)
		}
	}
	command(t, "mknod", filepath.Join(w.root, "null"), "c", "1", "3")
	for _, name := range []string{"null", "node6", "node7"} {
		_, node := c.lookup(c.root, name)
		if s, _ := c.read(node, 0, 10); s == ok || s == errStale {
			t.Errorf("reading %s: %d", name, s)
		}
	}
	if data, err := os.ReadFile(filepath.Join(w.above, "secret")); err != nil || string(data) != "classified" {
		t.Errorf("the file beside the volume has %q, %v", data, err)
	}
}

// Handles that were not made for this export open nothing, and those that were stay valid in the next process.
func TestRootHandles(t *testing.T) {
	w := serve(t)
	c := w.client(asRoot)
	_, file := c.create(c.root, "file", guarded, attributes(0o644))
	if s, _ := c.write(file, 0, "kept", fileSync); s != ok {
		t.Fatalf("write: %d", s)
	}
	// The file beside the volume, as the kernel calls it, in a handle like ours.
	secret, _, err := unix.NameToHandleAt(unix.AT_FDCWD, filepath.Join(w.above, "secret"), 0)
	if err != nil {
		t.Fatal(err)
	}
	guessed := newSealer(make([]byte, KeySize), w.export.Path)
	copy(guessed.tag[:], file[tagAt:])
	forged, _ := guessed.seal(reference{kind: secret.Type(), kernel: secret.Bytes()})
	for name, handle := range map[string][]byte{"a forged handle": forged, "none": {}, "the kernel's": secret.Bytes(), "one that is cut": file[:len(file)-1], "one of zeros": make([]byte, 64)} {
		if s, text := c.read(handle, 0, 100); s != errBadHandle && s != errStale {
			t.Errorf("%s: %d, %q", name, s, text)
		}
	}
	other := w.export
	other.Path, other.Volume = "/volume/other", "other"
	other.Root = t.TempDir()
	if err := w.server.Export(other); err != nil {
		t.Fatal(err)
	}
	s, root := c.mount(other.Path)
	if s != ok {
		t.Fatalf("mount: %d", s)
	}
	if s, _ := c.call(programNFS, procRename, func(e *encoder) {
		e.opaque(c.root)
		e.opaque([]byte("file"))
		e.opaque(root)
		e.opaque([]byte("file"))
	}); s != errXDev {
		t.Errorf("rename into another volume: %d", s)
	}
	if s, _ := c.on(procLink, file, func(e *encoder) {
		e.opaque(root)
		e.opaque([]byte("file"))
	}); s != errXDev {
		t.Errorf("link into another volume: %d", s)
	}

	unstably, verifier := c.write(file, 0, "more", unstable)
	w.start()
	c = w.client(asRoot)
	if s, text := c.read(file, 0, 100); s != ok || text != "more" {
		t.Errorf("in the next process the handle opens %q, %d", text, s)
	}
	if s, d := c.on(procCommit, file, func(e *encoder) { e.uint64(0); e.uint32(0) }); s != ok || unstably != ok {
		t.Errorf("write, commit: %d, %d", unstably, s)
	} else if d.take(8 + fattrSize); d.uint64() == verifier {
		t.Error("the next process has the same verifier: a client would not send again what was not committed")
	}
	if err := os.Remove(filepath.Join(w.root, "file")); err != nil {
		t.Fatal(err)
	}
	if s, _ := c.read(file, 0, 100); s != errStale {
		t.Errorf("of what is gone: %d", s)
	}
}

// Only who knows the path, comes from an address on the list, and says who he is, has the volume; and only until it ends.
func TestRootExports(t *testing.T) {
	w := serve(t)
	c := w.client(asRoot)
	for _, path := range []string{"", "/", "/volume", "/volume/", "/volume/0123456780", w.export.Path + "/", w.export.Path + "/..", strings.Repeat("x", MaxPath)} {
		if s, _ := c.mount(path); s != errAcces {
			t.Errorf("mount of %q: %d", path, s)
		}
	}
	if s, d := c.call(programMount, 5, nil); s != 0 || len(d.b) != 0 {
		t.Errorf("the list of exports: %d, %x", s, d.b)
	}
	for name, record := range map[string][]byte{
		"nobody":          newCall(programNFS, 3, procGetattr, nil, func(e *encoder) { e.opaque(c.root) }),
		"NFS 4":           newCall(programNFS, 4, 1, asRoot, nil),
		"another program": newCall(100021, 4, 1, asRoot, nil),
		"no procedure":    newCall(programNFS, 3, 22, asRoot, nil),
		"no arguments":    newCall(programNFS, 3, procGetattr, asRoot, nil),
	} {
		want := map[string]string{
			"nobody": "\x00\x00\x00\x01\x00\x00\x00\x01\x00\x00\x00\x05", "NFS 4": "\x00\x00\x00\x02\x00\x00\x00\x03\x00\x00\x00\x03", "another program": "\x00\x00\x00\x01",
			"no procedure": "\x00\x00\x00\x03", "no arguments": "\x00\x00\x00\x04",
		}[name]
		if reply, err := c.try(record); err != nil || !bytes.HasSuffix(reply, []byte(want)) {
			t.Errorf("%s: %x, %v", name, reply, err)
		}
	}
	// Data without a handle are passed over; what is large and no data ends the connection.
	stranger := w.dial(asRoot)
	for range 2 {
		if s, _ := stranger.on(procWrite, make([]byte, 44), func(e *encoder) { e.opaque(make([]byte, maxData)) }); s != errStale {
			t.Errorf("a stranger's data: %d", s)
		}
	}
	if _, err := stranger.try(newCall(programNFS, 3, procLookup, asRoot, func(e *encoder) {
		e.opaque(c.root)
		e.opaque(make([]byte, smallCall))
	})); !errors.Is(err, errHungUp) {
		t.Errorf("a name of %d bytes: %v", smallCall, err)
	}

	change := func(f func(e *Export)) {
		t.Helper()
		f(&w.export)
		if err := w.server.Export(w.export); err != nil {
			t.Fatal(err)
		}
	}
	_, file := c.create(c.root, "file", unchecked, attributes(0o666))
	change(func(e *Export) { e.ReadOnly = true })
	if s, _ := c.read(file, 0, 10); s != ok {
		t.Errorf("read of a read-only export: %d", s)
	}
	times := func(e *encoder) { attributes(0o600)(e); e.uint32(0) }
	linked := func(e *encoder) { attributes(0)(e); e.opaque([]byte("x")) }
	moved := func(e *encoder) { e.opaque(c.root); e.opaque([]byte("file2")) }
	node := func(e *encoder) { e.uint32(7); attributes(0)(e) }
	created := func(e *encoder) { e.uint32(guarded); attributes(0)(e) }
	for proc, rest := range map[uint32]func(e *encoder){
		procCreate: created, procMkdir: attributes(0), procSymlink: linked, procMknod: node, procRemove: nil, procRmdir: nil, procRename: moved,
	} {
		if s, _ := c.in(proc, c.root, "file", rest); s != errROFS {
			t.Errorf("procedure %d in a read-only export: %d", proc, s)
		}
	}
	for proc, rest := range map[uint32]func(e *encoder){procSetattr: times, procLink: moved} {
		if s, _ := c.on(proc, file, rest); s != errROFS {
			t.Errorf("procedure %d in a read-only export: %d", proc, s)
		}
	}
	if s, _ := c.write(file, 0, "x", unstable); s != errROFS {
		t.Errorf("write in a read-only export: %d", s)
	}
	if s, d := c.on(procAccess, file, func(e *encoder) { e.uint32(0x3f) }); s != ok {
		t.Errorf("access: %d", s)
	} else if d.take(4 + fattrSize); d.uint32() != accessRead {
		t.Error("a read-only export grants writing")
	}

	change(func(e *Export) { e.Clients = []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")} })
	if s, _ := c.read(file, 0, 10); s != errStale {
		t.Errorf("read from another address: %d", s)
	}
	if s, _ := c.mount(w.export.Path); s != errAcces {
		t.Errorf("mount from another address: %d", s)
	}
	change(func(e *Export) { e.Clients = []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")} })
	if s, _ := c.read(file, 0, 10); s != ok {
		t.Errorf("read from an address that is back: %d", s)
	}
	for range 2 {
		if err := w.server.Unexport(w.export.Path); err != nil {
			t.Error(err)
		}
	}
	if s, _ := c.read(file, 0, 10); s != errStale {
		t.Errorf("read of what is not exported any more: %d", s)
	}
	for _, n := range []int{10, maxData} {
		if s, _ := c.write(file, 0, strings.Repeat("x", n), unstable); s != errStale {
			t.Errorf("write of %d bytes to what is not exported any more: %d", n, s)
		}
	}
}

// Creating what is there keeps it.
func TestRootCreate(t *testing.T) {
	w := serve(t)
	c := w.client(asUser)
	s, file := c.create(c.root, "file", exclusive, func(e *encoder) { e.uint64(0xdeadbeef_cafebabe) })
	if s != ok {
		t.Fatalf("exclusive: %d", s)
	}
	if s, again := c.create(c.root, "file", exclusive, func(e *encoder) { e.uint64(0xdeadbeef_cafebabe) }); s != ok || !bytes.Equal(again, file) {
		t.Errorf("the same call again: %d", s)
	}
	if s, _ := c.create(c.root, "file", exclusive, func(e *encoder) { e.uint64(0xdeadbeef_cafebabf) }); s != errExist {
		t.Errorf("another client's: %d", s)
	}
	if s, _ := c.write(file, 0, "content", fileSync); s != ok {
		t.Fatalf("write: %d", s)
	}
	for how, want := range map[uint32]status{unchecked: ok, guarded: errExist} {
		if s, _ := c.create(c.root, "file", how, attributes(0o644)); s != want {
			t.Errorf("create %d: %d", how, s)
		}
	}
	if s, text := c.read(file, 0, 100); s != ok || text != "content" {
		t.Errorf("after it was created again the file has %q, %d", text, s)
	}
	if s, _ := c.create(c.root, "file", unchecked, func(e *encoder) {
		for _, v := range []uint32{0, 0, 0, 1, 0, 0, 0, 0} {
			e.uint32(v)
		}
	}); s != ok {
		t.Errorf("create with size 0: %d", s)
	}
	if s, text := c.read(file, 0, 100); s != ok || text != "" {
		t.Errorf("truncated, the file has %q, %d", text, s)
	}
}

// Files belong to who made them, and the kernel's rules hold for whoever calls.
func TestRootUsers(t *testing.T) {
	w := serve(t)
	root, c, other := w.client(asRoot), w.client(asUser), w.client(&user{uid: 1001, gid: 1001, groups: []uint32{2000}})
	_, file := c.create(c.root, "file", guarded, attributes(0o4640))
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(w.root, "file"), &st); err != nil || st.Uid != 1000 || st.Gid != 1000 || st.Mode&0o7777 != 0o4640 {
		t.Errorf("the file belongs to %d:%d, mode %o, %v", st.Uid, st.Gid, st.Mode, err)
	}
	if s, _ := other.read(file, 0, 10); s != errAcces {
		t.Errorf("another user reads: %d", s)
	}
	set := func(c *client, want status, values ...uint32) {
		t.Helper()
		if s, _ := c.on(procSetattr, file, func(e *encoder) {
			for _, v := range values {
				e.uint32(v)
			}
		}); s != want {
			t.Errorf("setattr of %v: %d, not %d", values, s, want)
		}
	}
	set(other, errPerm, 1, 0o777, 0, 0, 0, 0, 0, 0)
	set(c, errPerm, 0, 1, 1001, 0, 0, 0, 0, 0) // nobody gives files away
	set(c, ok, 0, 0, 1, 1000, 0, 0, 0, 0)      // but to a group of his
	set(root, ok, 0, 0, 1, 2000, 0, 0, 0, 0)   // root does as it likes
	set(root, ok, 1, 0o4660, 0, 0, 0, 0, 0, 0) // which has cut that bit off
	if s, _ := other.write(file, 0, "x", unstable); s != ok {
		t.Errorf("a member of the group writes: %d", s)
	}
	if err := unix.Stat(filepath.Join(w.root, "file"), &st); err != nil || st.Mode&0o7777 != 0o660 {
		t.Errorf("after another's write the mode is %o, %v", st.Mode, err)
	}
	set(c, ok, 1, 0o000, 0, 0, 0, 0, 0, 0)
	if s, _ := c.read(file, 0, 10); s != ok {
		t.Errorf("the owner reads what he has open: %d", s)
	}
	if s, d := c.on(procAccess, file, func(e *encoder) { e.uint32(0x3f) }); s != ok {
		t.Errorf("access: %d", s)
	} else if d.take(4 + fattrSize); d.uint32() != 0 {
		t.Error("what nobody may, its owner is told to")
	}
	if s, _ := c.in(procMkdir, c.root, "private", attributes(0o700)); s != ok {
		t.Fatalf("mkdir: %d", s)
	}
	_, dir := c.lookup(c.root, "private")
	if s, _ := other.lookup(dir, "x"); s != errAcces {
		t.Errorf("another user looks into a private directory: %d", s)
	}
	if s, _ := other.create(dir, "x", guarded, attributes(0o644)); s != errAcces {
		t.Errorf("another user creates there: %d", s)
	}
	if s, _ := root.create(dir, "x", guarded, attributes(0o644)); s != ok {
		t.Errorf("root creates there: %d", s)
	}
	if s, _ := other.in(procRmdir, c.root, "private", nil); s != errNotEmpty {
		t.Errorf("rmdir of what is not empty: %d", s)
	}
}

// Errors of a full disk reach the client, and what was acknowledged before is there.
func TestRootFull(t *testing.T) {
	w := serve(t)
	c := w.client(asUser)
	_, file := c.create(c.root, "file", guarded, attributes(0o644))
	data := strings.Repeat("x", maxData)
	full := false
	for i := range uint64(100) {
		s, _ := c.write(file, i*maxData, data, fileSync)
		if full = s == errNoSpc; s != ok {
			break
		}
	}
	if !full {
		t.Error("100 MiB fit on a disk of 64")
	}
	if s, text := c.read(file, 0, maxData); s != ok || text != data {
		t.Errorf("the first MiB: %d, %d bytes", s, len(text))
	}
	if s, _ := c.write(file, 1<<50, "x", unstable); s != errFBig {
		t.Errorf("a file of 2^50 bytes: %d", s)
	}
	if s, _ := c.write(file, 1<<63-1, "x", unstable); s != errFBig {
		t.Errorf("a file of 2^63 bytes: %d", s)
	}
}

// What is acknowledged as stable is on the device, as a copy of the device shows that is made right then: it is what would be there after a power cut.
func TestRootStable(t *testing.T) {
	w := serve(t)
	c := w.client(asUser)
	ends := func(c *client) func(s status, _ *decoder) {
		return func(s status, _ *decoder) {
			c.t.Helper()
			if s != ok {
				c.t.Fatalf("call: %d", s)
			}
		}
	}
	done := ends(c)
	var file []byte
	for i, step := range []struct {
		do  func()
		has string // that a shell finds after a power cut
	}{
		{func() { _, file = c.create(c.root, "file", guarded, attributes(0o640)) }, `test "$(stat -c %a:%u:%s file)" = 640:1000:0`},
		{func() { c.write(file, 0, "first", fileSync) }, `test "$(cat file)" = first`},
		{func() { c.write(file, 5, " second", dataSync) }, `test "$(cat file)" = "first second"`},
		{func() {
			c.write(file, 12, " third", unstable)
			done(c.on(procCommit, file, func(e *encoder) { e.uint64(0); e.uint32(0) }))
		}, `test "$(cat file)" = "first second third"`},
		{func() { done(c.on(procSetattr, file, func(e *encoder) { attributes(0o600)(e); e.uint32(0) })) }, `test "$(stat -c %a file)" = 600`},
		{func() { done(c.in(procMkdir, c.root, "dir", attributes(0o711))) }, `test "$(stat -c %a dir)" = 711`},
		{func() {
			done(c.in(procRename, c.root, "file", func(e *encoder) {
				_, dir := c.lookup(c.root, "dir")
				e.opaque(dir)
				e.opaque([]byte("moved"))
			}))
		}, `test ! -e file && test "$(cat dir/moved)" = "first second third"`},
		{func() { done(c.on(procLink, file, func(e *encoder) { e.opaque(c.root); e.opaque([]byte("hard")) })) }, `test "$(stat -c %h hard)" = 2`},
		{func() {
			done(c.in(procSymlink, c.root, "link", func(e *encoder) { attributes(0)(e); e.opaque([]byte("hard")) }))
		}, `test "$(readlink link)" = hard`},
		{func() {
			done(c.in(procMknod, c.root, "fifo", func(e *encoder) { e.uint32(7); attributes(0o622)(e) }))
		}, `test -p fifo && test "$(stat -c %a fifo)" = 622`},
		{func() { done(c.in(procRemove, c.root, "hard", nil)) }, `test ! -e hard && test -e dir/moved`},
		{func() {
			c.create(c.root, "once", exclusive, func(e *encoder) { e.uint64(1) })
		}, `test -e once`},
		{func() {
			c.create(c.root, "sized", unchecked, func(e *encoder) {
				for _, v := range []uint32{1, 0o644, 0, 0, 1, 0, 5000, 0, 0} {
					e.uint32(v)
				}
			})
		}, `test "$(stat -c %s sized)" = 5000`},
	} {
		step.do()
		// A reflink of the image is made in one step, and has what the device was given, not what the file system on it has in memory.
		copied := fmt.Sprintf("%s.%d", w.image, i)
		command(t, "cp", "--reflink=always", w.image, copied)
		at := filepath.Join(t.TempDir(), "copy")
		attach(t, copied, at)
		if out, err := exec.Command("sh", "-c", `cd "$0/volume" && `+step.has, at).CombinedOutput(); err != nil {
			t.Errorf("step %d: after a power cut it is not true that %s\n%s%s", i, step.has, out, command(t, "ls", "-laR", at))
		}
	}
}

// Somebody who opens connections without end, and leaves calls unfinished on them, takes them from nobody else, and little memory: neither from those who have shown a file
// handle, nor from those who come, be it from the same address.
func TestRootCrowd(t *testing.T) {
	w := serve(t)
	w.export.Clients = []netip.Prefix{netip.MustParsePrefix("127.0.0.1/31"), netip.MustParsePrefix("127.0.0.2/32")}
	if err := w.server.Export(w.export); err != nil {
		t.Fatal(err)
	}
	mounted := w.dial(asRoot)
	s, root := mounted.mount(w.export.Path)
	if s != ok {
		t.Fatalf("mount: %d", s)
	}
	rests := w.dial(asRoot) // over which a client that has been here before goes on
	if s, _ := rests.on(procGetattr, root, nil); s != ok {
		t.Fatalf("a call over another connection: %d", s)
	}
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	unfinished := []byte("\x80\x00\x10\x00 and no more")
	for range maxConnectionsOfOne + 100 {
		_, _ = w.dial(asRoot).conn.Write(unfinished) // of those that are too many, some fail
	}
	for who, c := range map[string]*client{"who has mounted": mounted, "who has shown a handle": rests, "who comes": w.dial(asRoot)} {
		if s, _ := c.on(procGetattr, root, nil); s != ok {
			t.Errorf("%s: %d", who, s)
		}
	}
	runtime.ReadMemStats(&after)
	if took := after.HeapInuse + after.StackInuse - before.HeapInuse - before.StackInuse; after.HeapInuse > before.HeapInuse && took > maxConnectionsOfOne*64<<10 {
		t.Errorf("they take %d bytes", took) // those of this side among them
	}
	conn, err := (&net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 2)}}).Dial("tcp", w.addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	other := &client{t: t, conn: conn, r: bufio.NewReader(conn), user: asRoot}
	if s, root = other.mount(w.export.Path); s != ok {
		t.Fatalf("mount from another address: %d", s)
	}
	if s, _ := other.on(procGetattr, root, nil); s != ok {
		t.Errorf("a call from another address: %d", s)
	}
}

// Clients that do not take their replies, or stop in the middle of large calls, keep nobody else waiting, by however many exports they have: neither those who read and
// write, nor those who only look.
func TestRootGreedy(t *testing.T) {
	for _, how := range []string{"read", "write"} {
		t.Run(how, func(t *testing.T) {
			w := serve(t)
			var log locked.Buffer
			w.server.log = slog.New(slog.NewTextHandler(&log, nil))
			c := w.client(asRoot)
			_, file := c.create(c.root, "file", guarded, attributes(0o600))
			if err := os.Truncate(filepath.Join(w.root, "file"), maxData); err != nil {
				t.Fatal(err)
			}
			said := func() bool { return strings.Contains(log.String(), "have lost their connections") }
			for i := range maxReplies/maxRepliesInOne + 1 {
				x := w.export
				x.Path = fmt.Sprintf("/volume/greedy%04d", i)
				if err := w.server.Export(x); err != nil {
					t.Fatal(err)
				}
			}
			for round := 0; round < 3 && !said(); round++ { // a slow machine may be too late to have it all at once
				for i := range maxReplies/maxRepliesInOne + 1 {
					greedy := w.dial(asRoot)
					s, root := greedy.mount(fmt.Sprintf("/volume/greedy%04d", i))
					if s != ok {
						t.Fatalf("mount: %d", s)
					}
					_, own := greedy.lookup(root, "file")
					read := newCall(programNFS, 3, procRead, asRoot, func(e *encoder) { e.opaque(own); e.uint64(0); e.uint32(maxData) })
					write := newCall(programNFS, 3, procWrite, asRoot, func(e *encoder) {
						e.opaque(own)
						e.uint64(0)
						e.uint32(maxData)
						e.uint32(unstable)
						e.opaque(make([]byte, maxData))
					})
					read, write = seal(append(make([]byte, 4), read...)), seal(append(make([]byte, 4), write...))[:2*smallCall]
					for range maxRepliesInOne/maxRecord + 8 {
						if how == "read" {
							_, _ = greedy.conn.Write(read) // which may have lost it already
						} else {
							_, _ = w.dial(asRoot).conn.Write(write)
						}
					}
				}
				if s, _ := c.on(procGetattr, c.root, nil); s != ok {
					t.Errorf("getattr: %d", s)
				}
				if s, _ := c.write(file, 0, strings.Repeat("x", maxData), unstable); s != ok {
					t.Errorf("write: %d", s)
				}
				if s, _ := c.read(file, 0, maxData); s != ok {
					t.Errorf("read: %d", s)
				}
			}
			if !said() {
				t.Error("they are waited for")
			}
		})
	}
}

// Volumes whose storage answers nothing keep waiting who uses them, and nobody else: neither the clients of other volumes, nor the same clients, which have all their mounts
// in one connection.
func TestRootStuck(t *testing.T) {
	w := serve(t)
	c := w.client(asRoot)
	answers := make(chan struct{})
	answer := sync.OnceFunc(func() { close(answers) })
	t.Cleanup(answer) // before the server's end, which waits for them
	lookup := func(root []byte) []byte {
		return newCall(programNFS, 3, procLookup, asRoot, func(e *encoder) { e.opaque(root); e.opaque([]byte(snapshots.Dir)) })
	}
	const volumes = maxWorking/maxWorkingInOne + 1
	var roots [volumes][]byte
	for i := range roots {
		dir := filepath.Join(w.above, fmt.Sprint("stuck", i))
		if err := os.Mkdir(dir, 0o777); err != nil {
			t.Fatal(err)
		}
		x := w.export
		x.Path, x.Volume, x.Root = fmt.Sprintf("/stuck%d/0123456789", i), fmt.Sprint("stuck", i), dir
		x.Snapshots = &snapshots.Source{List: func() ([]snapshots.Snapshot, error) { <-answers; return nil, nil }}
		if err := w.server.Export(x); err != nil {
			t.Fatal(err)
		}
		var s status
		if s, roots[i] = c.mount(x.Path); s != ok {
			t.Fatalf("mount: %d", s)
		}
	}
	send := func(c *client, root []byte) {
		if _, err := c.conn.Write(seal(append(make([]byte, 4), lookup(root)...))); err != nil {
			t.Error(err)
		}
	}
	goesOn := func(who string, c *client, root []byte) {
		t.Helper()
		c.conn.SetDeadline(time.Now().Add(time.Minute))
		defer c.conn.SetDeadline(time.Time{})
		if s, _ := c.on(procGetattr, root, nil); s != ok {
			t.Errorf("%s: %d", who, s)
		}
	}
	for _, root := range roots { // more than are done in each, and altogether; and more than are done of this connection
		for range maxWorkingInOne {
			send(c, root)
		}
	}
	goesOn("another client", w.client(asRoot), c.root)
	goesOn("the same client", c, c.root)
	// As many as there are of that volume are being done: who comes later is to ask again later.
	for end := time.Now().Add(time.Minute); ; time.Sleep(100 * time.Millisecond) {
		if w.server.stuck.Load() == volumes*maxWorkingInOne {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("%d calls are known to be stuck, of %d", w.server.stuck.Load(), volumes*maxWorkingInOne)
		}
	}
	other := w.dial(asRoot)
	if reply, err := other.try(lookup(roots[0])); err != nil || !bytes.HasSuffix(reply, []byte{0, 0, byte(errJukebox >> 8), byte(errJukebox & 0xff), 0, 0, 0, 0}) {
		t.Errorf("one more is answered %x, %v", reply, err)
	}
	changed := w.export
	changed.Path, changed.Volume, changed.Root = "/stuck1/0123456789", "stuck1", filepath.Join(w.above, "stuck1")
	if err := w.server.Export(changed); !errors.Is(err, ErrStuck) {
		t.Errorf("one that is changed and can't end before says %v", err)
	}
	for range 30 { // who asks again is not told that it has ended, and does not wait as long each time: others wait for him
		if err := w.server.Unexport("/stuck0/0123456789"); !errors.Is(err, ErrStuck) {
			t.Errorf("the end of an export that can't end says %v", err)
		}
	}
	answer()
	for range volumes * maxWorkingInOne {
		n, err := readLength(c.r)
		if err == nil {
			_, err = c.r.Discard(n)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	goesOn("the same client, when all is well again", c, roots[1])
	if n := w.server.stuck.Load(); n != 0 {
		t.Errorf("%d calls are stuck still", n)
	}
	for i := range 2 {
		if err := w.server.Unexport(fmt.Sprintf("/stuck%d/0123456789", i)); err != nil {
			t.Errorf("the end of one whose calls have ended: %v", err)
		}
	}
	if n := len(w.server.leaving); n != 0 {
		t.Errorf("%d exports have not ended", n)
	}
}

// What calls have of all clients' memory is others' again once the storage has kept them for long: those of other volumes would wait for it without an end.
func TestRootStuckMemory(t *testing.T) {
	w := serve(t)
	const few = 3
	w.server.limits = newLimits(maxWorking, few*maxRecord+smallCall, few*maxRecord+smallReply)
	answers := make(chan struct{})
	answer := sync.OnceFunc(func() { close(answers) })
	t.Cleanup(answer) // before the server's end, which waits for them
	x := w.export
	x.Path, x.Volume = "/stuck/0123456789", "stuck"
	x.Snapshots = &snapshots.Source{List: func() ([]snapshots.Snapshot, error) { <-answers; return nil, nil }}
	if err := w.server.Export(x); err != nil {
		t.Fatal(err)
	}
	handle, _ := w.server.paths[x.Path].seal(reference{snapshot: snapshotID{1}, kind: 1, kernel: make([]byte, 8)})
	for what, call := range map[string][]byte{
		"calls": newCall(programNFS, 3, procWrite, asRoot, func(e *encoder) {
			e.opaque(handle)
			e.uint64(0)
			e.uint32(maxData)
			e.uint32(unstable)
			e.opaque(make([]byte, maxData))
		}),
		"replies": newCall(programNFS, 3, procRead, asRoot, func(e *encoder) { e.opaque(handle); e.uint64(0); e.uint32(maxData) }),
	} {
		for range few {
			if _, err := w.dial(asRoot).conn.Write(seal(append(make([]byte, 4), call...))); err != nil {
				t.Fatal(err)
			}
		}
		of := map[string]*semaphore.Weighted{"calls": w.server.calling, "replies": w.server.replies}[what]
		for end := time.Now().Add(time.Minute); of.TryAcquire(maxRecord); time.Sleep(time.Millisecond) {
			if of.Release(maxRecord); time.Now().After(end) {
				t.Fatalf("there is memory for %s", what)
			}
		}
	}
	c := w.client(asRoot)
	c.conn.SetDeadline(time.Now().Add(time.Minute))
	_, file := c.create(c.root, "file", guarded, attributes(0o600))
	if s, _ := c.write(file, 0, strings.Repeat("x", maxData), unstable); s != ok {
		t.Errorf("write: %d", s)
	}
	if s, _ := c.read(file, 0, maxData); s != ok {
		t.Errorf("read: %d", s)
	}
	answer()
	for end := time.Now().Add(time.Minute); w.server.lent.Load() != 0; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%d bytes are lent, when all have ended", w.server.lent.Load())
		}
	}
	if !w.server.calling.TryAcquire(few*maxRecord) || !w.server.replies.TryAcquire(few*maxRecord) {
		t.Error("some of the memory is lost")
	}
}

// Calls of one export that wait for each other have so much of all clients' memory and no more, however small each is: others are to be made again later.
func TestRootSmallCalls(t *testing.T) {
	w := serve(t)
	answers := make(chan struct{})
	answer := sync.OnceFunc(func() { close(answers) })
	t.Cleanup(answer) // before the server's end, which waits for them
	w.export.Snapshots = &snapshots.Source{List: func() ([]snapshots.Snapshot, error) { <-answers; return nil, nil }}
	if err := w.server.Export(w.export); err != nil {
		t.Fatal(err)
	}
	first := w.dial(asRoot)
	s, root := first.mount(w.export.Path)
	if s != ok {
		t.Fatalf("mount: %d", s)
	}
	call := append(newCall(programNFS, 3, procLookup, asRoot, func(e *encoder) { e.opaque(root); e.opaque([]byte(snapshots.Dir)) }), make([]byte, smallCall)...)[:smallCall]
	call = seal(append(make([]byte, 4), call...))
	replies := make(chan status, 1)
	for range maxSmallInOne/smallCall/maxCalls + 2 {
		c := w.dial(asRoot)
		for range maxCalls {
			if _, err := c.conn.Write(call); err != nil {
				t.Fatal(err)
			}
		}
		go func() {
			if n, err := readLength(c.r); err == nil && n == 32 {
				reply := make([]byte, n)
				_, _ = io.ReadFull(c.r, reply)
				select {
				case replies <- status(binary.BigEndian.Uint32(reply[24:])):
				default:
				}
			}
		}()
	}
	select {
	case s := <-replies:
		if s != errJukebox {
			t.Errorf("one too many is answered %v", s)
		}
	case <-time.After(time.Minute):
		t.Error("all wait for each other, and with them the memory that they have")
	}
	answer()
	for end := time.Now().Add(time.Minute); w.server.paths[w.export.Path].small.Load() != 0; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("some of the calls have no end")
		}
	}
	if s, _ := first.on(procGetattr, root, nil); s != ok {
		t.Errorf("afterwards: %v", s)
	}
}

// A call that is done where calls are read, as it is to take no time, and takes some, keeps no other call of its connection.
func TestRootLate(t *testing.T) {
	w := serve(t)
	answers, begun := make(chan struct{}), make(chan struct{}, 1)
	answer := sync.OnceFunc(func() { close(answers) })
	w.server.Done = func(procedure, _ string, _, _ int) {
		if procedure == "GETATTR" {
			select {
			case begun <- struct{}{}:
				<-answers
			default:
			}
		}
	}
	c := w.client(asRoot)
	t.Cleanup(answer)
	for i := range 3 { // the first of them is kept at its end
		c.conn.SetDeadline(time.Now().Add(time.Minute))
		if s, _ := c.on(procGetattr, c.root, nil); s != ok {
			t.Fatalf("call %d: %d", i, s)
		}
	}
	answer()
	if s, _ := c.on(procGetattr, c.root, nil); s != ok {
		t.Errorf("after all: %d", s)
	}
}

// A directory of many files is listed whole, each name once, whatever is removed meanwhile.
func TestRootList(t *testing.T) {
	w := serve(t)
	const files = 3000
	for i := range files {
		if err := os.WriteFile(filepath.Join(w.root, fmt.Sprintf("file-with-a-name-%04d", i)), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	c := w.client(asRoot)
	for _, plus := range []bool{false, true} {
		seen := map[string]int{}
		var cookie uint64
		for eof := false; !eof; {
			proc := uint32(procReaddir)
			if plus {
				proc = procReaddirplus
			}
			s, d := c.on(proc, c.root, func(e *encoder) {
				e.uint64(cookie)
				e.uint64(0)
				if plus {
					e.uint32(2048)
				}
				e.uint32(8192)
			})
			if s != ok || len(d.b) > 8192 {
				t.Fatalf("list: %d, %d bytes", s, len(d.b))
			}
			d.take(4 + fattrSize + 8)
			for d.uint32() == 1 {
				ino := d.uint64()
				name := string(d.opaque(255))
				cookie = d.uint64()
				seen[name]++
				if !plus {
					continue
				}
				if d.uint32() != 1 || binary.BigEndian.Uint64(d.take(fattrSize)[fattrSize-32:]) != ino || d.uint32() != 1 {
					t.Fatalf("%s has no attributes, no handle, or others'", name)
				}
				if s, _ := c.on(procGetattr, bytes.Clone(d.opaque(maxHandle)), nil); s != ok {
					t.Fatalf("the handle of %s: %d", name, s)
				}
			}
			eof = d.uint32() == 1
			if d.bad {
				t.Fatal("the list can't be read")
			}
		}
		if len(seen) != files+2 || seen["."] != 1 || seen[".."] != 1 || seen["file-with-a-name-2999"] != 1 {
			t.Errorf("%d names are listed", len(seen))
		}
	}
	if s, _ := c.on(procReaddir, c.root, func(e *encoder) { e.uint64(0); e.uint64(0); e.uint32(100) }); s != errTooSmall {
		t.Errorf("a list of 100 bytes: %d", s)
	}
}

// A call that comes again is not done again, and has the same reply, also from the next process; any other call is.
func TestRootRepeated(t *testing.T) {
	w := serve(t)
	c, other := w.client(asRoot), w.client(asRoot)
	record := func(number uint32, proc uint32, name string, rest func(e *encoder)) []byte {
		r := newCall(programNFS, 3, proc, asRoot, func(e *encoder) {
			e.opaque(c.root)
			e.opaque([]byte(name))
			if rest != nil {
				rest(e)
			}
		})
		binary.BigEndian.PutUint32(r, 1<<31+number)
		return r
	}
	reply := func(c *client, record []byte) []byte {
		t.Helper()
		got, err := c.try(record)
		if err != nil {
			t.Fatal(err)
		}
		return got
	}
	statusOf := func(reply []byte) status { return status(binary.BigEndian.Uint32(reply[16:])) }
	calls := [][]byte{
		record(1, procMkdir, "d", attributes(0o755)), record(2, procCreate, "f", func(e *encoder) { e.uint32(guarded); attributes(0o644)(e) }),
		record(3, procRename, "f", func(e *encoder) { e.opaque(c.root); e.opaque([]byte("g")) }), record(4, procRemove, "g", nil), record(5, procRmdir, "d", nil),
	}
	var replies [][]byte
	for i, call := range calls {
		first := reply(c, call)
		if s := statusOf(first); s != ok {
			t.Errorf("call %d: %d", i, s)
		}
		replies = append(replies, first)
		for _, c := range []*client{c, other} {
			if again := reply(c, call); !bytes.Equal(again, first) {
				t.Errorf("call %d is answered by %x, and then by %x", i, first, again)
			}
		}
	}
	if s := statusOf(reply(c, record(6, procRmdir, "d", nil))); s != errNoEnt {
		t.Errorf("another call of the same: %d", s)
	}

	var saved bytes.Buffer
	if err := w.server.Save(&saved); err != nil {
		t.Fatal(err)
	}
	w.before = func(s *Server) {
		if err := s.Load(&saved); err != nil {
			t.Error(err)
		}
	}
	w.start()
	next := w.client(asRoot)
	for i, call := range calls {
		if again := reply(next, call); !bytes.Equal(again, replies[i]) {
			t.Errorf("call %d is answered by %x in the next process, not %x", i, again, replies[i])
		}
	}
	for i := range maxReplied {
		reply(next, record(uint32(100+i), procRmdir, "d", nil))
	}
	if s := statusOf(reply(next, calls[4])); s != errNoEnt {
		t.Errorf("a call that has not come again for long: %d", s)
	}
	if n := len(w.server.replied[w.export.Path].of); n != maxReplied {
		t.Errorf("%d replies are kept", n)
	}
	if err := w.server.Unexport(w.export.Path); err != nil || len(w.server.replied) > 0 {
		t.Errorf("after the export's end %d are left, %v", len(w.server.replied), err)
	}
}

// Of a call that comes again while it is being done, both wait for its end.
func TestRootRepeatedAtWork(t *testing.T) {
	w := serve(t)
	c, other := w.client(asRoot), w.client(asRoot)
	record := newCall(programNFS, 3, procMkdir, asRoot, func(e *encoder) {
		e.opaque(c.root)
		e.opaque([]byte("d"))
		attributes(0o755)(e)
	})
	x := w.server.paths[w.export.Path]
	x.Lock()
	answers := make(chan []byte)
	for _, c := range []*client{c, other} {
		go func() {
			reply, err := c.try(record)
			if err != nil {
				t.Error(err)
			}
			answers <- reply
		}()
	}
	x.Unlock()
	if a, b := <-answers, <-answers; !bytes.Equal(a, b) || len(a) < 20 || binary.BigEndian.Uint32(a[16:]) != uint32(ok) {
		t.Errorf("they are answered by %x and %x", a, b)
	}
}

// Snapshots are seen in a directory of the root that no list has. They are read-only, have other inode numbers than the volume's files, lead nowhere else, and
// outlast a restart.
func TestRootSnapshots(t *testing.T) {
	w := serve(t)
	var mu sync.Mutex
	var all []snapshots.Snapshot
	var opened int
	take := func(name string, taken int64) {
		t.Helper()
		at := filepath.Join(w.above, "taken", name)
		for _, args := range [][]string{{"mkdir", "-p", at}, {"cp", "-a", w.root + "/.", at}, {"mount", "--bind", at, at}, {"mount", "-o", "remount,bind,ro", at}} {
			command(t, args[0], args[1:]...)
		}
		t.Cleanup(func() { command(t, "umount", "--lazy", at) })
		mu.Lock()
		defer mu.Unlock()
		all = append(all, snapshots.Snapshot{Name: name, Taken: time.Unix(taken, 0)})
	}
	w.export.Snapshots = &snapshots.Source{
		List: func() ([]snapshots.Snapshot, error) {
			mu.Lock()
			defer mu.Unlock()
			return slices.Clone(all), nil
		},
		Open: func(name string) (*os.Root, error) {
			opened++
			return os.OpenRoot(filepath.Join(w.above, "taken", name))
		},
	}
	if err := w.server.Export(w.export); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(w.root, "file"), []byte("then"), 0o640); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(w.root, "dir"), 0o755); err != nil {
		t.Fatal(err)
	}
	c := w.client(asRoot)
	find := func(names ...string) []byte {
		t.Helper()
		at := c.root
		for _, name := range names {
			var s status
			if s, at = c.lookup(at, name); s != ok {
				t.Fatalf("lookup of %s in %v: %d", name, names, s)
			}
		}
		return at
	}
	about := func(handle []byte) []byte {
		t.Helper()
		s, d := c.on(procGetattr, handle, nil)
		if s != ok {
			t.Fatalf("attributes: %d", s)
		}
		return bytes.Clone(d.take(fattrSize))
	}
	list := find(snapshots.Dir)
	before := about(list)
	take("first", 1000)
	if bytes.Equal(about(list), before) {
		t.Error("a new snapshot changes nothing about their directory")
	}
	if err := os.WriteFile(filepath.Join(w.root, "file"), []byte("now"), 0o640); err != nil {
		t.Fatal(err)
	}
	take("second", 2000)

	names := func(proc uint32, dir []byte) (names []string) {
		t.Helper()
		var cookie uint64
		for eof := false; !eof; {
			s, d := c.on(proc, dir, func(e *encoder) {
				e.uint64(cookie)
				e.uint64(0)
				if proc == procReaddirplus {
					e.uint32(4096)
				}
				e.uint32(200) // about one name
			})
			if s != ok {
				t.Fatalf("list: %d", s)
			}
			if d.uint32() == 1 {
				d.take(fattrSize)
			}
			d.uint64()
			for d.uint32() == 1 {
				d.uint64()
				names = append(names, string(d.opaque(255)))
				cookie = d.uint64()
				if proc == procReaddirplus {
					if d.uint32() == 1 {
						d.take(fattrSize)
					}
					if d.uint32() == 1 {
						d.opaque(maxHandle)
					}
				}
			}
			if eof = d.uint32() == 1; d.bad {
				t.Fatal("the list can't be read")
			}
		}
		slices.Sort(names)
		return names
	}
	for _, proc := range []uint32{procReaddir, procReaddirplus} {
		if got := names(proc, list); !slices.Equal(got, []string{".", "..", "first", "second"}) {
			t.Errorf("the snapshots are %v", got)
		}
		if proc == procReaddir && slices.Contains(names(proc, c.root), snapshots.Dir) {
			t.Error("the root lists them")
		}
	}
	if opened != 0 {
		t.Errorf("to list them opens %d", opened)
	}
	file := find(snapshots.Dir, "first", "file")
	if s, text := c.read(file, 0, 10); s != ok || text != "then" {
		t.Errorf("the first has %q, %d", text, s)
	}
	if s, text := c.read(find(snapshots.Dir, "second", "file"), 0, 10); s != ok || text != "now" || opened != 2 {
		t.Errorf("the second has %q, %d, after %d were opened", text, s, opened)
	}
	number := func(handle []byte) uint64 { return binary.BigEndian.Uint64(about(handle)[fattrSize-32:]) }
	seen := map[uint64]bool{}
	for _, path := range [][]string{{"file"}, {}, {snapshots.Dir}, {snapshots.Dir, "first"}, {snapshots.Dir, "first", "file"}, {snapshots.Dir, "second"}, {snapshots.Dir, "second", "file"}} {
		if n := number(find(path...)); seen[n] {
			t.Errorf("%v has the number of another", path)
		} else {
			seen[n] = true
		}
	}
	for _, path := range [][]string{{snapshots.Dir, ".."}, {snapshots.Dir, "first", "..", ".."}, {snapshots.Dir, "first", "dir", "..", "..", ".", "second", "..", ".."}} {
		if !bytes.Equal(find(path...), c.root) {
			t.Errorf("%v is not the root", path)
		}
	}
	for _, path := range [][]string{{snapshots.Dir, "first"}, {snapshots.Dir, "first", "dir"}, {"dir"}} {
		if s, _ := c.lookup(find(path...), snapshots.Dir); s != errNoEnt {
			t.Errorf("snapshots below %v: %d", path, s)
		}
	}
	for _, name := range []string{"third", "../secret", "taken"} {
		if s, _ := c.lookup(list, name); s == ok {
			t.Errorf("%s is found among the snapshots", name)
		}
	}

	// Nothing can be changed there, nor the name be taken away.
	first, dir := find(snapshots.Dir, "first"), find(snapshots.Dir, "first", "dir")
	for what, got := range map[string]status{
		"write":           statusFrom(c.write(file, 0, "x", fileSync)),
		"create":          statusFrom(c.create(dir, "x", unchecked, attributes(0o644))),
		"create beside":   statusFrom(c.create(list, "x", unchecked, attributes(0o644))),
		"mkdir":           statusFrom(c.in(procMkdir, first, "x", attributes(0o755))),
		"mkdir beside":    statusFrom(c.in(procMkdir, list, "x", attributes(0o755))),
		"remove":          statusFrom(c.in(procRemove, first, "file", nil)),
		"rmdir":           statusFrom(c.in(procRmdir, list, "first", nil)),
		"rename":          statusFrom(c.in(procRename, first, "file", func(e *encoder) { e.opaque(first); e.opaque([]byte("x")) })),
		"chmod":           statusFrom(c.on(procSetattr, file, func(e *encoder) { attributes(0o777)(e); e.uint32(0) })),
		"chmod of a dir":  statusFrom(c.on(procSetattr, dir, func(e *encoder) { attributes(0o777)(e); e.uint32(0) })),
		"chmod of theirs": statusFrom(c.on(procSetattr, list, func(e *encoder) { attributes(0o777)(e); e.uint32(0) })),
		"truncate": statusFrom(c.on(procSetattr, file, func(e *encoder) {
			for range 3 {
				e.uint32(0)
			}
			e.bool(true)
			for range 5 {
				e.uint32(0)
			}
		})),
	} {
		if got != errROFS {
			t.Errorf("%s: %d", what, got)
		}
	}
	for what, got := range map[string]status{
		"mkdir":  statusFrom(c.in(procMkdir, c.root, snapshots.Dir, attributes(0o755))),
		"create": statusFrom(c.create(c.root, snapshots.Dir, guarded, attributes(0o644))),
		"rmdir":  statusFrom(c.in(procRmdir, c.root, snapshots.Dir, nil)),
	} {
		if got != errExist {
			t.Errorf("%s of their directory: %d", what, got)
		}
	}
	for what, handle := range map[string][]byte{"a name": find("dir"), "another snapshot": dir} {
		if s, _ := c.on(procLink, file, func(e *encoder) { e.opaque(handle); e.opaque([]byte("x")) }); s != errXDev && s != errROFS {
			t.Errorf("a link to %s: %d", what, s)
		}
	}
	if s, _ := c.on(procCommit, list, func(e *encoder) { e.uint64(0); e.uint32(0) }); s != errIsDir {
		t.Errorf("commit of their directory: %d", s)
	}
	for _, proc := range []uint32{18, 19, 20} { // FSSTAT, FSINFO, PATHCONF
		if s, _ := c.on(proc, list, nil); s != ok {
			t.Errorf("procedure %d on their directory: %d", proc, s)
		}
	}

	// Users have in a snapshot the rights that its files say.
	u := w.client(asUser)
	if s, _ := u.read(file, 0, 10); s != errAcces {
		t.Errorf("another user reads a file of root's: %d", s)
	}
	if s, got := u.lookup(u.root, snapshots.Dir); s != ok || !bytes.Equal(got, list) {
		t.Errorf("another user looks for snapshots: %d", s)
	}

	// One that is idle is closed, and opened again by a handle; one that is gone or another one is stale.
	x := w.server.paths[w.export.Path]
	x.RLock()
	if err := x.forgetSnapshots(time.Now().Add(time.Hour)); err != nil || len(x.snapshots) != 2 {
		t.Errorf("under a call %d snapshots are left open, %v", len(x.snapshots), err)
	}
	x.RUnlock()
	if err := x.forgetSnapshots(time.Now().Add(-time.Hour)); err != nil || len(x.snapshots) != 2 {
		t.Errorf("of those in use %d are left open, %v", len(x.snapshots), err)
	}
	if err := x.forgetSnapshots(time.Now().Add(time.Hour)); err != nil || len(x.snapshots) != 0 {
		t.Errorf("of idle snapshots %d are left open, %v", len(x.snapshots), err)
	}
	if s, text := c.read(file, 0, 10); s != ok || text != "then" {
		t.Errorf("after that the file has %q, %d", text, s)
	}
	if err := w.server.Export(w.export); err != nil { // as after a restart
		t.Fatal(err)
	}
	if s, text := c.read(file, 0, 10); s != ok || text != "then" || opened != 4 {
		t.Errorf("after a restart the file has %q, %d; %d were opened", text, s, opened)
	}
	mu.Lock()
	all[0].Taken = all[0].Taken.Add(time.Second)
	mu.Unlock()
	if err := w.server.Export(w.export); err != nil {
		t.Fatal(err)
	}
	if s, _ := c.read(file, 0, 10); s != errStale {
		t.Errorf("a file of a snapshot that was taken anew: %d", s)
	}
	if bytes.Equal(find(snapshots.Dir, "first", "file"), file) {
		t.Error("it has the same handle")
	}
}

// statusFrom is the first of a call's results.
func statusFrom(s status, _ any) status { return s }

// Where all have shown a handle, the one goes that has had no call for longest.
func TestRootIdle(t *testing.T) {
	w := serve(t)
	w.before = func(s *Server) { s.connections.Most, s.connections.Idle = 3, time.Nanosecond }
	w.start()
	all := []*client{w.client(asRoot), nil, nil}
	getattr := newCall(programNFS, 3, procGetattr, asRoot, func(e *encoder) { e.opaque(all[0].root) })
	asks := func(c *client) error {
		_, err := c.try(getattr)
		return err
	}
	for i := range all {
		if i > 0 {
			all[i] = w.dial(asRoot)
		}
		if err := asks(all[i]); err != nil {
			t.Fatal(err)
		}
	}
	if err := asks(all[0]); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(time.Minute); asks(w.dial(asRoot)) != nil; time.Sleep(10 * time.Millisecond) { // a call is at work until a moment after its answer
		if time.Now().After(end) {
			t.Fatal("nobody is answered any more")
		}
	}
	if err := asks(all[0]); err != nil {
		t.Errorf("who has just had a call: %v", err)
	}
	if asks(all[1]) == nil && asks(all[2]) == nil {
		t.Error("all are there, and one more")
	}
}

// While a volume is held no call is at work in it, and clients are told to ask again; other volumes go on.
func TestRootHold(t *testing.T) {
	w := serve(t)
	c := w.client(asRoot)
	other := w.export
	other.Path, other.Volume = "/other/0123456789", "other"
	if err := w.server.Export(other); err != nil {
		t.Fatal(err)
	}
	s, handle := c.mount(other.Path)
	if s != ok {
		t.Fatalf("mount: %d", s)
	}
	x := w.server.paths[w.export.Path]
	x.RLock() // a call
	begun, done := make(chan struct{}), make(chan error)
	go func() {
		done <- w.server.Hold("volume", func() error {
			close(begun)
			for _, proc := range []uint32{procGetattr, procAccess} {
				if s, _ := c.on(proc, c.root, func(e *encoder) { e.uint32(0) }); s != errJukebox {
					t.Errorf("procedure %d while the volume is held: %d", proc, s)
				}
			}
			if s, _ := c.on(procGetattr, handle, nil); s != ok {
				t.Errorf("another volume: %d", s)
			}
			return errHungUp
		})
	}()
	for !w.server.holds("volume") {
		runtime.Gosched()
	}
	select {
	case <-begun:
		t.Error("the volume is held under a call")
	default:
	}
	x.RUnlock()
	if err := <-done; err != errHungUp {
		t.Errorf("held: %v", err)
	}
	if s, _ := c.on(procGetattr, c.root, nil); s != ok {
		t.Errorf("afterwards: %d", s)
	}
	// A call that the storage keeps, of the export that there is or of the one before, has nobody hold the volume, and others go on.
	w.server.holding = 10 * time.Millisecond
	for _, what := range []string{"a call", "a call of an export that was changed"} {
		x := w.server.paths[w.export.Path]
		x.RLock()
		if what != "a call" {
			go w.server.Export(w.export)
			for left := 0; left == 0; runtime.Gosched() {
				w.server.mu.Lock()
				left = len(w.server.leaving[w.export.Path])
				w.server.mu.Unlock()
			}
		}
		if err := w.server.Hold("volume", func() error { t.Errorf("the volume is held under %s", what); return nil }); !errors.Is(err, ErrStuck) || !strings.Contains(err.Error(), "volume volume") {
			t.Errorf("held under %s: %v", what, err)
		}
		if s, _ := c.on(procGetattr, c.root, nil); s != ok {
			t.Errorf("another call, after %s kept the volume from being held: %d", what, s)
		}
		x.RUnlock()
	}
	w.server.holding = Patience
	// What ends with the lease is done elsewhere: nothing is done here before.
	if err := w.server.Hold("volume", func() error { return fmt.Errorf("a rollback: %w", lease.ErrEnded) }); !errors.Is(err, lease.ErrEnded) {
		t.Errorf("held: %v", err)
	}
	if s, _ := c.on(procGetattr, c.root, nil); s != errJukebox {
		t.Errorf("after what is done elsewhere: %d", s)
	}
}

// TestRootLease: what a call has done is not answered once the lease has lapsed, calls wait until it holds again, and end with it.
func TestRootLease(t *testing.T) {
	l := lease.New()
	l.Extend(lease.Forever)
	l.Open()
	w := serve(t)
	w.before = func(s *Server) { s.Lease = l }
	w.start()
	c := w.client(asRoot)
	fsstat := newCall(programNFS, 3, procFsstat, asRoot, func(e *encoder) { e.opaque(c.root) }) // which is not tried without waiting first
	answers := make(chan error, 1)
	ask := func(c *client) {
		go func() {
			_, err := c.try(fsstat)
			answers <- err
		}()
	}
	ended := func() { // a call is at work until a moment after its answer
		t.Helper()
		if err := l.Idle(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	ended()
	x := w.server.paths[w.export.Path]
	x.Lock() // the call has begun, and is not done
	ask(c)
	for idle := true; idle; _, idle = l.Lapsed() {
		runtime.Gosched()
	}
	l.Lapse()
	x.Unlock()
	if err := <-answers; err != errHungUp {
		t.Errorf("it is answered after the lease: %v", err)
	}
	ended()
	c = w.dial(asRoot)
	ask(c)
	if _, idle := l.Lapsed(); !idle {
		t.Error("a call has begun without the lease")
	}
	l.Extend(lease.Forever)
	l.Open()
	if err := <-answers; err != nil {
		t.Errorf("it is not answered with the lease: %v", err)
	}
	l.Pause()
	ask(c)
	l.End()
	if err := <-answers; err != errHungUp {
		t.Errorf("it is answered after the lease's end: %v", err)
	}
}
