//go:build vm && soak

package ganesha

import (
	"encoding/binary"
	"fmt"
	"net"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestRootSoakFront: ten thousand clients are answered, or as many as this process may have connections (all of whose ends are its own), and one more is refused; those that begin large calls and do not go on, and those that do not read, take a bounded
// part of the memory, and keep nobody else waiting.
func TestRootSoakFront(t *testing.T) {
	var files unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &files); err != nil {
		t.Fatal(err)
	}
	files.Cur = files.Max
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &files); err != nil {
		t.Fatal(err)
	}
	most := min(maxConnections, (int(min(files.Max, 1<<20))-200)/4)
	if most < 1000 {
		t.Fatalf("there may be %d files open: not enough; run it with ulimit -n 41000", files.Max)
	}
	s := newStage(t, most)
	var all []net.Conn
	defer func() {
		for _, c := range all {
			c.Close()
		}
	}()
	dial := func() net.Conn {
		t.Helper()
		// Of one address there may be fewer.
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, byte(2+len(all)/maxConnectionsOfOne))}}
		conn, err := d.Dial("tcp", s.l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, conn)
		return conn
	}
	heap := func() int64 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return int64(m.HeapInuse + m.StackInuse)
	}
	before := heap()
	taken := func(what string, most int64) {
		t.Helper()
		now := heap() - before
		t.Logf("%s: %d MiB of heap and stacks, the clients' and the server's ends included", what, now>>20)
		if now > most {
			t.Errorf("%s: %d MiB are more than %d", what, now>>20, most>>20)
		}
	}
	for range most {
		if err := ask(dial(), 1); err != nil {
			t.Fatalf("client %d: %v", len(all), err)
		}
	}
	taken(fmt.Sprintf("%d connections", most), 512<<20)
	if err := ask(dial(), 1); err == nil {
		t.Error("one more is answered")
	}
	for i, c := range all {
		if err := ask(c, 2); err != nil && i < most {
			t.Errorf("client %d is answered no more: %v", i, err)
			break
		}
	}
	for _, c := range all[1:] {
		c.Close()
	}
	well := all[0]
	all = all[:1]
	for end := time.Now().Add(time.Minute); s.open.Load() > 1 && time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
	}
	if n := s.open.Load(); n != 1 {
		t.Errorf("the server has %d connections, and one client is there", n)
	}

	// More than what may be kept of large calls.
	for range 2 * maxLarge >> 20 {
		c := dial()
		c.SetWriteDeadline(time.Now().Add(10 * time.Second))
		if _, err := c.Write(append(binary.BigEndian.AppendUint32(nil, 1<<31|1<<20), 1)); err != nil {
			t.Fatal(err)
		}
	}
	for i := range uint32(100) {
		if err := ask(well, 10+i); err != nil {
			t.Fatalf("another client: %v", err)
		}
	}
	taken("large calls that do not go on", maxLarge+128<<20)
	for _, c := range all[1:] {
		c.Close()
	}
	all = all[:1]

	for range 20 {
		c := dial()
		for i := uint32(0); i < 100_000; i++ {
			call := callOf()
			binary.BigEndian.PutUint32(call, i)
			c.SetWriteDeadline(time.Now().Add(time.Second))
			if _, err := c.Write(append(binary.BigEndian.AppendUint32(nil, 1<<31|uint32(len(call))), call...)); err != nil {
				break // it is not read any more, as the replies are not
			}
		}
	}
	for i := range uint32(100) {
		if err := ask(well, 1000+i); err != nil {
			t.Fatalf("another client: %v", err)
		}
	}
	taken("clients that do not read", 128<<20)
}
