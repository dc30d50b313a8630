//go:build vm

package nfs

import (
	"context"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
)

// FuzzArguments: whatever a client sends behind a handle that it has, the server answers or hangs up, and serves the next call; outside of the export nothing
// changes.
func FuzzArguments(f *testing.F) {
	dir := f.TempDir()
	root, beside := filepath.Join(dir, "root"), filepath.Join(dir, "beside")
	if err := os.Mkdir(root, 0o777); err != nil {
		f.Fatal(err)
	}
	if err := os.WriteFile(beside, []byte("mine"), 0o666); err != nil {
		f.Fatal(err)
	}
	s := New(testKey, slog.New(slog.DiscardHandler))
	if err := s.Export(Export{Path: "/v/s", Root: root, Volume: "v", Clients: []netip.Prefix{netip.MustParsePrefix("127.0.0.1/32")}}); err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { s.Close() })
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		f.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- s.Serve(ctx, l) }()
	f.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			f.Error(err)
		}
	})
	seed := func(proc uint8, args func(e *encoder)) {
		var e encoder
		args(&e)
		f.Add(proc, e.b)
	}
	name := func(name string, rest func(e *encoder)) func(e *encoder) {
		return func(e *encoder) { e.opaque([]byte(name)); rest(e) }
	}
	seed(procSetattr, func(e *encoder) { attributes(0o777)(e); e.uint32(0) })
	seed(procLookup, name("..", func(*encoder) {}))
	seed(procAccess, func(e *encoder) { e.uint32(0x3f) })
	seed(procRead, func(e *encoder) { e.uint64(1 << 40); e.uint32(1 << 31) })
	seed(procWrite, func(e *encoder) { e.uint64(0); e.uint32(4); e.uint32(2); e.opaque([]byte("data")) })
	seed(procCreate, name("file", func(e *encoder) { e.uint32(0); attributes(0o644)(e) }))
	seed(procMkdir, name("dir", attributes(0o777)))
	seed(procSymlink, name("link", func(e *encoder) { attributes(0)(e); e.opaque([]byte("../beside")) }))
	seed(procMknod, name("null", func(e *encoder) { e.uint32(4); attributes(0)(e); e.uint64(1<<32 | 3) }))
	seed(procRemove, name("../beside", func(*encoder) {}))
	seed(procRename, name("file", func(e *encoder) { e.opaque(make([]byte, 44)); e.opaque([]byte("../beside")) }))
	seed(procReaddir, func(e *encoder) { e.uint64(0); e.uint64(0); e.uint32(1 << 31) })
	seed(procReaddirplus, func(e *encoder) { e.uint64(0); e.uint64(0); e.uint32(512); e.uint32(4096) })
	seed(procCommit, func(e *encoder) { e.uint64(0); e.uint32(0) })
	f.Fuzz(func(t *testing.T, proc uint8, args []byte) {
		w := &world{t: t, addr: l.Addr().String(), export: Export{Path: "/v/s"}}
		c := w.client(asRoot)
		record := newCall(programNFS, 3, uint32(proc), asRoot, func(e *encoder) {
			e.opaque(c.root)
			e.b = append(e.b, args...)
		})
		if len(record) > maxRecord {
			return
		}
		_, err := c.try(record)
		if err != nil && len(record) <= smallCall {
			t.Errorf("procedure %d: %v", proc, err)
		}
		if s, _ := w.client(asRoot).on(procGetattr, c.root, nil); s != ok {
			t.Errorf("after procedure %d the root is %d", proc, s)
		}
		if data, err := os.ReadFile(beside); err != nil || string(data) != "mine" {
			t.Fatalf("procedure %d has changed what is beside the export: %q, %v", proc, data, err)
		}
		if entries, err := os.ReadDir(dir); err != nil || len(entries) != 2 {
			t.Fatalf("procedure %d has made something beside the export: %v, %v", proc, entries, err)
		}
		c.conn.Close()
	})
}
