package webdav

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/csi-plugin/tree"
)

// A change is what a request does to the volume, for the grant's user.
type change struct {
	*volume
	grant Grant
}

// own gives what was just made to whom the grant says, and to the directory's group where that passes its group on.
func (c change) own(f *os.File, parent fs.FileInfo, dir bool, perm fs.FileMode) error {
	gid := c.grant.GID
	if st, ok := parent.Sys().(*unixStat); ok && parent.Mode()&fs.ModeSetgid != 0 {
		gid = int(st.Gid)
		if dir {
			perm |= fs.ModeSetgid
		}
	}
	return errors.Join(f.Chown(c.grant.UID, gid), f.Chmod(perm))
}

// parent is the directory that a name is in. That it is not there is a conflict (RFC 4918 §9.7.1).
func (c change) parent(name string) (fs.FileInfo, error) {
	fi, err := c.stat(path.Dir(name))
	if err == nil && !fi.IsDir() || err != nil && explain(err).code == http.StatusNotFound {
		return nil, refuse(http.StatusConflict, "%s is no directory", path.Dir(name))
	}
	return fi, err
}

// target is where a name leads: a link to a file stays one when the file is written anew. A link that leads nowhere, or out, is replaced itself.
func (c change) target(name string) string {
	for range 8 {
		fi, err := c.root.Lstat(rel(name))
		if err != nil || fi.Mode().Type() != fs.ModeSymlink {
			break
		}
		to, err := c.root.Readlink(rel(name))
		if err != nil || path.IsAbs(to) {
			break
		}
		if to = path.Join(path.Dir(name), to); visible(to) != nil {
			break
		}
		// Where a directory on the way is a link itself, that may be another file.
		if there, err := c.stat(to); err != nil || !c.same(name, there) {
			break
		}
		name = to
	}
	return name
}

// same says whether a name leads to a file.
func (c change) same(name string, file fs.FileInfo) bool {
	fi, err := c.stat(name)
	return err == nil && os.SameFile(fi.(info).FileInfo, file.(info).FileInfo)
}

// put makes a file of what r has, or replaces one: whoever reads sees the old one or the new one. Once all is there, admit is asked whether that may be.
func (c change) put(ctx context.Context, name string, r io.Reader, admit func(isNew bool) error) (now info, created bool, err error) {
	parent, err := c.parent(name)
	if err != nil {
		return info{}, false, err
	}
	part, done, err := c.part()
	if err != nil {
		return info{}, false, err
	}
	defer done()
	f, err := c.root.OpenFile(part, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return info{}, false, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if _, err := io.Copy(f, r); err != nil {
		return info{}, false, err
	}
	if err := c.own(f, parent, false, 0o644); err != nil {
		return info{}, false, err
	}
	_, leave, err := c.grant.Gate.Enter(ctx)
	if err != nil {
		return info{}, false, err
	}
	defer leave()
	// What does not depend on the upload's time is done before all others have to wait.
	name = c.target(name)
	old, err := c.open(name)
	switch {
	case err == nil:
		defer old.Close()
		if old.info.IsDir() {
			return info{}, false, refuse(http.StatusMethodNotAllowed, "%s is a directory", name)
		}
		if err := c.inherit(f, old); err != nil {
			return info{}, false, err
		}
	case explain(err).code != http.StatusNotFound:
		return info{}, false, err
	}
	if err := c.timed(f.Sync); err != nil {
		return info{}, false, err
	}
	if created, err = c.replace(part, name, admit); err != nil {
		return info{}, false, err
	}
	fi, err := f.Stat()
	return info{fi}, created, errors.Join(err, c.sync(path.Dir(name)))
}

// replace lets a part be the file, if that is still admitted.
func (c change) replace(part, name string, admit func(isNew bool) error) (isNew bool, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	_, err = c.stat(name)
	isNew = err != nil
	if err := admit(isNew); err != nil {
		return false, err
	}
	return isNew, c.root.Rename(part, rel(name))
}

// inherit gives a file what is not its content of the one that it replaces.
func (c change) inherit(f *os.File, old *file) error {
	if st, ok := old.info.Sys().(*unixStat); ok {
		if err := f.Chown(int(st.Uid), int(st.Gid)); err != nil {
			return err
		}
	}
	if err := f.Chmod(old.info.Mode().Perm()); err != nil { // no set-user-id bit: the content is another
		return err
	}
	return inheritProperties(f, old)
}

func inheritProperties(f *os.File, old *file) error {
	data, err := old.attribute()
	if err != nil || data == nil {
		return err
	}
	return unix.Fsetxattr(int(f.Fd()), attribute, data, 0)
}

// mkdir makes a directory.
func (c change) mkdir(name string) error {
	parent, err := c.parent(name)
	if err != nil {
		return err
	}
	if err := c.root.Mkdir(rel(name), 0o755); errors.Is(err, fs.ErrExist) {
		return refuse(http.StatusMethodNotAllowed, "%s exists", name)
	} else if err != nil {
		return err
	}
	d, err := c.root.Open(rel(name))
	if err != nil {
		return err
	}
	return errors.Join(c.own(d, parent, true, 0o755), d.Sync(), d.Close(), c.sync(path.Dir(name)))
}

// exists says whether a name is taken, be it by a link that leads nowhere.
func (c change) exists(name string) (bool, error) {
	_, err := c.root.Lstat(rel(name))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

// remove takes a name away at once, with all below it.
func (c change) remove(name string) error {
	part, done, err := c.part()
	if err != nil {
		return err
	}
	defer done()
	if err := c.root.Rename(rel(name), part); err != nil {
		return err
	}
	return errors.Join(c.sync(path.Dir(name)), tree.RemoveAll(c.root, part))
}

// move gives a file or directory another name. What has that one is gone then, but not before.
func (c change) move(from, to string) (replaced bool, err error) {
	if _, err := c.parent(to); err != nil {
		return false, err
	}
	if replaced, err = c.place(rel(from), to); err != nil {
		return false, err
	}
	return replaced, errors.Join(c.sync(path.Dir(to)), c.sync(path.Dir(from)))
}

// place renames a path of the root to a name in the volume, and removes what had it.
func (c change) place(from, to string) (replaced bool, err error) {
	old, err := c.root.Lstat(rel(to))
	if errors.Is(err, fs.ErrNotExist) {
		return false, c.root.Rename(from, rel(to))
	}
	if err != nil {
		return false, err
	}
	is, err := c.root.Lstat(from)
	if err != nil {
		return false, err
	}
	if os.SameFile(old, is) {
		return false, refuse(http.StatusForbidden, "both are names of the same file")
	}
	if !old.IsDir() && !is.IsDir() {
		return true, c.root.Rename(from, rel(to))
	}
	aside, done, err := c.part()
	if err != nil {
		return false, err
	}
	defer done()
	if err := c.root.Rename(rel(to), aside); err != nil {
		return false, err
	}
	if err := c.root.Rename(from, rel(to)); err != nil {
		return false, errors.Join(err, c.root.Rename(aside, rel(to)))
	}
	return true, nil
}

// maxDepth bounds how deep a tree is copied, and maxCopies how many of a volume are at the same time: three files of the process are open for each step.
const maxDepth, maxCopies = 200, 4

// copy makes a copy of a file or directory, of the latter without what is in it unless deep says so. It is there whole or not at all.
func (c change) copy(ctx context.Context, source *file, to string, deep bool) (replaced bool, err error) {
	parent, err := c.parent(to)
	if err != nil {
		return false, err
	}
	part, done, err := c.part()
	if err != nil {
		return false, err
	}
	defer done()
	if !source.info.IsDir() {
		err = c.copyFile(c.root, source, part, parent)
	} else {
		depth := 0
		if deep {
			depth = maxDepth
			select {
			case c.copies <- struct{}{}:
				defer func() { <-c.copies }()
			case <-ctx.Done():
				return false, context.Cause(ctx)
			}
		}
		err = c.copyDirectory(ctx, source, part, parent, depth)
	}
	if err != nil {
		return false, err
	}
	if err := c.syncAll(); err != nil {
		return false, err
	}
	if replaced, err = c.place(part, to); err != nil {
		return false, err
	}
	return replaced, c.sync(path.Dir(to))
}

func (c change) copyFile(root *os.Root, source *file, name string, parent fs.FileInfo) error {
	f, err := root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, source.File)
	return errors.Join(err, c.own(f, parent, false, source.info.Mode().Perm()), inheritProperties(f, source), f.Close())
}

// copyDirectory copies what is in source as well, down to a depth.
func (c change) copyDirectory(ctx context.Context, source *file, name string, parent fs.FileInfo, depth int) error {
	if err := c.root.Mkdir(name, 0o700); err != nil {
		return err
	}
	from, err := source.volume.root.OpenRoot(rel(source.name))
	if err != nil {
		return err
	}
	defer from.Close()
	to, err := c.root.OpenRoot(name)
	if err != nil {
		return err
	}
	defer to.Close()
	if err := c.dress(to, source.info, source, parent); err != nil || depth == 0 {
		return err
	}
	return c.copyEntries(ctx, from, to, source.name == "/", parent, depth)
}

// dress gives a copied directory what its origin has, and makes it the grant's.
func (c change) dress(to *os.Root, origin fs.FileInfo, source *file, parent fs.FileInfo) error {
	d, err := to.Open(".")
	if err != nil {
		return err
	}
	return errors.Join(c.own(d, parent, true, origin.Mode().Perm()), inheritProperties(d, source), d.Close())
}

func (c change) copyEntries(ctx context.Context, from, to *os.Root, top bool, parent fs.FileInfo, depth int) error {
	dir, err := from.Open(".")
	if err != nil {
		return err
	}
	defer dir.Close()
	for {
		entries, err := dir.ReadDir(256)
		for _, e := range entries {
			if err := context.Cause(ctx); err != nil {
				return err
			}
			if top && slices.Contains(Hidden, e.Name()) {
				continue
			}
			if err := c.copyEntry(ctx, from, to, e, parent, depth); err != nil {
				return fmt.Errorf("copy %s: %w", e.Name(), err)
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// copyEntry copies a link as a link, and leaves out what is no file.
func (c change) copyEntry(ctx context.Context, from, to *os.Root, e fs.DirEntry, parent fs.FileInfo, depth int) error {
	name := e.Name()
	switch {
	case e.Type() == fs.ModeSymlink:
		target, err := from.Readlink(name)
		if err != nil {
			return err
		}
		return errors.Join(to.Symlink(target, name), to.Lchown(name, c.grant.UID, c.grant.GID))
	case e.Type().IsRegular():
		f, err := from.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW, 0)
		if err != nil {
			return err
		}
		defer f.Close()
		fi, err := f.Stat()
		if err != nil || !fi.Mode().IsRegular() {
			return err
		}
		return c.copyFile(to, &file{File: f, info: info{fi}, volume: c.volume, name: name}, name, parent)
	case !e.IsDir():
		return nil
	case depth == 1:
		return refuse(http.StatusForbidden, "the tree is deeper than %d directories", maxDepth)
	}
	if err := to.Mkdir(name, 0o700); err != nil {
		return err
	}
	deeperFrom, err := from.OpenRoot(name)
	if err != nil {
		return err
	}
	defer deeperFrom.Close()
	deeperTo, err := to.OpenRoot(name)
	if err != nil {
		return err
	}
	defer deeperTo.Close()
	d, err := deeperFrom.Open(".")
	if err != nil {
		return err
	}
	fi, err := d.Stat()
	if err == nil {
		err = c.dress(deeperTo, fi, &file{File: d, info: info{fi}, volume: c.volume, name: name}, parent)
	}
	if d.Close(); err != nil {
		return err
	}
	return c.copyEntries(ctx, deeperFrom, deeperTo, false, parent, depth-1)
}
