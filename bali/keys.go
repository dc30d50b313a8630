package main

import (
	"bufio"
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"

	"github.com/cradlestack/cradlestack/bali/seal"
)

func (c *cli) id() *cobra.Command {
	var asSSH bool
	cmd := &cobra.Command{
		Use:   "id",
		Short: "print the identity that signs here, making its key on first use",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			path, err := c.keyPath()
			if err != nil {
				return err
			}
			if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) {
				if err := makeKey(path); err != nil {
					return err
				}
				c.log.Info("made a new key", "file", path)
			}
			id, err := publicHalf(path)
			if err != nil {
				return err
			}
			switch {
			case c.output == "json":
				return c.json(map[string]string{"identity": id.String(), "key": path, "ssh": id.AuthorizedKey()})
			case asSSH:
				fmt.Fprintln(c.stdout, id.AuthorizedKey())
			default:
				fmt.Fprintln(c.stdout, id)
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&asSSH, "ssh", false, "print it as a line of OpenSSH's")
	c.outputFlag(cmd)
	return cmd
}

func (c *cli) keyPath() (string, error) {
	if c.keyFile != "" {
		return c.keyFile, nil
	}
	dir, err := os.UserConfigDir()
	if err != nil {
		return "", fmt.Errorf("no place for the key: %w: name it with --key", err)
	}
	return filepath.Join(dir, "bali", "id_ed25519"), nil
}

// makeKey writes a new key in OpenSSH's format, never over another one.
func makeKey(path string) error {
	if strings.HasSuffix(path, ".pub") {
		return fmt.Errorf("%s: no such public key", path)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return err
	}
	block, err := ssh.MarshalPrivateKey(key, "bali")
	if err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	if err := errors.Join(pem.Encode(f, block), f.Sync(), f.Close()); err != nil {
		os.Remove(path) // half a key would look like a key
		return err
	}
	return nil
}

// publicHalf reads the identity of a private or public key file.
func publicHalf(path string) (seal.Identity, error) {
	b, err := readKey(path)
	if err != nil {
		return seal.Identity{}, err
	}
	if bytes.HasPrefix(b, []byte("ssh-")) {
		return seal.ParseIdentity(string(b))
	}
	s, err := parseKey(path, b)
	if err != nil {
		return seal.Identity{}, err
	}
	return seal.IdentityOf(s.PublicKey())
}

// readKey refuses a private key that others may read.
func readKey(path string) ([]byte, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: make a key with bali id", err)
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return nil, err
	}
	b := make([]byte, 64<<10)
	n, err := f.Read(b)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	b = b[:n]
	if !bytes.HasPrefix(b, []byte("ssh-")) && fi.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("%s: others can read this key: chmod 600 it", path)
	}
	return b, nil
}

func parseKey(path string, b []byte) (ssh.Signer, error) {
	s, err := ssh.ParsePrivateKey(b)
	var locked *ssh.PassphraseMissingError
	if errors.As(err, &locked) {
		return nil, fmt.Errorf("%s has a passphrase: ssh-add it and use --key %s.pub", path, path)
	}
	if err != nil {
		return nil, fmt.Errorf("key %s: %w", path, err)
	}
	return s, nil
}

// signer loads the key, or finds it in the ssh-agent if --key is its public
// half. done ends the agent's connection.
func (c *cli) signer() (s ssh.Signer, done func(), err error) {
	done = func() {}
	path, err := c.keyPath()
	if err != nil {
		return nil, done, err
	}
	b, err := readKey(path)
	if err != nil {
		return nil, done, err
	}
	if !bytes.HasPrefix(b, []byte("ssh-")) {
		s, err = parseKey(path, b)
		return s, done, err
	}
	want, err := seal.ParseIdentity(string(b))
	if err != nil {
		return nil, done, fmt.Errorf("%s: %w", path, err)
	}
	sock := os.Getenv("SSH_AUTH_SOCK")
	if sock == "" {
		return nil, done, fmt.Errorf("%s is a public key and there is no ssh-agent: start one, or name the private key", path)
	}
	conn, err := net.Dial("unix", sock)
	if err != nil {
		return nil, done, fmt.Errorf("ssh-agent: %w", err)
	}
	signers, err := agent.NewClient(conn).Signers()
	if err != nil {
		conn.Close()
		return nil, done, fmt.Errorf("ssh-agent: %w", err)
	}
	for _, s := range signers {
		if id, err := seal.IdentityOf(s.PublicKey()); err == nil && id == want {
			return s, func() { conn.Close() }, nil
		}
	}
	conn.Close()
	return nil, done, fmt.Errorf("the ssh-agent doesn't hold %s: ssh-add it", path)
}

func (c *cli) trustPath() (string, error) {
	if c.trustFile != "" {
		return c.trustFile, nil
	}
	if os.Geteuid() == 0 {
		return "/etc/bali/trust", nil
	}
	dir, err := os.UserConfigDir()
	if err != nil {
		return "", fmt.Errorf("no trust file: %w: name it with --trust", err)
	}
	return filepath.Join(dir, "bali", "trust"), nil
}

// trusted is an identity in the trust file, with the number of its line.
type trusted struct {
	Identity seal.Identity `json:"-"`
	Text     string        `json:"identity"`
	Comment  string        `json:"comment,omitempty"`
	line     int
}

func (t trusted) String() string { return strings.TrimSpace(t.Text + " " + t.Comment) }

const maxTrust = 1 << 20

// trustList reads the trust file; path is its place, "" where there is none to be had.
func (c *cli) trustList() (path string, list []trusted, err error) {
	if path, err = c.trustPath(); err == nil {
		_, list, err = readTrust(path)
	}
	return path, list, err
}

// readTrust reads the trust file, and the identities in its lines; none is an
// empty one. One that others may write to is no basis for trust.
func readTrust(path string) (lines []string, list []trusted, err error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil, nil
	}
	if err != nil {
		return nil, nil, err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return nil, nil, err
	}
	if err := onlyOurs(path, fi); err != nil {
		return nil, nil, err
	}
	if dir, err := os.Stat(filepath.Dir(path)); err != nil {
		return nil, nil, err
	} else if dir.Mode()&fs.ModeSticky == 0 {
		if err := onlyOurs(filepath.Dir(path), dir); err != nil {
			return nil, nil, err
		}
	}
	if fi.Size() > maxTrust {
		return nil, nil, fmt.Errorf("%s: %d bytes are no list of identities", path, fi.Size())
	}
	scanner := bufio.NewScanner(f)
	for scanner.Scan() {
		lines = append(lines, scanner.Text())
		l := strings.TrimSpace(scanner.Text())
		if l == "" || l[0] == '#' {
			continue
		}
		t, err := parseTrusted(l)
		if err != nil {
			return nil, nil, fmt.Errorf("%s line %d: %w", path, len(lines), err)
		}
		t.line = len(lines)
		list = append(list, t)
	}
	return lines, list, scanner.Err()
}

// onlyOurs refuses what somebody else than this user and root can change.
func onlyOurs(path string, fi fs.FileInfo) error {
	if fi.Mode().Perm()&0o022 != 0 {
		return fmt.Errorf("%s: others can write to it: chmod go-w it", path)
	}
	if st, ok := fi.Sys().(*syscall.Stat_t); ok && st.Uid != 0 && int(st.Uid) != os.Geteuid() {
		return fmt.Errorf("%s: it belongs to user %d, who can write to it: chown it", path, st.Uid)
	}
	return nil
}

// parseTrusted reads IDENTITY [COMMENT] or a line of OpenSSH's, and no second
// line, which would be another identity in the trust file.
func parseTrusted(l string) (trusted, error) {
	if strings.Contains(l, "\n") {
		return trusted{}, errors.New("it has more than one line: add one identity at a time")
	}
	words, n := strings.Fields(l), 1
	if strings.HasPrefix(l, "ssh-") {
		n = 2
	}
	n = min(n, len(words))
	id, err := seal.ParseIdentity(strings.Join(words[:n], " "))
	return trusted{Identity: id, Text: id.String(), Comment: strings.Join(words[n:], " ")}, err
}

func (c *cli) trust() *cobra.Command {
	cmd := &cobra.Command{
		Use: "trust", Short: "say whose images may run here",
		Args: cobra.NoArgs, // a command that doesn't exist must not look like one that has worked
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	var comment string
	add := &cobra.Command{
		Use:   "add IDENTITY|KEY.pub",
		Short: "trust an identity",
		Args:  cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			line := args[0]
			if b, err := os.ReadFile(args[0]); err == nil {
				line = strings.TrimSpace(string(b))
			}
			t, err := parseTrusted(line)
			if err != nil {
				return fmt.Errorf("trust add: %w", err)
			}
			if comment != "" {
				t.Comment = strings.Join(strings.Fields(comment), " ")
			}
			return c.editTrust(func(lines []string, list []trusted) ([]string, error) {
				for _, l := range list {
					if l.Identity == t.Identity {
						return lines, nil
					}
				}
				if len(lines) == 0 {
					lines = []string{"# identities whose images bali runs here: bali trust add|ls|rm"}
				}
				return append(lines, t.String()), nil
			})
		},
	}
	add.Flags().StringVar(&comment, "comment", "", "whose it is")
	ls := &cobra.Command{
		Use:   "ls",
		Short: "list trusted identities",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			_, list, err := c.trustList()
			if err != nil {
				return err
			}
			if c.output == "json" {
				return c.json(append([]trusted{}, list...))
			}
			for _, t := range list {
				fmt.Fprintln(c.stdout, message(t.String()))
			}
			return nil
		},
	}
	c.outputFlag(ls)
	rm := &cobra.Command{
		Use:   "rm IDENTITY|COMMENT",
		Short: "trust an identity no longer",
		Args:  cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			return c.editTrust(func(lines []string, list []trusted) ([]string, error) {
				id, err := seal.ParseIdentity(args[0])
				left := len(lines)
				for _, t := range slices.Backward(list) { // so that the numbers of those before it stay right
					if err == nil && t.Identity == id || t.Comment != "" && t.Comment == args[0] {
						lines = slices.Delete(lines, t.line-1, t.line)
					}
				}
				if len(lines) == left {
					return nil, fmt.Errorf("%s is not trusted: see bali trust ls", args[0])
				}
				return lines, nil
			})
		},
	}
	cmd.AddCommand(add, ls, rm)
	return cmd
}

// editTrust rewrites the trust file in one step. Lines that edit leaves alone, as
// people's own comments, stay as they are.
func (c *cli) editTrust(edit func(lines []string, list []trusted) ([]string, error)) error {
	path, err := c.trustPath()
	if err != nil {
		return err
	}
	lines, list, err := readTrust(path)
	if err != nil {
		return err
	}
	if lines, err = edit(lines, list); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	return writeFile(path, []byte(strings.Join(append(lines, ""), "\n")), 0o644)
}

// writeFile replaces a file in one step.
func writeFile(path string, content []byte, mode fs.FileMode) error {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+"-")
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	if err = errors.Join(err, f.Chmod(mode), f.Sync(), f.Close()); err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		os.Remove(f.Name())
	}
	return err
}

// policy decides whose signature counts.
type policy struct {
	only     []seal.Identity // if any, nobody else
	trusted  []trusted
	file     string
	insecure bool
}

// policy reads the trust file unless identities are named.
func (c *cli) policy(identities []string, insecure bool) (*policy, error) {
	p := &policy{insecure: insecure}
	for _, s := range identities {
		id, err := seal.ParseIdentity(s)
		if err != nil {
			return nil, err
		}
		p.only = append(p.only, id)
	}
	if len(p.only) > 0 && insecure {
		return nil, errors.New("--identity and --insecure contradict each other")
	}
	if len(p.only) > 0 {
		return p, nil
	}
	var err error
	if p.file, p.trusted, err = c.trustList(); err != nil && (p.file != "" || !insecure) {
		return nil, err
	}
	return p, nil
}

// accept takes what reading an image ended with. A bad signature is never
// accepted; --insecure takes none, and anybody's.
func (p *policy) accept(s *seal.Signature, err error) error {
	switch {
	case errors.Is(err, seal.ErrUnsigned) && p.insecure:
		return nil
	case err != nil:
		return err
	case p.insecure:
		return nil
	}
	_, err = p.who(s.Identity)
	return err
}

// who names a trusted identity.
func (p *policy) who(id seal.Identity) (comment string, err error) {
	for _, o := range p.only {
		if o == id {
			return "", nil
		}
	}
	for _, t := range p.trusted {
		if t.Identity == id {
			return t.Comment, nil
		}
	}
	if len(p.only) > 0 {
		return "", fmt.Errorf("%w: it is signed by %s, not by the identity asked for", seal.ErrUntrusted, id)
	}
	return "", fmt.Errorf("%w: it is signed by %s, which is not in %s: if you know whose key that is, bali trust add %s", seal.ErrUntrusted, id, p.file, id)
}
