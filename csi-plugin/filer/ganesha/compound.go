package ganesha

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"github.com/cradlestack/cradlestack/csi-plugin/filer/snapshots"
)

// A seal authenticates the file handles that NFS-Ganesha makes: clients see them with an HMAC-SHA-256's first 16 bytes behind. They have the number of the export in
// them, whose clients NFS-Ganesha knows, so that one which is authentic leads to what its client may see, or nowhere.
//
// It reads calls and replies of version 4 (RFC 7530 §16, RFC 8881 §18) as far as handles are in them: in the arguments of PUTFH and in the results of GETFH. As an
// attribute nobody is told one. What it can't read is refused, and never passed on.
type seal struct {
	key   []byte
	guide guide // nil for none
}

// A guide leads from volumes to their snapshots, which NFS-Ganesha serves elsewhere. Handles are as that has them, but for those of snapshots, which inner makes its own.
type guide interface {
	inner(handle []byte) []byte
	outer(handle []byte) []byte

	// beyond is the name in the server's root of what is snapshots.Dir in a directory, empty if that is an ordinary name there.
	beyond(directory []byte) string

	// enters and lists are before a name is looked up in a directory, and before that is listed.
	enters(directory []byte, name string)
	lists(directory []byte)
}

const (
	macSize   = 16
	maxHandle = 128 // RFC 8881 §3.2, NFS4_FHSIZE
)

func newSeal(key []byte) seal {
	sum := sha256.Sum256(append([]byte("handles of "), key...))
	return seal{key: sum[:]}
}

func (s seal) mac(handle []byte) []byte {
	h := hmac.New(sha256.New, s.key)
	h.Write(handle)
	return h.Sum(nil)[:macSize]
}

// close makes the handle that a client sees. One that has no room for more has zeros at its end, as those of directories on the way to exports have, which are left out.
func (s seal) close(handle []byte) ([]byte, error) {
	sum := s.mac(handle)
	if len(handle)+macSize > maxHandle {
		var short bool
		if handle, short = bytes.CutSuffix(handle, make([]byte, macSize)); !short {
			return nil, errHandle
		}
	}
	return slices.Concat(handle, sum), nil
}

// open returns what a client's handle is to NFS-Ganesha, nil of one that was made up.
func (s seal) open(handle []byte) []byte {
	n := len(handle) - macSize
	if n <= 0 || len(handle) > maxHandle {
		return nil
	}
	own, sum := handle[:n], handle[n:]
	if hmac.Equal(s.mac(own), sum) {
		return own
	}
	if long := slices.Concat(own, make([]byte, macSize)); len(long)+macSize > maxHandle && hmac.Equal(s.mac(long), sum) {
		return long
	}
	return nil
}

var (
	errCompound = errors.New("it can't be read")
	errHandle   = errors.New("a file handle has no room for its authentication")
)

// Operations of NFSv4 (RFC 7530 §16, RFC 8881 §18). Those that are not listed can be at the end of a call alone.
const (
	opAccess, opClose, opCommit, opCreate, opDelegpurge, opDelegreturn, opGetattr, opGetfh, opLink      = 3, 4, 5, 6, 7, 8, 9, 10, 11
	opLock, opLockt, opLocku, opLookup, opLookupp, opNverify, opOpen, opOpenattr, opOpenConfirm         = 12, 13, 14, 15, 16, 17, 18, 19, 20
	opOpenDowngrade, opPutfh, opPutpubfh, opPutrootfh, opRead, opReaddir, opReadlink, opRemove          = 21, 22, 23, 24, 25, 26, 27, 28
	opRename, opRenew, opRestorefh, opSavefh, opSecinfo, opSetattr, opSetclientid, opSetclientidConfirm = 29, 30, 31, 32, 33, 34, 35, 36
	opVerify, opWrite, opReleaseLockowner, opBindConnToSession, opDestroySession, opFreeStateid         = 37, 38, 39, 41, 44, 45
	opSecinfoNoName, opSequence, opTestStateid, opDestroyClientid, opReclaimComplete                    = 52, 53, 55, 57, 58
)

// Of RPC, and of the operations' arguments and results.
const (
	programNFS, version4, procCompound = 100003, 4, 1
	msgCall, msgReply                  = 0, 1
	authNone, authSys, authGSS         = 0, 1, 6

	sizeStateid, sizeSessionid, sizeVerifier, sizeClientid = 16, 16, 8, 8
	sizeChange                                             = 20

	maxWords, attributeFilehandle = 3, 19

	typeBlock, typeCharacter, typeLink = 3, 4, 5

	claimNull, claimPrevious, claimFH                                  = 0, 1, 4
	createUnchecked, createGuarded, createExclusive, createExclusive41 = 0, 1, 2, 3

	delegateNone, delegateRead, delegateWrite, delegateNoneExt = 0, 1, 2, 3
	noneContention, noneResource                               = 1, 2
)

// A cursor is a place in a record, which is XDR (RFC 4506). bad says that it has gone beyond its end.
type cursor struct {
	b     []byte
	at    int
	bad   bool
	named int // where the name is of what is looked up, opened or made, since that was last 0
}

// name goes over one.
func (c *cursor) name() {
	c.named = c.at
	c.opaque()
}

func (c *cursor) skip(n int) {
	if n < 0 || n > len(c.b)-c.at {
		c.bad, c.at = true, len(c.b)
		return
	}
	c.at += n
}

func (c *cursor) number() uint32 {
	at := c.at
	if c.skip(4); c.bad {
		return 0
	}
	return binary.BigEndian.Uint32(c.b[at:])
}

func (c *cursor) opaque() []byte {
	n := int64(c.number())
	at := c.at
	if n > int64(len(c.b)) {
		c.bad, c.at = true, len(c.b)
	}
	if c.skip(int(n+3) &^ 3); c.bad {
		return nil
	}
	return c.b[at : at+int(n)]
}

// bitmap returns its first word. There are no attributes that one of more words could be about.
func (c *cursor) bitmap() []byte {
	n := c.number()
	at := c.at
	if n > maxWords {
		c.bad = true
		return nil
	}
	if c.skip(int(4 * n)); c.bad || n == 0 {
		return nil
	}
	return c.b[at : at+4]
}

func (c *cursor) attributes() {
	c.bitmap()
	c.opaque()
}

// asked is a bitmap of attributes that a client wants. It is told no file handles by it.
func (c *cursor) asked() {
	if word := c.bitmap(); word != nil {
		binary.BigEndian.PutUint32(word, binary.BigEndian.Uint32(word)&^(1<<attributeFilehandle))
	}
}

// arguments goes over those of an operation. What is not known can't be gone over.
func (c *cursor) arguments(op uint32) {
	switch op {
	case opGetfh, opLookupp, opPutpubfh, opPutrootfh, opReadlink, opRestorefh, opSavefh:
	case opAccess, opOpenattr, opSecinfoNoName, opReclaimComplete:
		c.skip(4)
	case opDelegpurge, opRenew, opDestroyClientid:
		c.skip(sizeClientid)
	case opDelegreturn, opFreeStateid, opDestroySession:
		c.skip(sizeStateid)
	case opClose, opOpenConfirm:
		c.skip(4 + sizeStateid)
	case opCommit:
		c.skip(8 + 4)
	case opCreate:
		switch c.number() {
		case typeLink:
			c.opaque()
		case typeBlock, typeCharacter:
			c.skip(8)
		}
		c.name()
		c.attributes()
	case opGetattr:
		c.asked()
	case opLink, opLookup:
		c.name()
	case opPutfh, opRemove, opSecinfo:
		c.opaque()
	case opLock:
		c.skip(4 + 4 + 8 + 8)
		if c.number() != 0 { // by an owner that is new
			c.skip(4 + sizeStateid + 4 + sizeClientid)
			c.opaque()
		} else {
			c.skip(sizeStateid + 4)
		}
	case opLockt:
		c.skip(4 + 8 + 8 + sizeClientid)
		c.opaque()
	case opLocku:
		c.skip(4 + 4 + sizeStateid + 8 + 8)
	case opNverify, opVerify:
		c.attributes()
	case opOpen:
		c.open()
	case opOpenDowngrade:
		c.skip(sizeStateid + 4 + 4 + 4)
	case opRead:
		c.skip(sizeStateid + 8 + 4)
	case opReaddir:
		c.skip(8 + sizeVerifier + 4 + 4)
		c.asked()
	case opRename:
		c.opaque()
		c.opaque()
	case opSetattr:
		c.skip(sizeStateid)
		c.attributes()
	case opSetclientid:
		c.skip(sizeVerifier)
		c.opaque()
		c.skip(4)
		c.opaque()
		c.opaque()
		c.skip(4)
	case opSetclientidConfirm:
		c.skip(sizeClientid + sizeVerifier)
	case opWrite:
		c.skip(sizeStateid + 8 + 4)
		c.opaque()
	case opReleaseLockowner:
		c.skip(sizeClientid)
		c.opaque()
	case opBindConnToSession:
		c.skip(sizeSessionid + 4 + 4)
	case opSequence:
		c.skip(sizeSessionid + 4*4)
	case opTestStateid:
		if n := int64(c.number()); n > int64(len(c.b)) {
			c.bad = true
		} else {
			c.skip(int(n) * sizeStateid)
		}
	default:
		c.bad = true
	}
}

// open goes over OPEN's arguments.
func (c *cursor) open() {
	c.skip(4 + 4 + 4 + sizeClientid)
	c.opaque()
	if c.number() == 1 { // it may be made
		switch c.number() {
		case createUnchecked, createGuarded:
			c.attributes()
		case createExclusive:
			c.skip(sizeVerifier)
		case createExclusive41:
			c.skip(sizeVerifier)
			c.attributes()
		default:
			c.bad = true
		}
	}
	switch c.number() { // no client has a delegation
	case claimNull:
		c.name()
	case claimPrevious:
		c.skip(4)
	case claimFH:
	default:
		c.bad = true
	}
}

// results goes over those of an operation that was done, after its status.
func (c *cursor) results(op uint32) {
	switch op {
	case opDelegpurge, opDelegreturn, opLockt, opLookup, opLookupp, opNverify, opOpenattr, opPutfh, opPutpubfh, opPutrootfh, opRenew, opRestorefh, opSavefh,
		opSetclientidConfirm, opVerify, opReleaseLockowner, opDestroySession, opFreeStateid, opDestroyClientid, opReclaimComplete:
	case opAccess:
		c.skip(4 + 4)
	case opClose, opLock, opLocku, opOpenConfirm, opOpenDowngrade:
		c.skip(sizeStateid)
	case opCommit:
		c.skip(sizeVerifier)
	case opCreate:
		c.skip(sizeChange)
		c.bitmap()
	case opGetattr:
		c.attributes()
	case opGetfh, opReadlink:
		c.opaque()
	case opLink, opRemove:
		c.skip(sizeChange)
	case opOpen:
		c.opened()
	case opRead:
		c.skip(4)
		c.opaque()
	case opReaddir:
		c.skip(sizeVerifier)
		for c.number() != 0 {
			c.skip(8)
			c.opaque()
			c.attributes()
		}
		c.skip(4)
	case opRename:
		c.skip(2 * sizeChange)
	case opSecinfo, opSecinfoNoName:
		for n := c.number(); n > 0 && !c.bad; n-- {
			if c.number() == authGSS {
				c.opaque()
				c.skip(4 + 4)
			}
		}
	case opSetattr:
		c.bitmap()
	case opSetclientid:
		c.skip(sizeClientid + sizeVerifier)
	case opWrite:
		c.skip(4 + 4 + sizeVerifier)
	case opBindConnToSession:
		c.skip(sizeSessionid + 4 + 4)
	case opSequence:
		c.skip(sizeSessionid + 5*4)
	case opTestStateid:
		for n := c.number(); n > 0 && !c.bad; n-- {
			c.skip(4)
		}
	default:
		c.bad = true
	}
}

// opened goes over OPEN's results.
func (c *cursor) opened() {
	c.skip(sizeStateid + sizeChange + 4)
	c.bitmap()
	switch c.number() {
	case delegateNone:
	case delegateRead:
		c.skip(sizeStateid + 4 + 4 + 4 + 4)
		c.opaque()
	case delegateWrite:
		c.skip(sizeStateid + 4 + 4 + 8 + 4 + 4 + 4)
		c.opaque()
	case delegateNoneExt:
		if why := c.number(); why == noneContention || why == noneResource {
			c.skip(4)
		}
	default:
		c.bad = true
	}
}

// A question is what has to be known of a call for its reply.
type question struct {
	xid     uint32
	handles bool  // it asks for some
	roots   []int // operations that were a PUTFH, and were made a PUTROOTFH
}

// call makes a client's call one for NFS-Ganesha: what is to be sent, in parts, most of them the record's, which it changes. A handle that was made up becomes one of no bytes.
func (s seal) call(record []byte) (parts [][]byte, q question, err error) {
	c := &cursor{b: record}
	q.xid = c.number()
	switch c.number() {
	case msgCall:
	case msgReply:
		return [][]byte{record}, q, nil // to a callback
	default:
		return nil, q, fmt.Errorf("neither a call nor a reply: %w", errCompound)
	}
	rpc, program, version, procedure := c.number(), c.number(), c.number(), c.number()
	flavor := c.number()
	c.opaque()
	c.skip(4)
	c.opaque()
	switch {
	case c.bad || rpc != 2:
		return nil, q, fmt.Errorf("a call: %w", errCompound)
	case program != programNFS || version != version4 || procedure != procCompound:
		return [][]byte{record}, q, nil // which NFS-Ganesha has not, but for one that does nothing
	case flavor != authNone && flavor != authSys:
		return nil, q, fmt.Errorf("a call by a client of flavor %d: %w", flavor, errCompound)
	}
	c.opaque()
	c.skip(4) // minor version
	from, all := 0, int(c.number())
	for n := all; n > 0; n-- {
		op := c.number()
		switch {
		case op == opPutfh:
			at := c.at
			handle := c.opaque()
			if c.bad {
				break
			}
			own := s.open(handle)
			if own != nil && s.guide != nil && n > 1 {
				if next, dir := s.leads(*c, own); dir != "" {
					binary.BigEndian.PutUint32(record[at-4:], opPutrootfh)
					q.roots = append(q.roots, all-n)
					parts = append(parts, record[from:at], record[c.at:next.named], encode([]byte(dir)))
					from, c = next.after(next.named), &next
					n--
					break
				}
			}
			if own != nil && s.guide != nil {
				own = s.guide.inner(own)
			}
			parts, from = append(parts, record[from:at], encode(own)), c.at
		case n == 1:
			// Nothing comes after it, so whatever it is, handles are none of it. Those that are known may ask for some as an attribute.
			last := *c
			last.arguments(op)
			q.handles = q.handles || op == opGetfh
			return append(parts, record[from:]), q, nil
		default:
			c.arguments(op)
			q.handles = q.handles || op == opGetfh
		}
		if c.bad {
			return nil, q, fmt.Errorf("a call with operation %d: %w", op, errCompound)
		}
	}
	return append(parts, record[from:]), q, nil
}

// leads goes over the operation that comes next, in the directory of a handle. If it is about the directory of snapshots, that has another name in the server's root.
func (s seal) leads(next cursor, directory []byte) (_ cursor, dir string) {
	op := next.number()
	next.named = 0
	next.arguments(op)
	if next.bad {
		return next, ""
	}
	if op == opReaddir {
		s.guide.lists(directory)
	}
	if next.named == 0 {
		return next, ""
	}
	name := string((&cursor{b: next.b, at: next.named}).opaque())
	if name == snapshots.Dir {
		return next, s.guide.beyond(directory)
	}
	if op == opLookup || op == opOpen {
		s.guide.enters(directory, name)
	}
	return next, ""
}

// after is where what is opaque at a place ends.
func (c *cursor) after(at int) int {
	o := cursor{b: c.b, at: at}
	o.opaque()
	return o.at
}

// reply makes NFS-Ganesha's reply to a question one for the client, likewise.
func (s seal) reply(record []byte, q question) (parts [][]byte, err error) {
	c := &cursor{b: record}
	c.skip(4)
	if c.number() != msgReply || c.number() != 0 { // not accepted
		return [][]byte{record}, nil
	}
	c.skip(4)
	c.opaque()
	if c.number() != 0 {
		return [][]byte{record}, nil
	}
	c.skip(4)
	c.opaque()
	from, all := 0, int(c.number())
	for n := all; n > 0; n-- {
		op := c.number()
		if !c.bad && op == opPutrootfh && slices.Contains(q.roots, all-n) {
			binary.BigEndian.PutUint32(record[c.at-4:], opPutfh)
		}
		if status := c.number(); status != 0 && !c.bad {
			break // nothing comes after it
		}
		if op != opGetfh {
			if n == 1 {
				break
			}
			if c.results(op); c.bad {
				return nil, fmt.Errorf("a reply to operation %d: %w", op, errCompound)
			}
			continue
		}
		at := c.at
		handle := c.opaque()
		if c.bad {
			return nil, fmt.Errorf("a reply with a file handle: %w", errCompound)
		}
		if s.guide != nil {
			handle = s.guide.outer(handle)
		}
		sealed, err := s.close(handle)
		if err != nil {
			return nil, err
		}
		parts, from = append(parts, record[from:at], encode(sealed)), c.at
	}
	if c.bad {
		return nil, fmt.Errorf("a reply: %w", errCompound)
	}
	return append(parts, record[from:]), nil
}

// encode writes a handle.
func encode(handle []byte) []byte {
	b := append(binary.BigEndian.AppendUint32(nil, uint32(len(handle))), handle...)
	return append(b, make([]byte, -len(handle)&3)...)
}
