package nfs

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// Bounds of one record, which is one call or reply: data of the largest READ or WRITE, and what is around it.
const (
	maxData   = 1 << 20
	maxRecord = maxData + 4096
)

var errRecord = errors.New("no call that this server takes")

// readLength reads the header of a record (RFC 5531 §11). Records of several fragments, which no known client sends, are refused.
func readLength(r io.Reader) (int, error) {
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return 0, err
	}
	h := binary.BigEndian.Uint32(head[:])
	n := int(h &^ (1 << 31))
	if h>>31 == 0 || n > maxRecord {
		return 0, fmt.Errorf("%w: a record of %d bytes, the last: %t", errRecord, n, h>>31 == 1)
	}
	return n, nil
}

// seal fills in the header that was left free before a reply.
func seal(reply []byte) []byte {
	binary.BigEndian.PutUint32(reply, uint32(len(reply)-4)|1<<31)
	return reply
}

// A call as it came (RFC 5531 §9).
type call struct {
	xid                    uint32
	program, version, proc uint32
	flavor                 uint32
	user                   user
	args                   decoder
}

// A user is who a client says that its process is. Within a volume the client is believed: it is the machine that has the volume.
type user struct {
	uid, gid uint32
	groups   []uint32
}

// Of RFC 5531 §8.2, §9 and appendix A.
const (
	msgCall, msgReply          = 0, 1
	rpcVersion                 = 2
	accepted, denied           = 0, 1
	authNone, authSys          = 0, 1
	maxAuth, maxMachine        = 400, 255
	maxGroups                  = 16
	acceptSuccess              = 0
	acceptProgUnavail          = 1
	acceptProgMismatch         = 2
	acceptProcUnavail          = 3
	acceptGarbage              = 4
	rejectMismatch, rejectAuth = 0, 1
	authTooWeak                = 5
	authBadCred                = 1
)

// parseCall reads a call up to its arguments. Where it returns a reply instead, that is all there is to say; where an error, the
// connection can't be trusted to be RPC any more.
func parseCall(record []byte) (c call, reply []byte, err error) {
	d := decoder{b: record}
	c.xid = d.uint32()
	kind, rpcvers := d.uint32(), d.uint32()
	if d.bad || kind != msgCall {
		return c, nil, errRecord
	}
	if rpcvers != rpcVersion {
		e := head(c.xid, denied)
		e.uint32(rejectMismatch)
		e.uint32(rpcVersion)
		e.uint32(rpcVersion)
		return c, e.b, nil
	}
	c.program, c.version, c.proc = d.uint32(), d.uint32(), d.uint32()
	c.flavor = d.uint32()
	cred := decoder{b: d.opaque(maxAuth)}
	d.uint32()
	d.opaque(maxAuth)
	if d.bad {
		return c, nil, errRecord
	}
	if c.flavor == authSys {
		cred.uint32()
		cred.opaque(maxMachine)
		c.user.uid, c.user.gid = cred.uint32(), cred.uint32()
		n := cred.uint32()
		if n > maxGroups || cred.bad {
			return c, refuse(c.xid, authBadCred), nil
		}
		c.user.groups = make([]uint32, n)
		for i := range c.user.groups {
			c.user.groups[i] = cred.uint32()
		}
		// -1 is no user for the kernel, but "leave it as it is".
		if cred.bad || c.user.uid == ^uint32(0) || c.user.gid == ^uint32(0) {
			return c, refuse(c.xid, authBadCred), nil
		}
	}
	c.args = d
	return c, nil, nil
}

// head begins a reply, and leaves room for the record's header.
func head(xid, stat uint32) encoder {
	e := encoder{make([]byte, 4, 256)}
	e.uint32(xid)
	e.uint32(msgReply)
	e.uint32(stat)
	return e
}

// refuse is a reply to a call whose user is not accepted.
func refuse(xid, why uint32) []byte {
	e := head(xid, denied)
	e.uint32(rejectAuth)
	e.uint32(why)
	return e.b
}

// accept begins a reply to a call that was understood.
func accept(xid, stat uint32) encoder {
	e := head(xid, accepted)
	e.uint32(authNone)
	e.uint32(0)
	e.uint32(stat)
	return e
}
