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

// A guide knows where names lead that NFS-Ganesha has otherwise: to snapshots, which it serves elsewhere, and nowhere, where files are hidden.
type guide interface {
	// inner and outer are what NFS-Ganesha's handle is from a client's, and to a client. They may change it.
	inner(handle []byte) []byte
	outer(handle []byte) []byte

	// admits says whether a handle is of an export that is for this client.
	admits(handle []byte) bool

	// top is the server's root, at the directory that a handle is of, and child the one that a name in a directory leads to, as far as it matters which it is.
	top() directory
	at(handle []byte) directory
	child(d directory, name string) directory

	// comes is before a client looks a name up in a directory, or lists it, with no name.
	comes(d directory, name string)
}

// A directory is one that the guide knows.
type directory struct {
	top    bool     // it is the server's root
	above  bool     // it can be
	shelf  *shelf   // it is the directory of these snapshots; nil for none
	beyond string   // snapshots.Dir in it is this in the server's root; empty if it is an ordinary name
	hidden []string // are in it, and nobody is to know
	inside []string // are in the root of the export that it is in
}

// parent is the one above, as far as that can be known: names that are hidden in the export's root, or in the server's, are none in it.
func (d directory) parent(top directory) directory {
	return directory{above: true, hidden: slices.Concat(d.inside, top.hidden), inside: d.inside}
}

// other is another one in the same export.
func (d directory) other() directory { return directory{inside: d.inside} }

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

	attributeFilehandle = 19
	maxOperations       = 100 // which are NFS-Ganesha's

	typeBlock, typeCharacter, typeLink = 3, 4, 5

	claimNull, claimPrevious, claimDelegateCur, claimDelegatePrev      = 0, 1, 2, 3
	claimFH, claimDelegCurFH, claimDelegPrevFH                         = 4, 5, 6
	createUnchecked, createGuarded, createExclusive, createExclusive41 = 0, 1, 2, 3

	delegateNone, delegateRead, delegateWrite, delegateNoneExt = 0, 1, 2, 3
	noneContention, noneResource                               = 1, 2
)

// A cursor is a place in a record, which is XDR (RFC 4506). bad says that it has gone beyond its end.
type cursor struct {
	b   []byte
	at  int
	bad bool

	// Of the operation that was gone over last:
	old, named int  // where names are in the saved directory, and in the current one; 0 for none
	makes      bool // what has the latter name
	unknown    bool
}

// name goes over one.
func (c *cursor) name(at *int) {
	*at = c.at
	c.opaque()
}

// after is where the name ends that is at a place. To NFS-Ganesha it is what comes before a zero byte.
func (c *cursor) after(at int) (name string, end int) {
	o := cursor{b: c.b, at: at}
	before, _, _ := bytes.Cut(o.opaque(), []byte{0})
	return string(before), o.at
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

// bitmap returns its first word.
func (c *cursor) bitmap() []byte {
	n := int64(c.number())
	at := c.at
	if n > int64(len(c.b)) {
		c.bad, c.at = true, len(c.b)
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
	c.old, c.named, c.makes = 0, 0, op == opCreate || op == opLink || op == opRename
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
		c.name(&c.named)
		c.attributes()
	case opGetattr:
		c.asked()
	case opPutfh:
		c.opaque()
	case opLink, opLookup, opRemove, opSecinfo:
		c.name(&c.named)
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
		c.name(&c.old)
		c.name(&c.named)
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
		c.bad, c.unknown = true, true
	}
}

// open goes over OPEN's arguments.
func (c *cursor) open() {
	c.skip(4 + 4 + 4 + sizeClientid)
	c.opaque()
	if c.number() == 1 { // it may be made
		c.makes = true
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
	switch c.number() {
	case claimNull, claimDelegatePrev:
		c.name(&c.named)
	case claimDelegateCur:
		c.skip(sizeStateid)
		c.name(&c.named)
	case claimPrevious:
		c.skip(4)
	case claimDelegCurFH:
		c.skip(sizeStateid)
	case claimFH, claimDelegPrevFH:
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
	handles bool // it asks for some
	shown   bool // it has one of an export that is for the client
	others  []other
}

// other is an operation, by its number in the call, that NFS-Ganesha was not asked as the client has, or whose result is not all for it.
type other struct {
	i      int
	was    uint32   // what was made PUTROOTFH; 0 for nothing
	hidden []string // what the directory has that is listed
}

func (q question) changed() bool { return q.handles || len(q.others) > 0 }

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
	w := walk{seal: s, cursor: c, q: &q}
	all := int(c.number())
	if all > maxOperations {
		return nil, q, fmt.Errorf("a call with %d operations: %w", all, errCompound)
	}
	for ; w.i < all; w.i++ {
		op := c.number()
		if op == opPutfh {
			w.handle()
		} else if c.arguments(op); c.unknown && w.i == all-1 {
			// Nothing comes after it, so whatever it is, neither handles nor names are part of it.
			break
		} else if !c.bad {
			w.operation(op)
		}
		q.handles = q.handles || op == opGetfh
		if c.bad {
			return nil, q, fmt.Errorf("a call with operation %d: %w", op, errCompound)
		}
	}
	return append(w.parts, record[w.from:]), q, nil
}

// A walk goes over the operations of a call.
type walk struct {
	seal seal
	*cursor
	q *question

	i     int      // of the operation
	parts [][]byte // what is sent
	from  int      // what comes after them begins here

	here, saved directory // the current and the saved one, as far as the guide knows
	way         way
}

// A way is the operation that has led to the current directory, if it was the last one: what is to be sent is what was to be sent before it, and it.
type way struct {
	op, end int // where it begins and ends; 0 for none
	parts   int
	from    int
}

// handle is PUTFH, whose handle becomes NFS-Ganesha's.
func (w *walk) handle() {
	w.way = way{op: w.at - 4, parts: len(w.parts), from: w.from}
	at := w.at
	own := w.seal.open(w.opaque())
	if w.bad {
		return
	}
	w.way.end = w.at
	w.here = directory{}
	w.q.shown = w.q.shown || own != nil && (w.seal.guide == nil || w.seal.guide.admits(own))
	if w.seal.guide != nil && own != nil {
		w.here = w.seal.guide.at(own)
		own = w.seal.guide.inner(own)
	}
	w.parts, w.from = append(w.parts, w.b[w.from:at], encode(own)), w.at
}

// Names that are told NFS-Ganesha for those that nobody is to know: one that nobody can make, and one that is not there.
var (
	noName  = []byte(".")
	strange = bytes.Repeat([]byte{0x7f}, 64)
)

// operation is one that was gone over.
func (w *walk) operation(op uint32) {
	if w.seal.guide == nil {
		return
	}
	led := w.way
	w.way = way{}
	if w.old != 0 && w.hides(w.saved, w.old) {
		w.rename(w.old, strange)
	}
	if w.named != 0 {
		name, _ := w.after(w.named)
		switch {
		case name == snapshots.Dir && w.here.beyond != "" && led.op != 0 && op != opRename && op != opRemove:
			w.seal.guide.comes(w.here, name)
			dir := w.here.beyond
			w.q.others = append(w.q.others, other{i: w.i - 1, was: binary.BigEndian.Uint32(w.b[led.op:])})
			binary.BigEndian.PutUint32(w.b[led.op:], opPutrootfh)
			w.parts, w.from = append(w.parts[:led.parts], w.b[led.from:led.op+4]), led.end
			w.rename(w.named, []byte(dir))
			if op == opLookup {
				w.here = w.seal.guide.child(w.seal.guide.top(), dir)
				return
			}
		case w.hides(w.here, w.named) && w.makes:
			w.rename(w.named, noName)
		case w.hides(w.here, w.named):
			w.rename(w.named, strange)
		}
	}
	switch op {
	case opReaddir:
		w.seal.guide.comes(w.here, "")
		if len(w.here.hidden) > 0 {
			w.q.others = append(w.q.others, other{i: w.i, hidden: w.here.hidden})
		}
	case opPutrootfh, opPutpubfh:
		w.here = w.seal.guide.top()
	case opSavefh:
		w.saved = w.here
	case opRestorefh:
		w.here = w.saved
	case opLookup, opOpen:
		name, _ := w.after(w.named)
		if w.named == 0 {
			name = ""
		} else {
			w.seal.guide.comes(w.here, name)
		}
		w.here = w.seal.guide.child(w.here, name)
		if op == opLookup && w.here.beyond != "" && w.from < w.named { // by the name that the client has said
			w.way = way{op: w.named - 4, end: w.at, parts: len(w.parts), from: w.from}
		}
	case opLookupp:
		w.here = w.here.parent(w.seal.guide.top())
	case opCreate, opOpenattr:
		w.here = w.here.other()
	}
}

// hides says whether the name at a place is one that is hidden in a directory.
func (w *walk) hides(d directory, at int) bool {
	name, _ := w.after(at)
	return slices.Contains(d.hidden, name)
}

// rename has the name at a place be another one.
func (w *walk) rename(at int, name []byte) {
	_, end := w.after(at)
	w.parts, w.from = append(w.parts, w.b[w.from:at], encode(name)), end
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
	for i := range all {
		op := c.number()
		var changed other
		if at := slices.IndexFunc(q.others, func(o other) bool { return o.i == i }); at >= 0 && !c.bad {
			if changed = q.others[at]; op == opPutrootfh {
				binary.BigEndian.PutUint32(record[c.at-4:], changed.was)
			}
		}
		if status := c.number(); status != 0 && !c.bad {
			break // nothing comes after it
		}
		if op == opReaddir && len(changed.hidden) > 0 {
			parts, from = c.listed(parts, from, changed.hidden)
			continue
		}
		if op != opGetfh {
			if i == all-1 {
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

// listed goes over READDIR's results, and leaves names out.
func (c *cursor) listed(parts [][]byte, from int, hidden []string) (_ [][]byte, at int) {
	c.skip(sizeVerifier)
	before, start, first := len(parts), from, c.at
	shows := false
	var last, named, after int // the last that is left out: where it, its name, and what comes after that begin
	for {
		entry := c.at
		if c.number() == 0 || c.bad {
			break
		}
		c.skip(8)
		at := c.at
		name := string(c.opaque())
		end := c.at
		c.attributes()
		if !slices.Contains(hidden, name) {
			shows = true
			continue
		}
		last, named, after = entry, at, end
		parts, from = append(parts, c.b[from:entry]), c.at
	}
	// Clients go on behind what was last: with nothing in a list that is not the last one, they would ask for it for ever.
	if more := c.number() == 0; more && !shows && !c.bad && len(parts) > before {
		parts, from = append(parts[:before], c.b[start:first], c.b[last:named], encode(noName)), after
	}
	return parts, from
}

// encode writes what is opaque: a handle, or a name.
func encode(b []byte) []byte {
	all := append(binary.BigEndian.AppendUint32(nil, uint32(len(b))), b...)
	return append(all, make([]byte, -len(b)&3)...)
}
