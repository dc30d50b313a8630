package source

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"path"
	"slices"
	"strings"

	"github.com/cradlestack/cradlestack/bali/seal"
)

// node is a name in the tree. Names that are hard links share an inode.
type node struct {
	*inode
	layer    int // the last one that touched it or something below it
	children map[string]*node
}

// inode is an entry without its path, and where its content is.
type inode struct {
	seal.Entry
	offset int64  // in the spool
	file   string // or in the folder
	first  string // path under which it was written
}

func newDir(layer int, mtime int64) *node {
	return &node{
		inode: &inode{Entry: seal.Entry{Kind: seal.Dir, Mode: 0o755, ModTime: mtime}},
		layer: layer, children: make(map[string]*node),
	}
}

const maxLinks = 40 // as Linux has it

// parent walks to the folder that p lies in. A layer may name it through
// symbolic links of lower layers; they are followed within the tree, and what
// is missing is made.
func (r *Rootfs) parent(p string, layer int) (*node, error) {
	return r.walk(path.Dir(p), layer, 0)
}

func (r *Rootfs) walk(dir string, layer, links int) (*node, error) {
	at, where := r.top, ""
	at.layer = layer
	parts := strings.Split(strings.Trim(dir, "/"), "/")
	for i, c := range parts {
		if c == "" || c == "." {
			continue
		}
		next := at.children[c]
		if next != nil && next.Kind == seal.Symlink {
			if links >= maxLinks {
				return nil, fmt.Errorf("%s: too many symbolic links", dir)
			}
			to := next.Link
			if !path.IsAbs(to) {
				to = path.Join("/", where, to)
			}
			return r.walk(path.Clean("/"+path.Join(append([]string{to}, parts[i+1:]...)...)), layer, links+1)
		}
		if next == nil || next.Kind != seal.Dir {
			next = newDir(layer, r.opt.time(0))
			at.children[c] = next
		}
		next.layer = layer
		at, where = next, path.Join(where, c)
	}
	return at, nil
}

// find looks a hard link's target up.
func (r *Rootfs) find(p string, layer int) *node {
	dir, err := r.parent(p, layer)
	if err != nil {
		return nil
	}
	return dir.children[path.Base(p)]
}

// prune removes what lower layers left below n.
func (n *node) prune(layer int) {
	for c, child := range n.children {
		if child.layer < layer {
			delete(n.children, c)
		} else {
			child.prune(layer)
		}
	}
}

// Write gives every entry to w in its order.
func (r *Rootfs) Write(ctx context.Context, w *seal.Writer) error {
	return r.write(ctx, w, r.top, "", make([]byte, 256<<10))
}

func (r *Rootfs) write(ctx context.Context, w *seal.Writer, n *node, at string, buf []byte) error {
	for _, c := range slices.Sorted(maps.Keys(n.children)) {
		child, p := n.children[c], path.Join(at, c)
		if p == seal.ImageDir {
			continue
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		e := child.Entry
		e.Path = p
		linked := child.Kind == seal.File && child.first != ""
		if linked {
			e.Kind, e.Link, e.Size, e.Xattrs = seal.Hardlink, child.first, 0, nil
		}
		if err := w.WriteEntry(&e); err != nil {
			return err
		}
		if child.Kind == seal.File && !linked {
			child.first = p
			if err := r.copy(w, child.inode, buf); err != nil {
				return fmt.Errorf("read %s: %w", p, err)
			}
		}
		if err := r.write(ctx, w, child, p, buf); err != nil {
			return err
		}
	}
	return nil
}

func (r *Rootfs) copy(w io.Writer, i *inode, buf []byte) error {
	if i.file == "" {
		_, err := io.CopyBuffer(w, io.NewSectionReader(r.spool, i.offset, i.Size), buf)
		return err
	}
	f, err := r.dir.Open(i.file)
	if err != nil {
		return err
	}
	defer f.Close()
	n, err := io.CopyBuffer(w, io.LimitReader(f, i.Size), buf)
	if err == nil && n != i.Size {
		err = errors.New("it shrank while it was read")
	}
	return err
}
