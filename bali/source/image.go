package source

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"path"
	"runtime"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/cradlestack/cradlestack/bali/seal"
)

func (o *Options) platform() v1.Platform {
	if o.Platform.Architecture != "" {
		return o.Platform
	}
	return v1.Platform{OS: "linux", Architecture: runtime.GOARCH}
}

// flatten lays the layers over each other.
func flatten(ctx context.Context, img v1.Image, from string, o Options) (_ *Rootfs, err error) {
	cfg, err := img.ConfigFile()
	if err != nil {
		return nil, fmt.Errorf("%s: configuration: %w", from, err)
	}
	layers, err := img.Layers()
	if err != nil {
		return nil, fmt.Errorf("%s: layers: %w", from, err)
	}
	r, err := newRootfs(o)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			r.Close()
		}
	}()
	if err := r.configure(cfg, from); err != nil {
		return nil, err
	}
	for i, l := range layers {
		if err := r.layer(ctx, l, i+1); err != nil {
			return nil, fmt.Errorf("%s: layer %d of %d: %w", from, i+1, len(layers), err)
		}
	}
	r.Size = r.sum(r.top, make(map[*inode]bool))
	return r, nil
}

// newRootfs is an empty one with room for content.
func newRootfs(o Options) (*Rootfs, error) {
	if o.MaxSize == 0 {
		o.MaxSize = seal.DefaultMaxSize
	}
	spool, err := newSpool()
	return &Rootfs{opt: o, top: newDir(0, 0), spool: spool}, err
}

// configure takes an image's configuration over.
func (r *Rootfs) configure(cfg *v1.ConfigFile, from string) error {
	if want := r.opt.platform(); r.opt.Platform.Architecture != "" && cfg.Architecture != want.Architecture {
		return fmt.Errorf("%s: it is for %s/%s, not for %s", from, cfg.OS, cfg.Architecture, want)
	}
	r.Image = describe(cfg, from)
	return nil
}

func describe(cfg *v1.ConfigFile, from string) seal.Image {
	c := cfg.Config
	i := seal.Image{
		Version: 1, OS: cfg.OS, Architecture: cfg.Architecture, Variant: cfg.Variant,
		Entrypoint: c.Entrypoint, Cmd: c.Cmd, Env: c.Env, Workdir: c.WorkingDir, User: c.User,
		StopSignal: c.StopSignal, Labels: c.Labels, Source: from,
	}
	if i.OS == "" {
		i.OS = "linux"
	}
	if i.Architecture == "" {
		i.Architecture = runtime.GOARCH
	}
	return i
}

func (r *Rootfs) sum(n *node, seen map[*inode]bool) (size int64) {
	if !seen[n.inode] {
		seen[n.inode] = true
		size = n.Size
	}
	for _, c := range n.children {
		size += r.sum(c, seen)
	}
	return size
}

func (r *Rootfs) layer(ctx context.Context, l v1.Layer, number int) error {
	z, err := l.Uncompressed()
	if err != nil {
		return err
	}
	defer z.Close()
	members, err := r.read(ctx, z)
	if err != nil {
		return err
	}
	return r.lay(members, number)
}

// member is one of a layer's, with its content in the spool already.
type member struct {
	path   string
	link   string // of a hard link
	*inode        // nil for hard links and whiteouts
}

// read takes a layer's members in, to the stream's end, where its digest is
// compared.
func (r *Rootfs) read(ctx context.Context, layer io.Reader) ([]member, error) {
	var out []member
	// headers and padding count too: a compressed layer may be nothing else
	layer = &bounded{layer, r.opt.MaxSize + seal.DefaultMaxSize}
	t := tar.NewReader(layer)
	for {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		h, err := t.Next()
		if errors.Is(err, io.EOF) {
			_, err = io.Copy(io.Discard, layer)
			return out, err
		}
		if err != nil {
			return nil, err
		}
		m := member{path: path.Clean("/" + h.Name)[1:]}
		switch base := path.Base(m.path); {
		case h.Typeflag == tar.TypeXGlobalHeader || m.path == "": // the root folder itself
			continue
		case strings.HasPrefix(base, whiteout):
		case h.Typeflag == tar.TypeLink:
			m.link = path.Clean("/" + h.Linkname)[1:]
		default:
			if m.inode, err = r.inode(h, m.path, t); err != nil {
				return nil, fmt.Errorf("%s: %w", h.Name, err)
			}
			if m.inode == nil {
				continue
			}
		}
		if len(out) >= seal.DefaultMaxEntries {
			return nil, fmt.Errorf("%w: more than %d entries in a layer", seal.ErrTooLarge, seal.DefaultMaxEntries)
		}
		out = append(out, m)
	}
}

// bounded fails after so many bytes.
type bounded struct {
	r    io.Reader
	left int64
}

func (b *bounded) Read(p []byte) (int, error) {
	n, err := b.r.Read(p)
	if b.left -= int64(n); b.left < 0 {
		return n, fmt.Errorf("%w: raise --max-size if that is right", seal.ErrTooLarge)
	}
	return n, err
}

// Whiteouts: OCI image-spec, layer.md.
const (
	whiteout = ".wh."
	opaque   = ".wh..wh..opq"
)

// lay lays members over what is there.
func (r *Rootfs) lay(members []member, layer int) error {
	for _, m := range members {
		if err := r.member(m, layer); err != nil {
			return fmt.Errorf("%s: %w", m.path, err)
		}
	}
	return nil
}

func (r *Rootfs) member(m member, layer int) error {
	dir, err := r.parent(m.path, layer)
	if err != nil {
		return err
	}
	base := path.Base(m.path)
	switch {
	case base == opaque:
		dir.prune(layer)
		return nil
	case strings.HasPrefix(base, whiteout):
		delete(dir.children, base[len(whiteout):])
		return nil
	}
	n := &node{inode: m.inode, layer: layer}
	if n.inode == nil {
		target := r.find(m.link, layer)
		if target == nil || target.Kind == seal.Dir {
			return fmt.Errorf("hard link to %q, which is no file", m.link)
		}
		n.inode = target.inode
	}
	if n.Kind == seal.Dir {
		n.children = make(map[string]*node)
		if old := dir.children[base]; old != nil && old.Kind == seal.Dir {
			n.children = old.children
		}
	}
	dir.children[base] = n
	return nil
}

// inode makes one of a header, nil for what is left out.
func (r *Rootfs) inode(h *tar.Header, p string, content io.Reader) (*inode, error) {
	clean := *h
	clean.Name, clean.Mode = p, h.Mode&0o7777
	if h.Typeflag == tar.TypeGNUSparse {
		clean.Typeflag = tar.TypeReg // archive/tar reads the holes as zeros
	}
	clean.PAXRecords = map[string]string{}
	for k, v := range h.PAXRecords {
		if seal.KeepXattr(strings.TrimPrefix(k, "SCHILY.xattr.")) {
			clean.PAXRecords[k] = v
		}
	}
	if clean.Typeflag == tar.TypeSymlink {
		clean.Mode = 0o777
	} else {
		clean.Linkname = ""
	}
	if clean.Typeflag != tar.TypeReg && clean.Typeflag != tar.TypeDir {
		clean.PAXRecords = nil
	}
	if clean.Typeflag != tar.TypeReg {
		clean.Size = 0
	}
	clean.ModTime = epoch(r.opt.time(h.ModTime.Unix()))
	e, err := seal.FromHeader(&clean)
	if err != nil {
		return nil, err
	}
	if e.IsDevice() && !r.opt.Devices {
		r.opt.warn("%s is a device node and left out: keep it with --devices", p)
		return nil, nil
	}
	i := &inode{Entry: *e}
	if e.Kind != seal.File {
		return i, nil
	}
	if r.opt.MaxSize -= e.Size; r.opt.MaxSize < 0 {
		return nil, fmt.Errorf("%w: raise --max-size if that is right", seal.ErrTooLarge)
	}
	if i.offset, err = r.spool.Seek(0, io.SeekCurrent); err != nil {
		return nil, err
	}
	if r.opt.Progress != nil {
		content = io.TeeReader(content, r.opt.Progress)
	}
	_, err = io.Copy(r.spool, content)
	return i, err
}
