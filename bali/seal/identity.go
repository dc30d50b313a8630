package seal

import (
	"bytes"
	"crypto/ed25519"
	"encoding/base64"
	"errors"
	"fmt"
	"strings"

	"golang.org/x/crypto/ssh"
)

// Identity is an ed25519 public key: who signs, and who is trusted.
type Identity [ed25519.PublicKeySize]byte

const identityPrefix = "ed25519:"

// String is "ed25519:" and the key in unpadded base64url: one word, fit for a
// command line, a URL and a file name.
func (id Identity) String() string {
	return identityPrefix + base64.RawURLEncoding.EncodeToString(id[:])
}

// ParseIdentity reads the form that String writes, or a line of OpenSSH's
// ("ssh-ed25519 AAAA… comment").
func ParseIdentity(s string) (Identity, error) {
	s = strings.TrimSpace(s)
	if strings.HasPrefix(s, "ssh-") {
		pub, _, _, rest, err := ssh.ParseAuthorizedKey([]byte(s))
		if err != nil {
			return Identity{}, fmt.Errorf("identity %q: %w", s, err)
		}
		if len(bytes.TrimSpace(rest)) > 0 {
			return Identity{}, fmt.Errorf("identity %q: more than one line", s)
		}
		return IdentityOf(pub)
	}
	text, ok := strings.CutPrefix(s, identityPrefix)
	if !ok {
		return Identity{}, fmt.Errorf("identity %q: want ed25519:… as bali id prints it, or an ssh-ed25519 line", s)
	}
	key, err := base64.RawURLEncoding.Strict().DecodeString(text)
	if err != nil {
		return Identity{}, fmt.Errorf("identity %q: %w", s, err)
	}
	if len(key) != ed25519.PublicKeySize {
		return Identity{}, fmt.Errorf("identity %q: %d bytes, an ed25519 key has %d", s, len(key), ed25519.PublicKeySize)
	}
	return Identity(key), nil
}

// IdentityOf is the identity of an OpenSSH key, which must be ssh-ed25519.
func IdentityOf(pub ssh.PublicKey) (Identity, error) {
	if pub.Type() != ssh.KeyAlgoED25519 {
		return Identity{}, fmt.Errorf("a key of type %s can't sign images, only %s can: make one with bali id", pub.Type(), ssh.KeyAlgoED25519)
	}
	parsed, err := ssh.ParsePublicKey(pub.Marshal()) // an agent's key is only bytes
	if err != nil {
		return Identity{}, fmt.Errorf("ssh-ed25519 key: %w", err)
	}
	c, ok := parsed.(ssh.CryptoPublicKey)
	if !ok {
		return Identity{}, errors.New("ssh-ed25519 key without its public half")
	}
	key, ok := c.CryptoPublicKey().(ed25519.PublicKey)
	if !ok || len(key) != ed25519.PublicKeySize {
		return Identity{}, errors.New("ssh-ed25519 key of the wrong size")
	}
	return Identity(key), nil
}

// AuthorizedKey is the identity as a line of OpenSSH's, without comment.
func (id Identity) AuthorizedKey() string {
	pub, err := ssh.NewPublicKey(ed25519.PublicKey(id[:]))
	if err != nil {
		panic(err) // its only reason is a size other than this array's
	}
	return strings.TrimSpace(string(ssh.MarshalAuthorizedKey(pub)))
}

// sign fills in identity and signature. An ssh-agent's signer and a key file's
// are the same thing here.
func (s *Signature) sign(signer ssh.Signer) error {
	id, err := IdentityOf(signer.PublicKey())
	if err != nil {
		return err
	}
	s.Identity = id
	sig, err := signer.Sign(nil, s.Message()) // ed25519 needs no randomness
	if err != nil {
		return fmt.Errorf("sign as %s: %w", id, err)
	}
	if sig.Format != ssh.KeyAlgoED25519 || len(sig.Blob) != ed25519.SignatureSize {
		return fmt.Errorf("sign as %s: the agent answered with a %s signature of %d bytes", id, sig.Format, len(sig.Blob))
	}
	copy(s.Sig[:], sig.Blob)
	return s.Verify()
}
