//go:build vm && soak

package main

import (
	"context"
	"encoding/binary"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"testing"
	"time"

	"github.com/cradlestack/cradlestack/internal/filertest"
)

// TestRootSoakMemory measures the filer's memory with 200 volumes and 100,000 files that clients have open: each is read by its handle, twice. It stays bounded, and so
// does what the filer itself has open.
func TestRootSoakMemory(t *testing.T) {
	const volumes, files, most = 200, 500, 512 << 20
	f := filertest.Start(t)
	status := func(what string) {
		t.Helper()
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", f.PID()))
		if err != nil {
			t.Fatal(err)
		}
		var kib [2]int
		for i, name := range []string{"VmRSS", "VmHWM"} {
			if m := regexp.MustCompile(name + `:\s+(\d+) kB`).FindSubmatch(text); m != nil {
				kib[i], _ = strconv.Atoi(string(m[1]))
			}
		}
		open, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", f.PID()))
		t.Logf("%s: %d MiB resident, %d at most so far; %d files open, %v", what, kib[0]>>10, kib[1]>>10, len(open), err)
		if kib[1] == 0 || kib[1]<<10 > most {
			t.Errorf("%s: it has had %d KiB", what, kib[1])
		}
	}
	status("at the beginning")
	c := &nfsClient{}
	var conns []net.Conn
	defer func() {
		for _, conn := range conns {
			conn.Close()
		}
	}()
	ask := func(conn net.Conn, proc int, handle, rest []byte) []byte {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		reply, err := exchangeRPC(ctx, conn, c.record(proc, handle, rest))
		if err != nil {
			t.Fatal(err)
		}
		if s := binary.BigEndian.Uint32(reply); s != 0 {
			t.Fatalf("procedure %d: status %d", proc, s)
		}
		return reply
	}
	exports := make([]filertest.Publication, volumes)
	for i := range exports {
		name := fmt.Sprintf("vol-%d", i)
		dir := f.Volume(name, 0, nil)
		for j := range files {
			if err := os.WriteFile(filepath.Join(dir, strconv.Itoa(j)), fmt.Appendf(nil, "%d of %d", j, i), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		exports[i] = f.Publish(name)
	}
	status(fmt.Sprintf("with %d volumes published", volumes))
	handles := make([][][]byte, volumes)
	read := func(i, j int) {
		rest := binary.BigEndian.AppendUint32(make([]byte, 8), 100)
		reply := ask(conns[i], 6, handles[i][j], rest)
		want := fmt.Appendf(nil, "%d of %d", j, i)
		if at := 4 + 4 + 84 + 4 + 4 + 4; len(reply) < at+len(want) || string(reply[at:at+len(want)]) != string(want) {
			t.Fatalf("file %d of volume %d is %q", j, i, reply)
		}
	}
	for i, p := range exports {
		conn, err := (&net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(f.Host)}}).Dial("tcp", p.Address)
		if err != nil {
			t.Fatal(err)
		}
		conns = append(conns, conn)
		mounted := ask(conn, -1, []byte(p.Export), nil)
		root := mounted[8 : 8+binary.BigEndian.Uint32(mounted[4:])]
		for j := range files {
			found := ask(conn, 3, root, opaque(nil, []byte(strconv.Itoa(j))))
			handles[i] = append(handles[i], found[8:8+binary.BigEndian.Uint32(found[4:])])
			read(i, j)
		}
	}
	status(fmt.Sprintf("with %d handles", volumes*files))
	for j := range files {
		for i := range volumes {
			read(i, j)
		}
	}
	status("when each was read once more")
}
