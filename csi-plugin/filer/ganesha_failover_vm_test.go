//go:build vm

package main

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cradlestack/cradlestack/csi-plugin/filer/api"
)

// compound makes a call of NFS version 4.0 (RFC 7530 §15.2) until it is answered, and not with "later".
func (c *nfsClient) compound(ops ...[]byte) []byte {
	record := make([]byte, 4)
	for _, n := range []uint32{c.xid.Add(1), 0, 2, 100003, 4, 1, 1, 20, 0, 0, 0, 0, 0, 0, 0, 0, 0, uint32(len(ops))} {
		record = binary.BigEndian.AppendUint32(record, n)
	}
	for _, op := range ops {
		record = append(record, op...)
	}
	binary.BigEndian.PutUint32(record, uint32(len(record)-4)|1<<31)
	for {
		reply := c.call(record)
		if s := binary.BigEndian.Uint32(reply); s != 10013 || c.t.Failed() { // NFS4ERR_GRACE
			return reply
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func operation(number uint32, args ...[]byte) []byte {
	return append(binary.BigEndian.AppendUint32(nil, number), slices.Concat(args...)...)
}

// results are what the last of some operations has answered after its status, where those before have answered with nothing else.
func results(reply []byte, ops int) ([]byte, error) {
	if s := binary.BigEndian.Uint32(reply); s != 0 {
		return nil, fmt.Errorf("status %d", s)
	}
	return reply[12+8*ops:], nil
}

// ganeshaFailOver does drills to two filers with NFS-Ganesha, while a client writes by version 4.
func ganeshaFailOver(t *testing.T, rounds int, lease time.Duration) {
	p := newPair(t, lease, "--engine", "ganesha")
	active, _ := p.active()
	file := filepath.Join(p.pool, "vol", "data", "nfs")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	var pub api.Publication
	out, err := active.command("publish", "vol", "--client", "10.77.0.0/24", "-o", "json")
	if err == nil {
		err = json.Unmarshal([]byte(out), &pub)
	}
	if err != nil {
		t.Fatal(err)
	}
	c := &nfsClient{pair: p, address: pub.Address}
	defer c.close()
	const putfh, putrootfh, lookup, getfh, read, write = 22, 24, 15, 10, 25, 38
	found, err := results(c.compound(operation(putrootfh), operation(lookup, opaque(nil, []byte(strings.TrimPrefix(pub.Export, "/")))), operation(lookup, opaque(nil, []byte("nfs"))), operation(getfh)), 4)
	if err != nil {
		t.Fatal(err)
	}
	handle := opaque(nil, found[4:4+binary.BigEndian.Uint32(found)])
	at := func(piece int) []byte { return binary.BigEndian.AppendUint64(make([]byte, 16), uint64(piece)*4096) } // by nobody who has it open
	w := &writer{
		name: "NFS", write: func(piece int, b []byte) error {
			_, err := results(c.compound(operation(putfh, handle), operation(write, at(piece), []byte{0, 0, 0, 2}, opaque(nil, b))), 2)
			return err
		},
		read: func(piece int) ([]byte, error) {
			n := uint32(len(content("NFS", piece, 1)))
			got, err := results(c.compound(operation(putfh, handle), operation(read, at(piece), binary.BigEndian.AppendUint32(nil, n))), 2)
			if err != nil {
				return nil, err
			}
			return got[8 : 8+binary.BigEndian.Uint32(got[4:])], nil
		},
	}
	ctx, cancel := context.WithCancel(t.Context())
	var g sync.WaitGroup
	defer g.Wait()
	defer cancel()
	g.Go(func() { w.run(ctx, t) })
	var moves atomic.Int64
	g.Go(func() { moves.Store(int64(p.probe(ctx, c, handle))) })
	progress := func() {
		t.Helper()
		before := w.acks.Load()
		p.eventually("the writer goes on", func() error {
			if w.acks.Load() < before+5 && !t.Failed() {
				return errors.New("it does not")
			}
			return nil
		})
	}
	pauses := map[string][]time.Duration{}
	for round := range rounds {
		d := drills[round%len(drills)]
		active, other := p.active()
		progress()
		w.slow.Store(0)
		d.do(p, active, other)
		progress()
		p.eventually("a filer is active, and the other stands by", p.settled)
		progress()
		slow := time.Duration(w.slow.Load())
		pauses[d.name] = append(pauses[d.name], slow)
		t.Logf("round %d, %s: the longest call %.2fs", round+1, d.name, slow.Seconds())
		w.check(t, func(piece int) (string, int64) { return file, int64(piece) * 4096 })
		if t.Failed() {
			return
		}
	}
	for _, name := range slices.Sorted(maps.Keys(pauses)) {
		all := slices.Sorted(slices.Values(pauses[name]))
		t.Logf("%-10s median %6.2fs  worst %6.2fs  of %d", name, all[len(all)/2].Seconds(), all[len(all)-1].Seconds(), len(all))
	}
	cancel()
	g.Wait()
	taken := 0
	for _, h := range p.hosts {
		taken += strings.Count(h.log.String(), `msg="has the lock"`)
	}
	if got := moves.Load(); got == 0 || got >= int64(taken) {
		t.Errorf("who answers has changed %d times, and the lock was taken %d times", got, taken)
	}
	active, _ = p.active()
	if out, err := active.command("unpublish", pub.ID); err != nil {
		t.Error(out, err)
	}
}
