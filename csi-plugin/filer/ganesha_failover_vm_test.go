//go:build vm

package main

import (
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// TestRootGaneshaFailover does to filers with NFS-Ganesha the first two of the drills: the active one is killed, and switched.
func TestRootGaneshaFailover(t *testing.T) { failOver(t, 2, 3*time.Second, byGanesha) }

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

// writer4 writes a file, which nobody has open, by version 4.0.
func (c *nfsClient) writer4(export, file string) (handle []byte, w *writer) {
	c.t.Helper()
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		c.t.Fatal(err)
	}
	handle, w = c.writes4(export, filepath.Base(file))
	w.path = func(piece int) (string, int64) { return file, int64(piece) * 4096 }
	return handle, w
}

// writes4 writes a file of an export that is there.
func (c *nfsClient) writes4(export, name string) (handle []byte, w *writer) {
	c.t.Helper()
	const putfh, putrootfh, lookup, getfh, read, write = 22, 24, 15, 10, 25, 38
	found, err := results(c.compound(operation(putrootfh), operation(lookup, opaque(nil, []byte(strings.TrimPrefix(export, "/")))),
		operation(lookup, opaque(nil, []byte(name))), operation(getfh)), 4)
	if err != nil {
		c.t.Fatal(err)
	}
	handle = found[4 : 4+binary.BigEndian.Uint32(found)]
	this := operation(putfh, opaque(nil, handle))
	at := func(piece int) []byte { return binary.BigEndian.AppendUint64(make([]byte, 16), uint64(piece)*4096) } // by nobody who has it open
	return handle, &writer{
		name: "NFS", write: func(piece int, b []byte) error {
			_, err := results(c.compound(this, operation(write, at(piece), []byte{0, 0, 0, 2}, opaque(nil, b))), 2)
			return err
		},
		read: func(piece int) ([]byte, error) {
			n := uint32(len(content("NFS", piece, 1)))
			got, err := results(c.compound(this, operation(read, at(piece), binary.BigEndian.AppendUint32(nil, n))), 2)
			if err != nil {
				return nil, err
			}
			return got[8 : 8+binary.BigEndian.Uint32(got[4:])], nil
		},
	}
}
