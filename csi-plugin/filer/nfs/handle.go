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
// The kernel's handle outlasts restarts and, as inode numbers and generations are the file system's, another host that serves it. It would
// open any file of the file system, which may be the host's: hence the HMAC, by a key of the export that is derived from the server's.
const (
	handleVersion = 1
	maxHandle     = 64 // RFC 1813 §2.4, NFS3_FHSIZE
	tagSize       = 8
	macSize       = 16
	tagAt         = 2
	kernelAt      = tagAt + tagSize
	maxKernel     = maxHandle - kernelAt - macSize
)

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

// seal makes the handle for what the kernel calls so; ok is false for one that has no room.
func (s sealer) seal(kind int32, kernel []byte) (handle []byte, ok bool) {
	if kind < 0 || kind > 255 || len(kernel) > maxKernel {
		return nil, false
	}
	b := make([]byte, 0, maxHandle)
	b = append(b, handleVersion, byte(kind))
	b = append(b, s.tag[:]...)
	b = append(b, kernel...)
	return append(b, mac(s.key, b)[:macSize]...), true
}

// tagOf says which export a handle claims to be of.
func tagOf(handle []byte) (t tag, ok bool) {
	if len(handle) < kernelAt+macSize || len(handle) > maxHandle || handle[0] != handleVersion {
		return t, false
	}
	copy(t[:], handle[tagAt:])
	return t, true
}

// open returns the kernel's handle in one that this sealer has made.
func (s sealer) open(handle []byte) (kind int32, kernel []byte, ok bool) {
	body, sum := handle[:len(handle)-macSize], handle[len(handle)-macSize:]
	if !hmac.Equal(mac(s.key, body)[:macSize], sum) {
		return 0, nil, false
	}
	return int32(body[1]), body[kernelAt:], true
}
