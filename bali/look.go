package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/bali/seal"
)

func (c *cli) verify() *cobra.Command {
	var r reading
	cmd := &cobra.Command{
		Use:   "verify FILE|URL [IDENTITY]",
		Short: "check that every byte is what a trusted identity, or the one named, signed",
		Args:  cobra.RangeArgs(1, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			p, err := c.policy(args[1:], false)
			if err != nil {
				return err
			}
			src, err := c.open(cmd.Context(), args[0], &r)
			if err != nil {
				return named(args[0], err)
			}
			defer src.Close()
			s, err := seal.Verify(cmd.Context(), src)
			if err := p.accept(s, err); err != nil {
				return named(args[0], err)
			}
			src.bar.Close()
			comment, _ := p.who(s.Identity)
			if c.output == "json" {
				return c.json(map[string]any{"digest": s.Digest(), "tree": fmt.Sprintf("%x", s.Tree), "identity": s.Identity.String(), "comment": comment})
			}
			fmt.Fprintf(c.stdout, "good signature by %s", s.Identity)
			if comment != "" {
				fmt.Fprintf(c.stdout, " (%s)", message(comment))
			}
			fmt.Fprintf(c.stdout, "\n%s\n", s.Digest())
			return nil
		},
	}
	r.fetchFlags(cmd)
	c.outputFlag(cmd)
	return cmd
}

// inspection is bali inspect's answer, stable as JSON.
type inspection struct {
	Digest    string      `json:"digest"`
	Tree      string      `json:"tree,omitempty"`
	Signature string      `json:"signature"` // good, none
	Identity  string      `json:"identity,omitempty"`
	Trusted   bool        `json:"trusted"`
	Comment   string      `json:"comment,omitempty"`
	Bytes     int64       `json:"bytes"`
	Unpacked  int64       `json:"unpacked"`
	Image     *seal.Image `json:"image"`
	Files     []fileInfo  `json:"files"`
}

type fileInfo struct {
	Mode  string    `json:"mode"`
	UID   int       `json:"uid"`
	GID   int       `json:"gid"`
	Size  int64     `json:"size"`
	MTime time.Time `json:"mtime"`
	Path  string    `json:"path"`
	Link  string    `json:"link,omitempty"`
}

func (c *cli) inspect() *cobra.Command {
	var r reading
	var files bool
	cmd := &cobra.Command{
		Use:   "inspect FILE|URL",
		Short: "show what an image holds, how it starts and who signed it",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			src, err := c.open(cmd.Context(), args[0], &r)
			if err != nil {
				return named(args[0], err)
			}
			defer src.Close()
			in, err := c.look(src, r.limits())
			if err != nil {
				return named(args[0], err)
			}
			src.bar.Close()
			if c.output == "json" {
				return c.json(in)
			}
			return c.show(in, files)
		},
	}
	cmd.Flags().BoolVar(&files, "files", true, "list the files; --files=false leaves them out")
	r.flags(cmd)
	c.outputFlag(cmd)
	return cmd
}

func (c *cli) look(src *source, l seal.Limits) (*inspection, error) {
	l.Unsigned = true
	r, err := seal.NewReader(src, l)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	in := &inspection{Image: r.Image(), Signature: "good", Files: []fileInfo{}}
	for {
		e, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, err
		}
		in.Unpacked += e.Size
		in.Files = append(in.Files, fileInfo{
			Mode: modeString(e), UID: e.UID, GID: e.GID, Size: e.Size, MTime: time.Unix(e.ModTime, 0).UTC(), Path: e.Path, Link: e.Link,
		})
	}
	s, err := r.Finish()
	in.Bytes = r.Consumed()
	switch {
	case errors.Is(err, seal.ErrUnsigned):
		in.Signature, in.Digest = "none", s.Digest()
		return in, nil
	case err != nil:
		return nil, err
	}
	in.Digest, in.Tree, in.Identity = s.Digest(), fmt.Sprintf("%x", s.Tree), s.Identity.String()
	if p, err := c.policy(nil, false); err == nil {
		in.Comment, err = p.who(s.Identity)
		in.Trusted = err == nil
	}
	return in, nil
}

func modeString(e *seal.Entry) string {
	m := fs.FileMode(e.Mode & 0o777)
	for bit, flag := range map[uint32]fs.FileMode{0o4000: fs.ModeSetuid, 0o2000: fs.ModeSetgid, 0o1000: fs.ModeSticky} {
		if e.Mode&bit != 0 {
			m |= flag
		}
	}
	switch e.Kind {
	case seal.Dir:
		m |= fs.ModeDir
	case seal.Symlink:
		m |= fs.ModeSymlink
	case seal.FIFO:
		m |= fs.ModeNamedPipe
	case seal.BlockDev:
		m |= fs.ModeDevice
	case seal.CharDev:
		m |= fs.ModeDevice | fs.ModeCharDevice
	}
	return m.String()
}

func (c *cli) show(in *inspection, files bool) error {
	w := tabwriter.NewWriter(c.stdout, 0, 8, 2, ' ', 0)
	row := func(k string, v any) { fmt.Fprintf(w, "%s\t%v\n", k, v) }
	list := func(k string, v []string) {
		if len(v) > 0 {
			row(k, fmt.Sprintf("%q", v))
		}
	}
	text := func(k, v string) {
		if v != "" {
			row(k, fmt.Sprintf("%q", v))
		}
	}
	row("digest", in.Digest)
	switch {
	case in.Signature == "none":
		row("signature", "none")
	case in.Trusted:
		row("signature", "good, trusted")
	default:
		row("signature", "good, by an identity that is not trusted here")
	}
	if in.Identity != "" {
		row("identity", in.Identity)
	}
	text("comment", in.Comment)
	i := in.Image
	row("platform", fmt.Sprintf("%q", i.OS+"/"+i.Architecture+i.Variant))
	list("entrypoint", i.Entrypoint)
	list("cmd", i.Cmd)
	list("env", i.Env)
	text("workdir", i.Workdir)
	text("user", i.User)
	text("stop signal", i.StopSignal)
	for _, k := range sortedKeys(i.Labels) {
		row("label", fmt.Sprintf("%q=%q", k, i.Labels[k]))
	}
	text("source", i.Source)
	row("size", fmt.Sprintf("%d bytes, %d unpacked, %d entries", in.Bytes, in.Unpacked, len(in.Files)))
	if err := w.Flush(); err != nil || !files {
		return err
	}
	fmt.Fprintln(c.stdout)
	for _, f := range in.Files {
		fmt.Fprintf(c.stdout, "%s %5d:%-5d %10d %s %s", f.Mode, f.UID, f.GID, f.Size, f.MTime.Format(time.DateTime), printable(f.Path))
		if f.Link != "" {
			fmt.Fprintf(c.stdout, " -> %s", printable(f.Link))
		}
		fmt.Fprintln(c.stdout)
	}
	return nil
}

func (c *cli) extract() *cobra.Command {
	var r reading
	var identities []string
	var insecure, owners bool
	var u seal.Unpack
	cmd := &cobra.Command{
		Use:   "extract FILE|URL DIR",
		Short: "unpack a trusted image into a new folder",
		Long: `Unpack a trusted image into a new folder. The folder appears once the
signature over every byte is found good, and not before.

setuid and setgid bits and file capabilities are dropped without --setid.`,
		Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			p, err := c.policy(identities, insecure)
			if err != nil {
				return err
			}
			src, err := c.open(cmd.Context(), args[0], &r)
			if err != nil {
				return named(args[0], err)
			}
			defer src.Close()
			u.Owners = owners
			l := r.limits()
			l.Unsigned = insecure
			if err := extractTo(cmd.Context(), src, l, &u, p, args[1]); err != nil {
				return named(args[0], err)
			}
			return nil
		},
	}
	f := cmd.Flags()
	f.StringArrayVarP(&identities, "identity", "i", nil, "accept this identity and no other")
	f.BoolVar(&insecure, "insecure", false, "accept an image that nobody, or anybody, signed")
	f.BoolVar(&owners, "owners", os.Geteuid() == 0, "keep user and group ids, which takes root")
	f.BoolVar(&u.Setid, "setid", false, "keep setuid and setgid bits and file capabilities")
	f.BoolVar(&u.Devices, "devices", false, "make device nodes, which takes root")
	r.flags(cmd)
	return cmd
}

// extractTo unpacks beside the target and moves it there when it is verified.
func extractTo(ctx context.Context, src io.Reader, l seal.Limits, u *seal.Unpack, p *policy, to string) (err error) {
	to = filepath.Clean(to)
	if _, err := os.Lstat(to); err == nil {
		return fmt.Errorf("%s: %w: extract makes a new folder", to, fs.ErrExist)
	}
	parent, prefix := filepath.Dir(to), "."+filepath.Base(to)+"-unverified-"
	if err := sweep(parent, prefix); err != nil {
		return err
	}
	tmp, err := os.MkdirTemp(parent, prefix)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, removeTree(tmp))
		}
	}()
	dir, err := os.Open(tmp)
	if err != nil {
		return err
	}
	defer dir.Close()
	if err := unix.Flock(int(dir.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return fmt.Errorf("lock %s: %w", tmp, err)
	}
	r, err := seal.NewReader(src, l)
	if err != nil {
		return err
	}
	defer r.Close()
	s, err := u.Into(ctx, r, dir)
	if err := p.accept(s, err); err != nil {
		return err
	}
	if err := dir.Chmod(0o755); err != nil {
		return err
	}
	return os.Rename(tmp, to)
}

// sweep removes what killed extractions left: running ones hold a lock.
func sweep(parent, prefix string) error {
	left, err := os.ReadDir(parent)
	if err != nil {
		return err
	}
	for _, e := range left {
		if !strings.HasPrefix(e.Name(), prefix) {
			continue
		}
		name := filepath.Join(parent, e.Name())
		dir, err := os.Open(name)
		if err != nil {
			return err
		}
		if unix.Flock(int(dir.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {
			err = removeTree(name)
		}
		if err := errors.Join(err, dir.Close()); err != nil {
			return err
		}
	}
	return nil
}

// removeTree removes folders too that their modes protect from their owner.
func removeTree(dir string) error {
	err := os.RemoveAll(dir)
	if !errors.Is(err, fs.ErrPermission) {
		return err
	}
	err = filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			return os.Chmod(p, 0o700) // before it is read
		}
		return err
	})
	return errors.Join(err, os.RemoveAll(dir))
}
