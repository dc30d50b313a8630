//go:build vm && soak

package main

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cradlestack/cradlestack/csi-plugin/filer/api"
)

// A locker is a client of NFS version 4.0 that opens a file and locks it (RFC 7530 §16.33, §16.16, §16.10).
type locker struct {
	*nfsClient
	name        string
	file        []byte // its handle
	clientid    []byte
	seq, locked uint32
	open        []byte // stateid
}

func number(n uint32) []byte { return binary.BigEndian.AppendUint32(nil, n) }

// begin makes the client known to a server, which may know it from before.
func (l *locker) begin() error {
	got, err := results(l.compound(operation(35, []byte("verifier"), opaque(nil, []byte(l.name)), number(0), opaque(nil, []byte("tcp")), opaque(nil, []byte("0.0.0.0.0.0")), number(0))), 1)
	if err != nil {
		return fmt.Errorf("SETCLIENTID: %w", err)
	}
	l.clientid = got[:8]
	l.seq = 0
	if _, err := results(l.compound(operation(36, got[:16])), 1); err != nil {
		return fmt.Errorf("SETCLIENTID_CONFIRM: %w", err)
	}
	return nil
}

// take opens the file in a directory, or claims that it was open, and then the lock. It returns the status of that.
func (l *locker) take(dir [][]byte, claim bool) (status uint32, err error) {
	at, how := append(dir, operation(18)), slicesOf(number(0), opaque(nil, []byte("lock"))) // CLAIM_NULL
	if claim {
		at, how = [][]byte{operation(22, opaque(nil, l.file)), operation(18)}, slicesOf(number(1), number(0)) // CLAIM_PREVIOUS, no delegation
	}
	l.seq++
	at[len(at)-1] = operation(18, number(l.seq), number(3), number(0), l.clientid, opaque(nil, []byte("opener")), number(0), how)
	ops := append(at, operation(10))
	reply := l.compound(ops...)
	if s := binary.BigEndian.Uint32(reply); s != 0 {
		return 0, fmt.Errorf("OPEN: status %d", s)
	}
	got := reply[12+8*(len(at)-1)+8:]
	l.open = got[:16]
	confirm := binary.BigEndian.Uint32(got[36:])&2 != 0
	rest := got[40:]
	rest = rest[4+4*binary.BigEndian.Uint32(rest)+4+8:] // attributes, no delegation; GETFH's number and status
	l.file = rest[4 : 4+binary.BigEndian.Uint32(rest)]
	if confirm {
		l.seq++
		got, err := results(l.compound(operation(22, opaque(nil, l.file)), operation(20, l.open, number(l.seq))), 2)
		if err != nil {
			return 0, fmt.Errorf("OPEN_CONFIRM: %w", err)
		}
		l.open = got[:16]
	}
	reclaim := number(0)
	if claim {
		reclaim = number(1)
	}
	l.seq++
	l.locked++
	reply = l.compound(operation(22, opaque(nil, l.file)),
		operation(12, number(2), reclaim, make([]byte, 8), []byte{255, 255, 255, 255, 255, 255, 255, 255}, number(1), number(l.seq), l.open, number(0), l.clientid, opaque(nil, fmt.Append(nil, "locker ", l.locked))))
	return binary.BigEndian.Uint32(reply), nil
}

func slicesOf(all ...[]byte) (b []byte) {
	for _, one := range all {
		b = append(b, one...)
	}
	return b
}

// TestRootSoakGaneshaLocks: what a client has open and locked it has again at the filer that takes over, and nobody else.
func TestRootSoakGaneshaLocks(t *testing.T) {
	p := newPair(t, 3*time.Second, "--engine", "ganesha")
	active, _ := p.active()
	if err := os.WriteFile(filepath.Join(p.pool, "vol", "data", "lock"), nil, 0o600); err != nil {
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
	dir := func() [][]byte {
		return [][]byte{operation(24), operation(15, opaque(nil, []byte(strings.TrimPrefix(pub.Export, "/"))))}
	}
	var one, two *locker
	for _, l := range []struct {
		at   **locker
		name string
		want uint32
	}{{&one, "one", 0}, {&two, "two", 10010}} { // NFS4ERR_DENIED
		c := &locker{nfsClient: p.nfs(pub.Address), name: l.name}
		defer c.close()
		*l.at = c
		if err := c.begin(); err != nil {
			t.Fatal(err)
		}
		if s, err := c.take(dir(), false); err != nil || s != l.want {
			t.Fatalf("%s: the lock is answered by %d, %v", l.name, s, err)
		}
	}
	for _, d := range drills {
		if d.name != "killed" && d.name != "switched" {
			continue
		}
		active, other := p.active()
		d.do(p, active, other)
		if err := one.begin(); err != nil {
			t.Fatalf("%s: %v", d.name, err)
		}
		if s, err := one.take(nil, true); err != nil || s != 0 {
			t.Fatalf("%s: the lock that it had is answered by %d, %v", d.name, s, err)
		}
		if err := two.begin(); err != nil {
			t.Fatalf("%s: %v", d.name, err)
		}
		// Which waits for the end of the grace period. Meanwhile the first one has to be heard of.
		ended, heard := make(chan struct{}), make(chan struct{})
		go func() {
			defer close(heard)
			for {
				select {
				case <-ended:
					return
				case <-time.After(2 * time.Second):
					one.compound(operation(30, one.clientid)) // RENEW
				}
			}
		}()
		s, err := two.take(dir(), false)
		close(ended)
		<-heard
		if err != nil || s != 10010 {
			t.Fatalf("%s: another one's lock is answered by %d, %v", d.name, s, err)
		}
	}
	active, _ = p.active()
	if out, err := active.command("unpublish", pub.ID); err != nil {
		t.Error(out, err)
	}
}
