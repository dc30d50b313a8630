package ganesha

import (
	"bytes"
	"encoding/binary"
	"slices"
	"testing"
)

func words(all ...uint32) (b []byte) {
	for _, n := range all {
		b = binary.BigEndian.AppendUint32(b, n)
	}
	return b
}

func xdr(b []byte) []byte {
	return append(append(words(uint32(len(b))), b...), make([]byte, -len(b)&3)...)
}

// callOf is a call of version 4.1 with operations.
func callOf(ops ...[]byte) []byte {
	return slices.Concat(words(7, msgCall, 2, programNFS, version4, procCompound, authSys, 8, 1, 2, authNone, 0), xdr([]byte("tag")), words(1, uint32(len(ops))), bytes.Join(ops, nil))
}

func replyOf(results ...[]byte) []byte {
	return slices.Concat(words(7, msgReply, 0, authNone, 0, 0, 0), xdr([]byte("tag")), words(uint32(len(results))), bytes.Join(results, nil))
}

// Handles are other ones to clients than to the server, whatever comes before them.
func TestSeal(t *testing.T) {
	s := newSeal([]byte("key"))
	handle := []byte("C\x00\x00\x05a handle of odd length")
	signed := slices.Concat(handle, s.mac(handle))
	attributes := slices.Concat(words(2, 1<<4, 1<<1), xdr([]byte("0123456789")))
	stateid, change := make([]byte, sizeStateid), make([]byte, sizeChange)
	open := func(how ...[]byte) []byte {
		return slices.Concat(words(opOpen, 1, 2, 3, 4, 5), xdr([]byte("owner")), bytes.Join(how, nil))
	}
	calls := [][]byte{
		slices.Concat(words(opSequence), make([]byte, 32)),
		slices.Concat(words(opPutfh), xdr(signed)),
		words(opSavefh), words(opRestorefh), words(opGetfh), words(opPutrootfh), words(opPutpubfh), words(opLookupp), words(opReadlink),
		words(opAccess, 63), words(opOpenattr, 1), words(opSecinfoNoName, 0), words(opReclaimComplete, 0),
		slices.Concat(words(opDelegreturn), stateid), slices.Concat(words(opClose, 1), stateid), slices.Concat(words(opOpenConfirm), stateid, words(1)),
		words(opCommit, 0, 1, 2), words(opRenew, 1, 2),
		slices.Concat(words(opCreate, typeLink), xdr([]byte("to")), xdr([]byte("name")), attributes),
		slices.Concat(words(opCreate, typeBlock, 1, 2), xdr([]byte("name")), attributes),
		slices.Concat(words(opCreate, 2), xdr([]byte("name")), attributes),
		slices.Concat(words(opLookup), xdr([]byte("name"))), slices.Concat(words(opLink), xdr([]byte("n"))), slices.Concat(words(opRemove), xdr([]byte("na"))),
		slices.Concat(words(opRename), xdr([]byte("from")), xdr([]byte("to"))),
		slices.Concat(words(opLock, 2, 0, 0, 0, 0, 9, 1, 1), stateid, words(1, 1, 2), xdr([]byte("owner"))),
		slices.Concat(words(opLock, 2, 0, 0, 0, 0, 9, 0), stateid, words(1)),
		slices.Concat(words(opLockt, 2, 0, 0, 0, 9, 1, 2), xdr([]byte("owner"))), slices.Concat(words(opLocku, 2, 1), stateid, words(0, 0, 0, 9)),
		slices.Concat(words(opVerify), attributes), slices.Concat(words(opSetattr), stateid, attributes),
		open(words(0, claimNull), xdr([]byte("name"))),
		open(words(1, createGuarded), attributes, words(claimNull), xdr([]byte("name"))),
		open(words(1, createExclusive, 1, 2, claimPrevious, 0)),
		open(words(1, createExclusive41, 1, 2), attributes, words(claimFH)),
		open(words(0, claimDelegateCur), stateid, xdr([]byte("name"))), open(words(0, claimDelegatePrev), xdr([]byte("name"))), open(words(0, claimDelegCurFH), stateid), open(words(0, claimDelegPrevFH)),
		slices.Concat(words(opOpenDowngrade), stateid, words(1, 2, 3)), slices.Concat(words(opRead), stateid, words(0, 0, 9)),
		slices.Concat(words(opReaddir, 0, 0, 0, 0, 9, 9, 1, 1<<attributeFilehandle|1)), words(opGetattr, 2, 1<<attributeFilehandle, 7),
		slices.Concat(words(opSetclientid, 1, 2), xdr([]byte("id")), words(3), xdr([]byte("tcp")), xdr([]byte("address")), words(1)), words(opSetclientidConfirm, 1, 2, 3, 4),
		slices.Concat(words(opWrite), stateid, words(0, 0, 2), xdr([]byte("12345"))), slices.Concat(words(opReleaseLockowner, 1, 2), xdr([]byte("owner"))),
		slices.Concat(words(opTestStateid, 2), stateid, stateid), slices.Concat(words(opFreeStateid), stateid), words(opDestroyClientid, 1, 2),
		slices.Concat(words(opBindConnToSession), stateid, words(3, 0)), slices.Concat(words(opSecinfo), xdr([]byte("name"))),
		slices.Concat(words(opPutfh), xdr(append([]byte("forged"), signed...))),
		slices.Concat(words(opPutfh), xdr(signed)),
		words(42, 1, 2, 3), // EXCHANGE_ID
	}
	parts, q, err := s.call(callOf(calls...))
	if err != nil || q.xid != 7 || !q.handles {
		t.Fatalf("the call: %+v, %v", q, err)
	}
	// What the server is to get is the same but for handles.
	calls[1], calls[len(calls)-3], calls[len(calls)-2] = slices.Concat(words(opPutfh), xdr(handle)), words(opPutfh, 0), slices.Concat(words(opPutfh), xdr(handle))
	for i, c := range calls {
		for _, op := range []uint32{opReaddir, opGetattr} {
			if binary.BigEndian.Uint32(c) == op {
				calls[i] = bytes.Replace(c, words(1<<attributeFilehandle), words(0), 1)
				calls[i] = bytes.Replace(calls[i], words(1<<attributeFilehandle|1), words(1), 1)
			}
		}
	}
	if got, want := bytes.Join(parts, nil), callOf(calls...); !bytes.Equal(got, want) {
		t.Errorf("the server gets\n%q\nnot\n%q", got, want)
	}
	ok := func(op uint32, rest ...[]byte) []byte { return slices.Concat(words(op, 0), bytes.Join(rest, nil)) }
	results := [][]byte{
		ok(opSequence, make([]byte, 36)), ok(opPutfh), ok(opAccess, words(1, 2)), ok(opClose, stateid), ok(opCommit, words(1, 2)), ok(opCreate, change, words(1, 2)),
		ok(opGetattr, attributes), ok(opReadlink, xdr([]byte("to"))), ok(opLink, change), ok(opRename, change, change),
		ok(opOpen, stateid, change, words(4, 1, 2, delegateNone)), ok(opOpen, stateid, change, words(4, 0, delegateNoneExt, noneResource, 1)), ok(opOpen, stateid, change, words(4, 0, delegateNoneExt, 0)),
		ok(opOpen, stateid, change, words(4, 0, delegateRead), stateid, words(0, 1, 2, 3), xdr([]byte("who"))),
		ok(opOpen, stateid, change, words(4, 0, delegateWrite), stateid, words(0, 1, 2, 3, 1, 2, 3), xdr([]byte("who"))),
		ok(opRead, words(1), xdr([]byte("12345"))), ok(opReaddir, words(1, 2, 1, 3, 4), xdr([]byte("name")), attributes, words(1, 3, 5), xdr([]byte("x")), attributes, words(0, 1)),
		ok(opSecinfo, words(2, authSys, authGSS), xdr([]byte("oid")), words(1, 2)), ok(opSetattr, words(1, 2)), ok(opSetclientid, words(1, 2, 3, 4)), ok(opWrite, words(1, 2, 3, 4)),
		ok(opBindConnToSession, stateid, words(3, 0)), ok(opTestStateid, words(2, 0, 0)),
		ok(opGetfh, xdr(handle)), ok(opGetattr, attributes), ok(opGetfh, xdr(handle)), words(42, 0, 9, 9),
	}
	parts, err = s.reply(replyOf(results...), q)
	if err != nil {
		t.Fatal(err)
	}
	for i, r := range results {
		if binary.BigEndian.Uint32(r) == opGetfh {
			results[i] = ok(opGetfh, xdr(signed))
		}
	}
	if got, want := bytes.Join(parts, nil), replyOf(results...); !bytes.Equal(got, want) {
		t.Errorf("the client gets\n%q\nnot\n%q", got, want)
	}
	if s.open(signed) == nil || newSeal([]byte("other")).open(signed) != nil || s.open(handle) != nil || s.open(nil) != nil || s.open(s.mac(nil)) != nil {
		t.Error("it is not the authentic handle alone that is one")
	}
	for n := 1; n <= maxHandle; n++ {
		for _, zeros := range []bool{true, false} {
			handle := bytes.Repeat([]byte{7}, n)
			if zeros && n > macSize {
				clear(handle[n-macSize:])
			}
			sealed, err := s.close(handle)
			if !zeros && n > maxHandle-macSize {
				if err == nil {
					t.Errorf("a handle of %d bytes has room", n)
				}
				continue
			}
			if err != nil || len(sealed) > maxHandle || !bytes.Equal(s.open(sealed), handle) {
				t.Errorf("a handle of %d bytes: %x, %v", n, sealed, err)
				continue
			}
			for i := range sealed {
				sealed[i] ^= 1
				if s.open(sealed) != nil {
					t.Errorf("a handle of %d bytes is authentic with another byte %d", n, i)
				}
				sealed[i] ^= 1
			}
		}
	}
}

// operations is the place in a call where their number is; nil if it is no call of version 4.
func operations(b []byte) *cursor {
	if len(b) < 40 || !bytes.Equal(b[4:24], callOf()[4:24]) {
		return nil
	}
	c := &cursor{b: b}
	c.skip(6*4 + 4)
	c.opaque()
	c.skip(4)
	c.opaque()
	c.opaque()
	c.skip(4)
	return c
}

// Whatever a client says, the server hears of no handle but those that are authentic.
func FuzzCall(f *testing.F) {
	s := newSeal([]byte("key"))
	handle := []byte("a handle")
	signed := slices.Concat(handle, s.mac(handle))
	f.Add(callOf(slices.Concat(words(opPutfh), xdr(signed)), words(opGetattr, 1, 2), slices.Concat(words(opPutfh), xdr([]byte("forged"))), words(opGetfh)))
	f.Add(callOf(slices.Concat(words(opOpen, 1, 2, 3, 4, 5), xdr([]byte("owner")), words(1, 1, 1, 2), xdr([]byte("x")), words(0), xdr([]byte("name"))), words(opGetfh)))
	f.Fuzz(func(t *testing.T, record []byte) {
		if len(record) < 8 {
			return
		}
		parts, _, err := s.call(slices.Clone(record))
		if err != nil {
			return
		}
		got := bytes.Join(parts, nil)
		if len(got) > len(record) { // handles can become longer that have zeros in the place of the authentication, which those here have not
			t.Fatalf("%q has become longer: %q", record, got)
		}
		// The same walk over what has come of it, without an end before the last operation.
		c := operations(got)
		if c == nil {
			return
		}
		for n := c.number(); n > 0 && !c.bad; n-- {
			if op := c.number(); op != opPutfh {
				c.arguments(op)
			} else if h := c.opaque(); len(h) > 0 && !bytes.Contains(record, s.mac(h)) {
				t.Fatalf("of %q the server hears handle %q", record, h)
			}
		}
	})
}

// everywhere is a guide to whom all directories are a volume's root, with something hidden.
type everywhere struct{}

func (everywhere) inner(handle []byte) []byte { return handle }
func (everywhere) outer(handle []byte) []byte { return handle }
func (everywhere) comes(directory, string)    {}
func (everywhere) admits([]byte) bool         { return true }
func (everywhere) top() directory             { return directory{top: true} }
func (everywhere) at([]byte) directory {
	names := []string{"hidden", ".snapshots"}
	return directory{beyond: "dir of snapshots", hidden: names, inside: names}
}
func (e everywhere) child(directory, string) directory { return e.at(nil) }

// Whatever a client says, no name that is hidden is told the server, and each operation stays one.
func FuzzHidden(f *testing.F) {
	s := newSeal([]byte("key"))
	handle := []byte("a handle")
	put := slices.Concat(words(opPutfh), xdr(slices.Concat(handle, s.mac(handle))))
	named := func(op uint32, names ...string) []byte {
		b := words(op)
		for _, name := range names {
			b = append(b, xdr([]byte(name))...)
		}
		return b
	}
	s.guide = everywhere{}
	f.Add(callOf(put, named(opLookup, ".snapshots"), named(opLookup, "hidden"), words(opGetfh)))
	f.Add(callOf(put, words(opSavefh), put, named(opRename, "hidden", ".snapshots"), put, named(opLink, ".snapshots"), named(opRemove, "hidden")))
	f.Add(callOf(words(opPutrootfh), named(opLookup, "volume"), named(opLookup, ".snapshots"), slices.Concat(words(opReaddir, 0, 0, 0, 0, 9, 9, 1, 1))))
	f.Add(callOf(put, named(opLookup, "hidden\x00"), named(opLookup, ".snapshots\x00more")))
	f.Add(callOf(put, slices.Concat(words(opOpen, 1, 2, 3, 4, 5), xdr([]byte("owner")), words(1, 0, 0, 0, 0), xdr([]byte("hidden"))), put, slices.Concat(words(opCreate, 2), xdr([]byte(".snapshots")), words(0, 0))))
	f.Fuzz(func(t *testing.T, record []byte) {
		if len(record) < 8 {
			return
		}
		parts, _, err := s.call(slices.Clone(record))
		if err != nil {
			return
		}
		walked := func(b []byte) (n, last uint32, names []string) {
			c := operations(b)
			if c == nil {
				return 0, 0, nil
			}
			n = c.number()
			var here, saved bool // there is such a directory
			for i := n; i > 0 && !c.bad; i-- {
				last = c.number()
				if last == opPutfh {
					here = len(c.opaque()) > 0
					continue
				}
				c.arguments(last)
				for at, is := range map[int]bool{c.old: saved, c.named: here} {
					if name, _ := c.after(at); at != 0 && !c.bad && is { // as it is to the server
						names = append(names, name)
					}
				}
				switch last {
				case opPutrootfh, opPutpubfh:
					here = false // with nothing hidden
				case opLookup:
					here = true
				case opSavefh:
					saved = here
				case opRestorefh:
					here = saved
				case opCreate, opOpenattr, opOpen:
					here = false
				}
			}
			return n, last, names
		}
		n, last, _ := walked(record)
		got, gotLast, names := walked(bytes.Join(parts, nil))
		if n != got || last != gotLast && last != opPutfh {
			t.Fatalf("%q has %d operations, of which %d come, up to %d and %d", record, n, got, last, gotLast)
		}
		for _, name := range names {
			if name == "hidden" || name == ".snapshots" {
				t.Fatalf("of %q the server hears %q", record, names)
			}
		}
	})
}

// What a client says wrongly at the end of a call is not passed on as it is, with a name in it that nobody is to say, and a call is not endless.
func TestCallRefused(t *testing.T) {
	s := newSeal([]byte("key"))
	s.guide = everywhere{}
	for what, ops := range map[string][][]byte{
		"a name without its end":    {words(opLookup, 6, 0x68696464)},
		"an OPEN of another kind":   {slices.Concat(words(opOpen, 1, 2, 3, 4, 5), xdr([]byte("owner")), words(0, 7), xdr([]byte("hidden")))},
		"more operations than many": slices.Repeat([][]byte{words(opLookupp)}, maxOperations+1),
	} {
		if parts, _, err := s.call(callOf(ops...)); err == nil {
			t.Errorf("%s is passed on: %q", what, parts)
		}
	}
	if _, _, err := s.call(callOf(words(42, 6, 0x68696464))); err != nil {
		t.Errorf("an operation that is not known is not passed on at the end: %v", err)
	}
}

// A listing without what is hidden leads on: it is empty where it ends alone.
func TestListed(t *testing.T) {
	entry := func(cookie uint32, name string) []byte {
		return slices.Concat(words(1, 0, cookie), xdr([]byte(name)), words(1, 2), xdr([]byte("attr")))
	}
	list := func(end uint32, entries ...[]byte) []byte {
		return slices.Concat(words(opReaddir, 0, 1, 2), bytes.Join(entries, nil), words(0, end))
	}
	a, hidden, last := entry(1, "a"), entry(2, "hidden"), entry(3, "hidden")
	for what, c := range map[string]struct{ from, want []byte }{
		"others":                  {list(0, hidden, a, last), list(0, a)},
		"nothing else":            {list(0, hidden, last), list(0, entry(3, "."))},
		"nothing else, and ended": {list(1, hidden, last), list(1)},
		"nothing":                 {list(0), list(0)},
	} {
		first := slices.Concat(words(opReaddir, 0, 1, 2), entry(7, "b"), words(0, 1))
		q := question{others: []other{{i: 1, hidden: []string{"hidden"}}, {i: 2, hidden: []string{"hidden"}}}}
		parts, err := newSeal([]byte("key")).reply(replyOf(words(opPutfh, 0), first, c.from, words(opLookupp, 0)), q)
		if want := replyOf(words(opPutfh, 0), first, c.want, words(opLookupp, 0)); err != nil || !bytes.Equal(bytes.Join(parts, nil), want) {
			t.Errorf("with %s hidden the client gets\n%q, %v, not\n%q", what, parts, err, want)
		}
	}
}

func FuzzReply(f *testing.F) {
	s := newSeal([]byte("key"))
	f.Add(replyOf(words(opPutrootfh, 0), slices.Concat(words(opReaddir, 0, 1, 2, 1, 3, 4), xdr([]byte("hidden")), words(0, 0, 0, 1))))
	f.Add(replyOf(words(opPutfh, 0), slices.Concat(words(opGetfh, 0), xdr([]byte("a handle"))), words(opGetattr, 0, 0, 0)))
	f.Fuzz(func(t *testing.T, record []byte) {
		if len(record) < 8 {
			return
		}
		_, _ = s.reply(slices.Clone(record), question{})
		_, _ = s.reply(slices.Clone(record), question{others: []other{{i: 0, was: opPutfh}, {i: 1, hidden: []string{"hidden"}}}})
	})
}
