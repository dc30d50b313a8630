package nfs

import (
	"bytes"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
)

var testKey = [KeySize]byte{1, 2, 3}

// newCall is the record of a call, without its header.
func newCall(program, version, proc uint32, u *user, args func(e *encoder)) []byte {
	var e encoder
	for _, v := range []uint32{7, msgCall, rpcVersion, program, version, proc} {
		e.uint32(v)
	}
	if u != nil {
		var cred encoder
		cred.uint32(0)
		cred.opaque([]byte("test"))
		cred.uint32(u.uid)
		cred.uint32(u.gid)
		cred.uint32(uint32(len(u.groups)))
		for _, g := range u.groups {
			cred.uint32(g)
		}
		e.uint32(authSys)
		e.opaque(cred.b)
	} else {
		e.uint32(authNone)
		e.opaque(nil)
	}
	e.uint32(authNone)
	e.opaque(nil)
	if args != nil {
		args(&e)
	}
	return e.b
}

func TestParseCall(t *testing.T) {
	u := user{uid: 1000, gid: 100, groups: []uint32{100, 4}}
	c, reply, err := parseCall(newCall(programNFS, 3, 1, &u, func(e *encoder) { e.uint64(42) }))
	if err != nil || reply != nil || c.xid != 7 || c.program != programNFS || c.proc != 1 || c.user.uid != 1000 || c.user.gid != 100 ||
		!slices.Equal(c.user.groups, u.groups) || c.args.uint64() != 42 || c.args.bad || len(c.args.b) != 0 {
		t.Errorf("%+v, %x, %v", c, reply, err)
	}
	good := newCall(programNFS, 3, 1, &u, nil)
	for n := range good {
		if _, reply, err := parseCall(good[:n]); err == nil && reply == nil {
			t.Errorf("the first %d of %d bytes are a call", n, len(good))
		}
	}
	change := func(at int, b byte) []byte {
		c := bytes.Clone(good)
		c[at] = b
		return c
	}
	const uidAt = 7*4 + 4 + 4 + 4 + 4 // after the flavor: length, stamp, name
	for name, c := range map[string]struct {
		record []byte
		reply  []byte // its end
		err    error
	}{
		"a reply":          {change(7, msgReply), nil, errRecord},
		"another RPC":      {change(11, 3), []byte{0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 2}, nil},
		"much of a user":   {change(31, 200), nil, errRecord},
		"too many groups":  {newCall(programNFS, 3, 1, &user{groups: make([]uint32, 17)}, nil), []byte{0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1}, nil},
		"more groups than": {change(uidAt+8+3, 9), []byte{0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1}, nil},
		"user -1":          {newCall(programNFS, 3, 1, &user{uid: 1<<32 - 1}, nil), []byte{0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1}, nil},
		"group -1":         {newCall(programNFS, 3, 1, &user{gid: 1<<32 - 1}, nil), []byte{0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1}, nil},
		"another program":  {newCall(100000, 2, 3, nil, nil), nil, nil},
		"a name of 300 bytes": {func() []byte {
			c := bytes.Clone(good)
			c[7*4+4+4+2], c[7*4+4+4+3] = 1, 44
			return c
		}(), []byte{0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1}, nil},
	} {
		_, reply, err := parseCall(c.record)
		if !errors.Is(err, c.err) || !bytes.HasSuffix(reply, c.reply) || (reply == nil) != (c.reply == nil) {
			t.Errorf("%s: %x, %v; want …%x, %v", name, reply, err, c.reply, c.err)
		}
	}
}

func TestReadLength(t *testing.T) {
	for head, want := range map[string]int{
		"\x80\x00\x00\x08": 8, "\x80\x10\x10\x00": maxRecord, "\x80\x10\x10\x01": -1, "\xff\xff\xff\xff": -1, "\x00\x00\x00\x08": -1, "\x80\x00": -1,
	} {
		n, err := readLength(strings.NewReader(head))
		if (err != nil) != (want < 0) || err == nil && n != want {
			t.Errorf("%x: %d, %v; want %d", head, n, err, want)
		}
	}
}

// A handle that differs in any bit from one that was made, or is of another export, opens nothing.
func TestForgedHandles(t *testing.T) {
	s, other := newSealer(testKey[:], "/v/secret"), newSealer(testKey[:], "/v/other")
	for _, r := range []reference{{kind: 1, kernel: []byte{1, 2, 3, 4, 5, 6, 7, 8}}, {snapshotID{9}, 1, []byte{1, 2, 3, 4, 5, 6, 7, 8}}, {snapshot: listID, kernel: []byte{}}} {
		handle, fits := s.seal(r)
		if !fits || len(handle) > maxHandle {
			t.Fatalf("%x, %t", handle, fits)
		}
		if got, genuine := s.open(handle); !genuine || !reflect.DeepEqual(got, r) {
			t.Errorf("opened: %v, %t, not %v", got, genuine, r)
		}
		for i := range len(handle) * 8 {
			forged := bytes.Clone(handle)
			forged[i/8] ^= 1 << (i % 8)
			_, well := tagOf(forged)
			if !well && i >= 8 {
				t.Errorf("bit %d: the export can't be told", i)
			}
			if !well {
				continue
			}
			if _, genuine := s.open(forged); genuine {
				t.Errorf("bit %d is not authenticated", i)
			}
		}
		if _, genuine := other.open(handle); genuine || other.tag == s.tag {
			t.Error("a handle of one export opens something in another")
		}
	}
	if again := newSealer(testKey[:], "/v/secret"); !bytes.Equal(again.key, s.key) || again.tag != s.tag {
		t.Error("after a restart handles are others")
	}
	for version, lengths := range map[byte][]int{0: {40}, ofVolume: {0, 1, afterTag + macSize - 1, maxHandle + 1}, ofSnapshot: {afterTag + macSize, afterTag + macSize + 7, maxHandle + 1}, 3: {40}} {
		for _, n := range lengths {
			if _, well := tagOf(append([]byte{version}, make([]byte, n)...)[:n]); well {
				t.Errorf("%d bytes of version %d are a handle", n, version)
			}
		}
	}
	for _, r := range []reference{{kind: 1, kernel: make([]byte, 38)}, {snapshotID{9}, 1, make([]byte, 30)}} {
		if _, fits := s.seal(r); !fits {
			t.Errorf("%v does not fit", r)
		}
		r.kernel = append(r.kernel, 0)
		if _, fits := s.seal(r); fits {
			t.Errorf("%v fits", r)
		}
	}
	for _, kind := range []int32{256, -1} {
		if _, fits := s.seal(reference{kind: kind, kernel: make([]byte, 8)}); fits {
			t.Errorf("type %d fits", kind)
		}
	}
}

func TestStatusOf(t *testing.T) {
	for err, want := range map[error]status{
		nil: ok, syscall.ENOSPC: errNoSpc, syscall.EDQUOT: errDQuot, &net.OpError{Err: syscall.EACCES}: errAcces, syscall.EIO: errIO, io.EOF: errIO, syscall.ETXTBSY: errIO,
	} {
		if got := statusOf(err); got != want {
			t.Errorf("%v: %d, not %d", err, got, want)
		}
	}
}

func TestNames(t *testing.T) {
	for name, want := range map[string][2]status{
		"a": {ok, ok}, ".": {ok, errInval}, "..": {ok, errExist}, "...": {ok, ok}, "": {errAcces, errAcces}, "a/b": {errAcces, errAcces}, "/": {errAcces, errAcces},
		"a\x00": {errAcces, errAcces}, strings.Repeat("x", 255): {ok, ok}, strings.Repeat("x", 256): {errNameTooLong, errNameTooLong},
	} {
		if got := [2]status{checkName(name), checkNew(name)}; got != want {
			t.Errorf("%.20q: %d, not %d", name, got, want)
		}
	}
}

// FuzzConversation: whatever somebody sends who has no file handle, the server goes on, and takes no more memory than what was sent is worth.
func FuzzConversation(f *testing.F) {
	record := func(body []byte) []byte { return seal(append(make([]byte, 4), body...)) }
	u := user{uid: 1, gid: 2, groups: []uint32{3}}
	f.Add(record(newCall(programMount, 3, 1, &u, func(e *encoder) { e.opaque([]byte("/volume/secret")) })))
	f.Add(record(newCall(programNFS, 3, procWrite, &u, func(e *encoder) { e.opaque(make([]byte, 44)) })))
	f.Add(append(record(newCall(programNFS, 3, 0, nil, nil)), record(newCall(programNFS, 4, 1, nil, nil))...))
	f.Add([]byte("\x80\x10\x00\x00 and nothing more"))
	f.Add([]byte("GET / HTTP/1.1\r\n\r\n"))
	f.Fuzz(func(t *testing.T, sent []byte) {
		s := New(testKey, slog.New(slog.DiscardHandler))
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		here, there := net.Pipe()
		var g sync.WaitGroup
		g.Go(func() { _, _ = io.Copy(io.Discard, here) })
		g.Go(func() {
			_, _ = here.Write(sent) // the server may have hung up
			here.Close()
		})
		s.converse(t.Context(), there, s.connections.Admit(netip.Addr{}, func() {}))
		g.Wait()
		runtime.ReadMemStats(&after)
		if took, most := after.TotalAlloc-before.TotalAlloc, uint64(1<<20+400*len(sent)); took > most {
			t.Errorf("%d bytes made it take %d", len(sent), took)
		}
	})
}

func TestAdmits(t *testing.T) {
	e := Export{Clients: []netip.Prefix{netip.MustParsePrefix("10.1.0.0/16"), netip.MustParsePrefix("2001:db8::1/128")}}
	for a, want := range map[string]bool{"10.1.2.3": true, "10.2.0.1": false, "2001:db8::1": true, "2001:db8::2": false} {
		if got := e.admits(netip.MustParseAddr(a)); got != want {
			t.Errorf("%s: %t", a, got)
		}
	}
	if e.admits(netip.Addr{}) || (Export{}).admits(netip.MustParseAddr("10.1.2.3")) {
		t.Error("somebody unknown is admitted")
	}
}
