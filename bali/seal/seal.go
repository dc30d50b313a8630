// Package seal is bali's file format: one ordinary .tar.gz (or .tar.zst) that
// holds a root file system, says how to start it, and carries an ed25519
// signature over every byte of itself. docs/bali-format.md is its
// specification, testdata/vectors its test vectors.
//
// The package is pure: it reads and writes streams and directories, starts
// nothing and builds on every system that Go knows. It imports nothing of this
// repository.
//
// Writer makes a file, Verify checks the signature without unpacking, Reader
// gives the entries one by one while it hashes the very bytes they come from;
// its Finish has the last word: nothing that was read may be used before it.
package seal

import (
	"bytes"
	"crypto/ed25519"
	"crypto/sha512"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
)

// Sentinels of the contract. Every refusal wraps exactly one of them.
var (
	// ErrFormat: the file is no image of this format.
	ErrFormat = errors.New("not a bali image")
	// ErrUnsigned: the file does not end in a signature.
	ErrUnsigned = errors.New("no signature")
	// ErrSignature: there is a signature and it is not one over these bytes.
	ErrSignature = errors.New("bad signature")
	// ErrUntrusted: the signature is good, its identity is not accepted here.
	ErrUntrusted = errors.New("untrusted identity")
	// ErrTooLarge: a limit of the reader is exceeded.
	ErrTooLarge = errors.New("too large")
)

// IsRefusal tells what is wrong with a file from what kept it from being read.
func IsRefusal(err error) bool {
	for _, s := range []error{ErrFormat, ErrUnsigned, ErrSignature, ErrUntrusted, ErrTooLarge} {
		if errors.Is(err, s) {
			return true
		}
	}
	return false
}

// Compression of an image's payload.
type Compression int

// The two compressions of the format. Gzip is what every tool on earth unpacks.
const (
	Gzip Compression = iota
	Zstd
)

func (c Compression) String() string {
	if c == Zstd {
		return "zstd"
	}
	return "gzip"
}

// The seal is what the signature is stored in: a block of sealLen bytes inside
// a container that a decompressor skips.
//
//	0    4  "BALI"
//	4    1  version, 1
//	5    3  zero
//	8   32  tree digest
//	40  32  identity: ed25519 public key
//	72  64  ed25519 signature (RFC 8032)
const (
	sealLen     = 136
	sealVersion = 1
	signedText  = "bali image v1\x00"
)

var sealMagic = []byte("BALI")

// An empty gzip member with an extra field (RFC 1952 §2.3.1.1): a gzip reader
// appends its zero bytes of content to the member before it.
var (
	gzipSealHead = []byte{
		0x1f, 0x8b, 8, 4, 0, 0, 0, 0, 0, 255, // magic, deflate, FEXTRA, no time, no flags, unknown system
		4 + sealLen, 0, // XLEN
		'B', 'a', sealLen, 0, // subfield
	}
	gzipSealTail = []byte{
		3, 0, // the empty deflate stream
		0, 0, 0, 0, 0, 0, 0, 0, // CRC-32 and size of nothing
	}
	// A skippable frame (RFC 8878 §3.1.2).
	zstdSealHead = []byte{0x5b, 0x2a, 0x4d, 0x18, sealLen, 0, 0, 0}
)

// TrailerLen is the size of the largest trailer: that many bytes from the end
// of a file are enough for ParseTrailer.
const TrailerLen = 16 + sealLen + 10

func (c Compression) container() (head, tail []byte) {
	if c == Zstd {
		return zstdSealHead, nil
	}
	return gzipSealHead, gzipSealTail
}

func (c Compression) trailerLen() int {
	head, tail := c.container()
	return len(head) + sealLen + len(tail)
}

// Signature is who signed what. It is complete in itself: Verify needs nothing
// of the file any more, so that a cache can keep it beside an unpacked tree.
type Signature struct {
	// Payload is the SHA-512 of every byte before the trailer.
	Payload [sha512.Size]byte
	// Tree is the digest of what is inside, see Tree.
	Tree [32]byte
	// Identity is the signer's public key.
	Identity Identity
	// Sig is the ed25519 signature over Message.
	Sig [ed25519.SignatureSize]byte
}

// Message is what is signed: the format's name, the payload's digest and the
// tree's. It is short, so an ssh-agent can sign it.
func (s *Signature) Message() []byte {
	m := make([]byte, 0, len(signedText)+len(s.Payload)+len(s.Tree))
	m = append(m, signedText...)
	m = append(m, s.Payload[:]...)
	return append(m, s.Tree[:]...)
}

// Verify reports whether Sig is Identity's signature; the error is ErrSignature.
// Whether Identity may be believed is the caller's question.
func (s *Signature) Verify() error {
	if !ed25519.Verify(s.Identity[:], s.Message(), s.Sig[:]) {
		return fmt.Errorf("%w: these bytes are not what %s signed: the file is damaged or was changed", ErrSignature, s.Identity)
	}
	return nil
}

// Digest names an image by its payload, as "sha512:" and hex digits.
func (s *Signature) Digest() string { return "sha512:" + hex.EncodeToString(s.Payload[:]) }

// MarshalBinary gives the payload digest followed by the seal block.
func (s *Signature) MarshalBinary() ([]byte, error) {
	return append(bytes.Clone(s.Payload[:]), s.block()...), nil
}

// UnmarshalBinary is the inverse of MarshalBinary.
func (s *Signature) UnmarshalBinary(b []byte) error {
	if len(b) != len(s.Payload)+sealLen {
		return fmt.Errorf("%w: a signature record has %d bytes, not %d", ErrFormat, len(s.Payload)+sealLen, len(b))
	}
	var out Signature
	if err := out.parseBlock(b[len(s.Payload):]); err != nil {
		return err
	}
	copy(out.Payload[:], b)
	*s = out
	return nil
}

func (s *Signature) block() []byte {
	b := make([]byte, sealLen)
	copy(b, sealMagic)
	b[4] = sealVersion
	copy(b[8:], s.Tree[:])
	copy(b[40:], s.Identity[:])
	copy(b[72:], s.Sig[:])
	return b
}

func (s *Signature) parseBlock(b []byte) error {
	if !bytes.Equal(b[:4], sealMagic) {
		return ErrUnsigned
	}
	if b[4] != sealVersion {
		return fmt.Errorf("%w: signature version %d: this bali knows version %d, get a newer one", ErrFormat, b[4], sealVersion)
	}
	if b[5]|b[6]|b[7] != 0 {
		return fmt.Errorf("%w: reserved bytes of the signature are set", ErrSignature)
	}
	copy(s.Tree[:], b[8:])
	copy(s.Identity[:], b[40:])
	copy(s.Sig[:], b[72:])
	return nil
}

// trailer is the last bytes of a sealed file.
func (s *Signature) trailer(c Compression) []byte {
	head, tail := c.container()
	return append(append(bytes.Clone(head), s.block()...), tail...)
}

// parseTrailer reads a trailer from exactly its own bytes. Anything but the one
// canonical form is ErrUnsigned.
func parseTrailer(c Compression, b []byte) (*Signature, error) {
	head, tail := c.container()
	if len(b) != c.trailerLen() || !bytes.HasPrefix(b, head) || !bytes.HasSuffix(b, tail) {
		return nil, ErrUnsigned
	}
	s := new(Signature)
	return s, s.parseBlock(b[len(head) : len(head)+sealLen])
}

// ParseTrailer reads what a file claims about its signature from the file's
// last bytes (TrailerLen of them, or more). Payload is left zero: only reading
// the whole file tells it.
func ParseTrailer(last []byte) (*Signature, error) {
	for _, c := range []Compression{Gzip, Zstd} {
		if n := c.trailerLen(); len(last) >= n {
			if s, err := parseTrailer(c, last[len(last)-n:]); !errors.Is(err, ErrUnsigned) {
				return s, err
			}
		}
	}
	return nil, ErrUnsigned
}

// sniff tells the compression from the first four bytes.
func sniff(b []byte) (Compression, error) {
	switch {
	case bytes.HasPrefix(b, []byte{0x1f, 0x8b, 8}):
		return Gzip, nil
	case len(b) >= 4 && binary.LittleEndian.Uint32(b) == 0xfd2fb528:
		return Zstd, nil
	}
	return 0, fmt.Errorf("%w: it starts neither like gzip nor like zstd", ErrFormat)
}
