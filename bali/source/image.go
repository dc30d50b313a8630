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
	if want := o.platform(); o.Platform.Architecture != "" && cfg.Architecture != want.Architecture {
		return nil, fmt.Errorf("%s: it is for %s/%s, not for %s", from, cfg.OS, cfg.Architecture, want)
	}
	layers, err := img.Layers()
	if err != nil {
		return nil, fmt.Errorf("%s: layers: %w", from, err)
	}
	r := &Rootfs{opt: o, Image: describe(cfg, from)}
	r.top = newDir(0, 0)
	if r.spool, err = newSpool(); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			r.Close()
		}
	}()
	if r.opt.MaxSize == 0 {
		r.opt.MaxSize = seal.DefaultMaxSize
	}
	for i, l := range layers {
		if err := r.layer(ctx, l, i+1); err != nil {
			return nil, fmt.Errorf("%s: layer %d of %d: %w", from, i+1, len(layers), err)
		}
	}
	r.Size = r.sum(r.top, make(map[*inode]bool))
	return r, nil
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
	t := tar.NewReader(z)
	for {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		h, err := t.Next()
		if errors.Is(err, io.EOF) {
			// to the end, where go-containerregistry compares the digest
			_, err = io.Copy(io.Discard, z)
			return err
		}
		if err != nil {
			return err
		}
		if err := r.member(h, t, number); err != nil {
			return fmt.Errorf("%s: %w", h.Name, err)
		}
	}
}

// Whiteouts: OCI image-spec, layer.md.
const (
	whiteout = ".wh."
	opaque   = ".wh..wh..opq"
)

func (r *Rootfs) member(h *tar.Header, content io.Reader, layer int) error {
	if h.Typeflag == tar.TypeXGlobalHeader {
		return nil
	}
	p := path.Clean("/" + h.Name)[1:]
	if p == "" {
		return nil // the root folder itself
	}
	dir, err := r.parent(p, layer)
	if err != nil {
		return err
	}
	base := path.Base(p)
	switch {
	case base == opaque:
		dir.prune(layer)
		return nil
	case strings.HasPrefix(base, whiteout):
		delete(dir.children, base[len(whiteout):])
		return nil
	}
	n, err := r.node(h, p, content, layer)
	if err != nil || n == nil {
		return err
	}
	if old := dir.children[base]; old != nil && old.Kind == seal.Dir && n.Kind == seal.Dir {
		n.children = old.children
	}
	dir.children[base] = n
	return nil
}

func (r *Rootfs) node(h *tar.Header, p string, content io.Reader, layer int) (*node, error) {
	if h.Typeflag == tar.TypeLink {
		target := r.find(path.Clean("/" + h.Linkname)[1:], layer)
		if target == nil || target.Kind == seal.Dir {
			return nil, fmt.Errorf("hard link to %q, which is no file", h.Linkname)
		}
		return &node{inode: target.inode, layer: layer}, nil
	}
	clean := *h
	clean.Name, clean.Mode, clean.Linkname = p, h.Mode&0o7777, h.Linkname
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
	n := &node{inode: &inode{Entry: *e}, layer: layer}
	switch e.Kind {
	case seal.Dir:
		n.children = make(map[string]*node)
	case seal.File:
		if r.opt.MaxSize -= e.Size; r.opt.MaxSize < 0 {
			return nil, fmt.Errorf("%w: raise --max-size if that is right", seal.ErrTooLarge)
		}
		if n.offset, err = r.spool.Seek(0, io.SeekCurrent); err != nil {
			return nil, err
		}
		if _, err := io.Copy(r.spool, content); err != nil {
			return nil, err
		}
	}
	return n, nil
}
