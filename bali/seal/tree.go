package seal

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"hash"
)

// Tree digests what is inside an image, apart from how it is compressed: the
// SHA-256 of a listing with one line per entry, where a file stands for its
// fs-verity digest. It is signed together with the payload's digest, so an
// unpacked copy can be checked against the signature again, file by file, and
// at no cost where the kernel keeps fs-verity digests.
type Tree struct{ hash hash.Hash }

const treeHead = "bali tree v1\n"

// NewTree starts a listing.
func NewTree() *Tree {
	t := &Tree{hash: sha256.New()}
	t.hash.Write([]byte(treeHead))
	return t
}

// Add appends an entry; verity is the digest of a File's content, else ignored.
func (t *Tree) Add(e *Entry, verity [32]byte) {
	t.hash.Write([]byte(e.line(hex.EncodeToString(verity[:]))))
}

// Sum is the digest of all entries so far.
func (t *Tree) Sum() (d [32]byte) {
	t.hash.Sum(d[:0])
	return d
}

const (
	verityBlock = 4096
)

// Verity computes the fs-verity digest of what is written to it: SHA-256,
// blocks of 4096 bytes, no salt
// (https://docs.kernel.org/filesystems/fsverity.html#fs-verity-descriptor).
type Verity struct {
	size   uint64
	block  []byte   // the data block that is being filled
	levels [][]byte // hash blocks that are being filled, leaves first
}

// Reset makes it ready for another file.
func (v *Verity) Reset() {
	v.size, v.block = 0, v.block[:0]
	for i := range v.levels {
		v.levels[i] = v.levels[i][:0]
	}
}

// Write never fails.
func (v *Verity) Write(p []byte) (int, error) {
	n := len(p)
	v.size += uint64(n)
	if len(v.block) > 0 {
		k := min(verityBlock-len(v.block), len(p))
		v.block = append(v.block, p[:k]...)
		p = p[k:]
		if len(v.block) == verityBlock && len(p) > 0 {
			v.push(0, sha256.Sum256(v.block))
			v.block = v.block[:0]
		}
	}
	// A full block stays until more follows: the last block is the one that
	// may be the root.
	for len(p) > verityBlock {
		v.push(0, sha256.Sum256(p[:verityBlock]))
		p = p[verityBlock:]
	}
	if len(p) > 0 {
		v.block = append(v.block, p...)
	}
	return n, nil
}

func (v *Verity) push(level int, h [32]byte) {
	if level == len(v.levels) {
		v.levels = append(v.levels, make([]byte, 0, verityBlock))
	}
	if len(v.levels[level]) == verityBlock {
		full := sha256.Sum256(v.levels[level])
		v.levels[level] = v.levels[level][:0]
		v.push(level+1, full)
	}
	v.levels[level] = append(v.levels[level], h[:]...)
}

// Sum ends the file and gives its digest. Reset must follow before more is
// written.
func (v *Verity) Sum() [32]byte {
	var root [32]byte
	if v.size > 0 {
		root = hashPadded(v.block)
		if v.size > verityBlock {
			v.push(0, root)
			root = v.fold()
		}
	}
	// struct fsverity_descriptor
	var d [256]byte
	d[0], d[1], d[2] = 1, 1, 12 // version, FS_VERITY_HASH_ALG_SHA256, log2 of the block size
	binary.LittleEndian.PutUint64(d[8:], v.size)
	copy(d[16:], root[:])
	return sha256.Sum256(d[:])
}

// fold closes the levels upwards; the topmost block's hash is the root.
func (v *Verity) fold() [32]byte {
	for level := 0; ; level++ {
		h := hashPadded(v.levels[level])
		if level == len(v.levels)-1 || len(v.levels[level+1]) == 0 {
			return h
		}
		v.push(level+1, h)
	}
}

func hashPadded(b []byte) [32]byte {
	var block [verityBlock]byte
	copy(block[:], b)
	return sha256.Sum256(block[:])
}
