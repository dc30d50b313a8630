//go:build vm && soak

package ganesha

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"
)

// TestRootSoakFrontCost measures what passing through the filer costs: random reads of 4 KiB by version 4.0, one client and one connection, of NFS-Ganesha through the front
// and of another NFS-Ganesha straight, in turns.
func TestRootSoakFrontCost(t *testing.T) {
	const size, reads, rounds = 16 << 20, 2000, 9
	content := bytes.Repeat([]byte("0123456789abcdef"), size/16)
	type way struct {
		name   string
		world  *world
		conn   net.Conn
		handle []byte
		took   map[int][]time.Duration // by how many are on the way at a time
	}
	var ways []*way
	for _, name := range []string{"through the front", "straight"} {
		w := newWorld(t)
		if name == "straight" {
			w.must(w.s.Close())
			w.open(true)
		}
		w.must(os.WriteFile(filepath.Join(w.root("v"), "large"), content, 0o644))
		w.must(w.s.Export(w.export("v", "127.0.0.1/32")))
		w.must(w.s.Start())
		status, handle := w.handle("v.secret", "large")
		for end := time.Now().Add(2 * time.Minute); status != statusOK && time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
			status, handle = w.handle("v.secret", "large")
		}
		if status != statusOK {
			t.Fatalf("%s: the file is %d", name, status)
		}
		conn, err := net.Dial("tcp", w.s.Listen.String())
		w.must(err)
		defer conn.Close()
		ways = append(ways, &way{name, w, conn, handle, map[int][]time.Duration{}})
	}
	measure := func(w *way, depth int) time.Duration {
		begun := time.Now()
		xid := uint32(0)
		sent := map[uint32]int{}
		for done := 0; done < reads; done++ {
			for ; int(xid) < reads && len(sent) < depth; xid++ {
				at := rand.IntN(size/4096) * 4096
				call := request(op(opPutfh, opaque(w.handle)), op(opRead, make([]byte, sizeStateid), binary.BigEndian.AppendUint64(nil, uint64(at)), number(4096)))
				binary.BigEndian.PutUint32(call, xid)
				w.world.must(send(w.conn, [][]byte{call}))
				sent[xid] = at
			}
			reply, err := record(w.conn)
			w.world.must(err)
			n := binary.BigEndian.Uint32(reply)
			at, ours := sent[n]
			delete(sent, n)
			if !ours || !bytes.HasSuffix(reply, content[at:at+4096]) {
				t.Fatalf("%s: a read at %d is answered by %.100x", w.name, at, reply)
			}
		}
		return time.Since(begun)
	}
	for range rounds {
		for _, depth := range []int{1, 32} {
			for _, w := range ways {
				w.took[depth] = append(w.took[depth], measure(w, depth))
			}
		}
	}
	for _, depth := range []int{1, 32} {
		var rates []float64
		for _, w := range ways {
			slices.Sort(w.took[depth])
			rates = append(rates, reads/w.took[depth][rounds/2].Seconds())
		}
		t.Logf("4 KiB read at random, %d at a time: through the front %.0f/s, straight %.0f/s, %.2f", depth, rates[0], rates[1], rates[0]/rates[1])
	}
}
