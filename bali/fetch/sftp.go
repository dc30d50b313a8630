package fetch

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/url"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strings"

	"github.com/pkg/sftp"
	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"
	"golang.org/x/crypto/ssh/knownhosts"
)

// sftpSource reads through the SFTP subsystem; scp URLs mean the same, as they
// do to OpenSSH's scp since 9.0.
type sftpSource struct {
	url   *url.URL
	opt   Options
	known []string
}

func newSFTP(u *url.URL, o Options) (*sftpSource, error) {
	if u.Hostname() == "" || u.Path == "" || u.Path == "/" {
		return nil, fmt.Errorf("%s: want sftp://[user@]host[:port]/path, with /~/path for one below the home folder", redacted(u))
	}
	if _, has := u.User.Password(); has {
		return nil, fmt.Errorf("%s: no passwords in URLs: use an ssh-agent or --ssh-key", redacted(u))
	}
	s := &sftpSource{url: u, opt: o}
	if o.KnownHosts != "" {
		s.known = []string{o.KnownHosts}
		return s, nil
	}
	candidates := []string{"/etc/ssh/ssh_known_hosts"}
	if home, err := os.UserHomeDir(); err == nil {
		candidates = append(candidates, filepath.Join(home, ".ssh/known_hosts"))
	}
	for _, c := range candidates {
		if _, err := os.Stat(c); err == nil {
			s.known = append(s.known, c)
		}
	}
	return s, nil
}

func (s *sftpSource) String() string { return redacted(s.url) }

func (s *sftpSource) Open(ctx context.Context, offset int64) (Part, error) {
	client, err := s.dial(ctx)
	if err != nil {
		return Part{}, err
	}
	stop := context.AfterFunc(ctx, func() { client.Close() })
	session := &sftpBody{client: client, stop: stop}
	if session.sftp, err = sftp.NewClient(client); err != nil {
		session.Close()
		return Part{}, fmt.Errorf("sftp subsystem: %w", err)
	}
	name := strings.TrimPrefix(s.url.Path, "/~/") // relative names start at home
	f, err := session.sftp.Open(name)
	if err != nil {
		session.Close()
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) {
			err = permanent{err}
		}
		return Part{}, err
	}
	session.file = f
	fi, err := f.Stat()
	if err != nil {
		session.Close()
		return Part{}, err
	}
	if offset < 0 {
		offset = max(fi.Size()+offset, 0)
	}
	if _, err := f.Seek(offset, io.SeekStart); err != nil {
		session.Close()
		return Part{}, err
	}
	// WriteTo keeps many requests in flight, which Read does not
	pr, pw := io.Pipe()
	session.PipeReader = pr
	session.done = make(chan struct{})
	go func() {
		defer close(session.done)
		_, err := f.WriteTo(pw)
		pw.CloseWithError(err) // nil is EOF
	}()
	return Part{session, offset, fi.Size()}, nil
}

// sftpBody is an open remote file together with its connection.
type sftpBody struct {
	*io.PipeReader
	client *ssh.Client
	sftp   *sftp.Client
	file   *sftp.File
	stop   func() bool
	done   chan struct{}
}

func (b *sftpBody) Close() error {
	b.stop()
	if b.PipeReader != nil {
		b.PipeReader.Close()
	}
	err := b.client.Close() // ends everything that waits on it
	if b.done != nil {
		<-b.done
	}
	return err
}

func (s *sftpSource) dial(ctx context.Context) (*ssh.Client, error) {
	addr := net.JoinHostPort(s.url.Hostname(), "22")
	if p := s.url.Port(); p != "" {
		addr = net.JoinHostPort(s.url.Hostname(), p)
	}
	check, err := knownhosts.New(s.known...)
	if err != nil {
		return nil, permanent{err}
	}
	name := s.url.User.Username()
	if name == "" {
		u, err := user.Current()
		if err != nil {
			return nil, permanent{err}
		}
		name = u.Username
	}
	signers, done, err := s.signers(ctx)
	if err != nil {
		return nil, permanent{err}
	}
	defer done()
	var d net.Dialer
	conn, err := d.DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	c, chans, reqs, err := ssh.NewClientConn(conn, addr, &ssh.ClientConfig{
		User:              name,
		Auth:              []ssh.AuthMethod{ssh.PublicKeys(signers...)},
		HostKeyCallback:   check,
		HostKeyAlgorithms: hostKeyAlgorithms(check, addr, conn.RemoteAddr()),
	})
	if err != nil {
		conn.Close()
		return nil, explainSSH(err, addr, len(signers))
	}
	return ssh.NewClient(c, chans, reqs), nil
}

// explainSSH adds the remedy; what a person must do first is permanent.
func explainSSH(err error, addr string, keys int) error {
	var ke *knownhosts.KeyError
	switch {
	case errors.As(err, &ke) && len(ke.Want) == 0:
		return permanent{fmt.Errorf("the key of %s is not known here: compare it and add it with ssh-keyscan to known_hosts", addr)}
	case errors.As(err, &ke):
		return permanent{fmt.Errorf("the key of %s is NOT the one in %s line %d: someone may be listening in", addr, ke.Want[0].Filename, ke.Want[0].Line)}
	case strings.Contains(err.Error(), "unable to authenticate"):
		return permanent{fmt.Errorf("%s accepts none of %d keys: add one to the agent or name it with --ssh-key", addr, keys)}
	}
	return err
}

// hostKeyAlgorithms are those of the keys that known_hosts has for the host: a
// server that has others too must not pick one that nobody wrote down.
func hostKeyAlgorithms(check ssh.HostKeyCallback, addr string, remote net.Addr) []string {
	var ke *knownhosts.KeyError
	if err := check(addr, remote, unknownKey{}); !errors.As(err, &ke) {
		return nil
	}
	var algos []string
	for _, k := range ke.Want {
		t := k.Key.Type()
		if t == ssh.KeyAlgoRSA {
			algos = append(algos, ssh.KeyAlgoRSASHA512, ssh.KeyAlgoRSASHA256)
		} else if !slices.Contains(algos, t) {
			algos = append(algos, t)
		}
	}
	return algos
}

// unknownKey is a key that no known_hosts file holds.
type unknownKey struct{}

func (unknownKey) Type() string                        { return "none" }
func (unknownKey) Marshal() []byte                     { return []byte("none") }
func (unknownKey) Verify([]byte, *ssh.Signature) error { return errors.New("no key") }

// signers are --ssh-key's, then the agent's. done ends the agent's connection.
func (s *sftpSource) signers(ctx context.Context) (out []ssh.Signer, done func(), err error) {
	done = func() {}
	if s.opt.SSHKey != "" {
		b, err := os.ReadFile(s.opt.SSHKey)
		if err != nil {
			return nil, done, err
		}
		k, err := ssh.ParsePrivateKey(b)
		if err != nil {
			return nil, done, fmt.Errorf("%s: %w: add keys with a passphrase to an ssh-agent", s.opt.SSHKey, err)
		}
		out = append(out, k)
	}
	if sock := os.Getenv("SSH_AUTH_SOCK"); sock != "" {
		keys, conn, err := agentSigners(ctx, sock)
		switch {
		case err == nil:
			out, done = append(out, keys...), func() { conn.Close() }
		case len(out) == 0: // or the key that was named is enough
			return nil, done, fmt.Errorf("ssh-agent: %w: name a key with --ssh-key", err)
		}
	}
	if len(out) == 0 {
		return nil, done, errors.New("no key to log in with: start an ssh-agent or name one with --ssh-key")
	}
	return out, done, nil
}

func agentSigners(ctx context.Context, sock string) ([]ssh.Signer, net.Conn, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", sock)
	if err != nil {
		return nil, nil, err
	}
	keys, err := agent.NewClient(conn).Signers()
	if err != nil {
		conn.Close()
		return nil, nil, err
	}
	return keys, conn, nil
}
