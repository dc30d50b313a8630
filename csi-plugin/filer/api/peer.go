package api

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"math/big"
	"net/http"
	"os"
	"time"

	"github.com/cradlestack/cradlestack/internal/jsonhttp"
)

// PeersPort is where a filer of a set answers others, unless it is told otherwise.
const PeersPort = "2051"

// minPeersKey is the least that the key of a set has.
const minPeersKey = 32

// PeersTLS is for both ends of a connection between those who have a set's key: who has it not gets no further than the handshake.
func PeersTLS(key []byte) (*tls.Config, error) {
	if len(key) < minPeersKey {
		return nil, fmt.Errorf("it has %d bytes, and no key of a set has less than %d", len(key), minPeersKey)
	}
	mac := hmac.New(sha256.New, key)
	mac.Write([]byte("cradle-filer: who controls the set"))
	private := ed25519.NewKeyFromSeed(mac.Sum(nil))
	public := private.Public()
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "cradle-filer"}, NotAfter: time.Now().AddDate(100, 0, 0)}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, public, private)
	if err != nil {
		return nil, err
	}
	return &tls.Config{
		MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{{Certificate: [][]byte{cert}, PrivateKey: private}}, ClientAuth: tls.RequireAnyClientCert,
		InsecureSkipVerify: true, SessionTicketsDisabled: true, // no authority vouches for it: it is the same key or it is not
		VerifyConnection: func(s tls.ConnectionState) error {
			if len(s.PeerCertificates) > 0 {
				if its, ok := s.PeerCertificates[0].PublicKey.(ed25519.PublicKey); ok && bytes.Equal(its, public.(ed25519.PublicKey)) {
					return nil
				}
			}
			return errOtherKey
		},
	}, nil
}

var errOtherKey = errors.New("it has not the key of this set")

// askPeer asks any filer of a set.
func (c Client) askPeer(ctx context.Context, method, path string, in, out any) error {
	key, err := os.ReadFile(c.KeyFile)
	if err != nil {
		return fmt.Errorf("key of the set: %w", err)
	}
	config, err := PeersTLS(key)
	if err != nil {
		return fmt.Errorf("%s: %w", c.KeyFile, err)
	}
	transport := &http.Transport{DisableKeepAlives: true, TLSClientConfig: config, TLSHandshakeTimeout: 10 * time.Second}
	return jsonhttp.Do(ctx, transport, method, "https://"+c.Address+path, nil, in, out)
}
