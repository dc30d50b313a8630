package cold

import (
	"bytes"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"filippo.io/age"
	"github.com/klauspost/compress/zstd"
)

// A Key encrypts and authenticates what is in a vault. Who has it can read everything, and nobody else can read or change anything unnoticed.
type Key struct {
	identity *age.X25519Identity
	mac      []byte
	encoder  *zstd.Encoder
	chunks   *zstd.Decoder
	lists    *zstd.Decoder
}

// ReadKey reads the file that age-keygen makes.
func ReadKey(path string) (*Key, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: copy the key that the other hosts have; for the first, age-keygen -o %s", err, path)
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	identities, err := age.ParseIdentities(f)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	x, ok := identities[0].(*age.X25519Identity)
	if !ok || len(identities) != 1 {
		return nil, fmt.Errorf("%s: it has to hold one X25519 key; make it with age-keygen -o %[1]s", path)
	}
	return newKey(x)
}

func newKey(x *age.X25519Identity) (*Key, error) {
	k := &Key{identity: x}
	var err error
	if k.mac, err = hkdf.Key(sha256.New, []byte(x.String()), nil, "cradlestack cold storage v1", sha256.Size); err != nil {
		return nil, err
	}
	if k.encoder, err = zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest)); err != nil {
		return nil, err
	}
	if k.chunks, err = zstd.NewReader(nil, zstd.WithDecoderMaxMemory(8*chunkSize)); err != nil { // the encoder's window is larger than a chunk
		return nil, err
	}
	k.lists, err = zstd.NewReader(nil, zstd.WithDecoderMaxMemory(maxManifest))
	return k, err
}

// What a sum is for, so that one can't pass as another.
const (
	chunkUse = "chunk"
	listUse  = "list"
)

// nameSize is the size of a sum.
const nameSize = sha256.Size

func (k *Key) sum(use string, data []byte) string {
	h := hmac.New(sha256.New, k.mac)
	h.Write([]byte(use))
	h.Write([]byte{0})
	h.Write(data)
	return hex.EncodeToString(h.Sum(nil))
}

// name is what a chunk of this content is called.
func (k *Key) name(data []byte) string { return k.sum(chunkUse, data) }

func equal(a, b string) bool { return hmac.Equal([]byte(a), []byte(b)) }

// seal compresses and encrypts.
func (k *Key) seal(data []byte) ([]byte, error) {
	var out bytes.Buffer
	w, err := age.Encrypt(&out, k.identity.Recipient())
	if err != nil {
		return nil, err
	}
	if _, err := w.Write(k.encoder.EncodeAll(data, nil)); err != nil {
		return nil, err
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return out.Bytes(), nil
}

// ErrKey is what another key opens, or nobody's: who can write to a store can put into it what is encrypted for whom he likes.
var ErrKey = errors.New("it is encrypted for another key than this one (--cold-key)")

// open is the reverse of seal. d bounds what comes of it.
func (k *Key) open(sealed []byte, d *zstd.Decoder) ([]byte, error) {
	r, err := age.Decrypt(bytes.NewReader(sealed), k.identity)
	if errors.As(err, new(*age.NoIdentityMatchError)) {
		return nil, ErrKey
	}
	if err != nil {
		return nil, err
	}
	packed, err := io.ReadAll(r)
	if err != nil {
		return nil, err
	}
	return d.DecodeAll(packed, nil)
}
