package nfs

import (
	"crypto/hmac"
	"crypto/sha256"
)

// KeySize of the key that file handles are authenticated with.
const KeySize = 32

// A file handle is
//
//	version 1 │ type 1 │ export 8 │ the kernel's own handle │ HMAC-SHA-256 over all that, its first 16 bytes
//
// and one of a snapshot
//
//	version 2 │ type 1 │ export 8 │ snapshot 8 │ the kernel's own handle │ HMAC, as above
//
// The kernel's handle outlasts restarts and, as inode numbers and generations are the file system's, another host that serves it. It would
// open any file of the file system, which may be the host's: hence the HMAC, by a key of the export that is derived from the server's.
const (
	maxHandle = 64 // RFC 1813 §2.4, NFS3_FHSIZE
	tagSize   = 8
	macSize   = 16
	tagAt     = 2
	afterTag  = tagAt + tagSize
)

// Versions of handles.
const (
	ofVolume   = 1
	ofSnapshot = 2
)

// A reference is what a handle leads to.
type reference struct {
	snapshot snapshotID // zero for the volume itself
	kind     int32
	kernel   []byte // of the directory of all snapshots, nothing
}

type tag [tagSize]byte

// A sealer makes and opens the handles of one export.
type sealer struct {
	tag tag
	key []byte
}

func newSealer(key []byte, path string) sealer {
	s := sealer{key: mac(key, []byte("handles of "), []byte(path))}
	copy(s.tag[:], mac(key, []byte("tag of "), []byte(path)))
	return s
}

func mac(key []byte, parts ...[]byte) []byte {
	h := hmac.New(sha256.New, key)
	for _, p := range parts {
		h.Write(p)
	}
	return h.Sum(nil)
}

// seal makes the handle that leads to something; ok is false for one that has no room.
func (s sealer) seal(r reference) (handle []byte, ok bool) {
	if r.kind < 0 || r.kind > 255 {
		return nil, false
	}
	b := make([]byte, 0, 2*maxHandle)
	b = append(b, ofVolume, byte(r.kind))
	b = append(b, s.tag[:]...)
	if r.snapshot != (snapshotID{}) {
		b[0] = ofSnapshot
		b = append(b, r.snapshot[:]...)
	}
	b = append(b, r.kernel...)
	b = append(b, mac(s.key, b)[:macSize]...)
	return b, len(b) <= maxHandle
}

// tagOf says which export a handle claims to be of.
func tagOf(handle []byte) (t tag, ok bool) {
	if len(handle) < afterTag+macSize || len(handle) > maxHandle {
		return t, false
	}
	switch {
	case handle[0] == ofVolume:
	case handle[0] == ofSnapshot && len(handle) >= afterTag+len(snapshotID{})+macSize:
	default:
		return t, false
	}
	copy(t[:], handle[tagAt:])
	return t, true
}

// open returns what a handle leads to that this sealer has made, and that tagOf has looked at.
func (s sealer) open(handle []byte) (r reference, ok bool) {
	body, sum := handle[:len(handle)-macSize], handle[len(handle)-macSize:]
	if !hmac.Equal(mac(s.key, body)[:macSize], sum) {
		return r, false
	}
	r.kind, r.kernel = int32(body[1]), body[afterTag:]
	if body[0] == ofSnapshot {
		r.kernel = r.kernel[copy(r.snapshot[:], r.kernel):]
	}
	return r, true
}
