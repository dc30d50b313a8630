package server

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"time"
)

// TLSFiles are PEM files: of the authority whose certificates the other side has, of one's own certificate, of its key.
type TLSFiles struct{ CA, Cert, Key string }

// ListenTLS listens for clients that have a certificate of the authority.
func ListenTLS(address string, f TLSFiles) (net.Listener, error) {
	if f.CA == "" || f.Cert == "" || f.Key == "" {
		return nil, errors.New("a TCP address is served with mutual TLS only: give --tls-ca, --tls-cert and --tls-key")
	}
	cert, err := tls.LoadX509KeyPair(f.Cert, f.Key)
	if err != nil {
		return nil, err
	}
	ca, err := os.ReadFile(f.CA)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(ca) {
		return nil, fmt.Errorf("%s holds no certificate", f.CA)
	}
	l, err := net.Listen("tcp", address)
	if err != nil {
		return nil, err
	}
	return tls.NewListener(l, &tls.Config{
		Certificates: []tls.Certificate{cert}, ClientCAs: pool, ClientAuth: tls.RequireAndVerifyClientCert, MinVersion: tls.VersionTLS12,
		NextProtos: []string{"http/1.1"}, // attach and exec take the connection over
	}), nil
}

// ListenUnix listens on a socket, in place of one that nobody listens on any more. Only its owner may use it, and the group, if one is named.
func ListenUnix(path, group string) (net.Listener, error) {
	gid := -1
	if group != "" {
		g, err := user.LookupGroup(group)
		if err != nil {
			return nil, err
		}
		if gid, err = strconv.Atoi(g.Gid); err != nil {
			return nil, err
		}
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, err
	}
	if info, err := os.Lstat(path); err == nil {
		if info.Mode()&fs.ModeSocket == 0 {
			return nil, fmt.Errorf("%s is there and no socket", path)
		}
		if c, err := net.DialTimeout("unix", path, time.Second); err == nil {
			c.Close()
			return nil, fmt.Errorf("another process listens on %s", path)
		}
		if err := os.Remove(path); err != nil {
			return nil, err
		}
	}
	// It is bound beside its place, so that nobody connects before it has its mode.
	part := path + ".part"
	os.Remove(part)
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: part, Net: "unix"})
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false)
	mode := fs.FileMode(0o600)
	if gid >= 0 {
		mode = 0o660
	}
	if err := errors.Join(os.Chmod(part, mode), os.Chown(part, -1, gid), os.Rename(part, path)); err != nil {
		l.Close()
		os.Remove(part)
		return nil, err
	}
	return &unixListener{l, path}, nil
}

// A unixListener removes its socket.
type unixListener struct {
	*net.UnixListener
	path string
}

// Addr is where clients find it.
func (l *unixListener) Addr() net.Addr { return &net.UnixAddr{Name: l.path, Net: "unix"} }

func (l *unixListener) Close() error {
	os.Remove(l.path)
	return l.UnixListener.Close()
}
