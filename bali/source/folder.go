package source

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"runtime"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/bali/seal"
)

func epoch(s int64) time.Time { return time.Unix(s, 0) }

// Folder gathers a folder as it is. If it was unpacked from an image, the
// description in it is taken over.
func Folder(ctx context.Context, name string, o Options) (_ *Rootfs, err error) {
	dir, err := os.OpenRoot(name)
	if err != nil {
		return nil, err
	}
	r := &Rootfs{opt: o, dir: dir, top: newDir(0, 0)}
	defer func() {
		if err != nil {
			dir.Close()
		}
	}()
	r.Image = seal.Image{Version: 1, OS: "linux", Architecture: runtime.GOARCH}
	if o.Platform.Architecture != "" {
		r.Image.Architecture = o.Platform.Architecture
	}
	if b, err := dir.ReadFile(seal.ImagePath); err == nil {
		r.Image = seal.Image{}
		if err := json.Unmarshal(b, &r.Image); err != nil {
			return nil, fmt.Errorf("%s/%s: %w", name, seal.ImagePath, err)
		}
	} else if !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	inodes := make(map[[2]uint64]*inode)
	err = fs.WalkDir(dir.FS(), ".", func(p string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case p == ".":
			return nil
		case p == seal.ImageDir:
			return fs.SkipDir
		}
		fi, err := d.Info()
		if err != nil {
			return err
		}
		n, err := r.add(p, fi, inodes)
		if err != nil || n == nil {
			return err
		}
		at, err := r.parent(p, 0)
		if err != nil {
			return err
		}
		at.children[path.Base(p)] = n
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("gather %s: %w", name, err)
	}
	return r, nil
}

func (r *Rootfs) add(p string, fi fs.FileInfo, inodes map[[2]uint64]*inode) (*node, error) {
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok {
		return nil, errors.New("this system's files can't be read")
	}
	key := [2]uint64{uint64(st.Dev), st.Ino} //nolint:unconvert // Dev has 32 bits on some systems
	if i := inodes[key]; i != nil && i.Kind == seal.File {
		return &node{inode: i}, nil
	}
	e := seal.Entry{Path: p, Mode: uint32(st.Mode) & 0o7777, ModTime: r.opt.time(fi.ModTime().Unix())} //nolint:unconvert // 16 bits on some
	if r.opt.KeepOwners {
		e.UID, e.GID = int(st.Uid), int(st.Gid)
	}
	n := &node{inode: &inode{file: p}}
	var err error
	switch fi.Mode().Type() {
	case 0:
		e.Kind, e.Size = seal.File, fi.Size()
		r.Size += e.Size
		inodes[key] = n.inode
		e.Xattrs, err = r.xattrs(p)
	case fs.ModeDir:
		e.Kind, n.children = seal.Dir, make(map[string]*node)
	case fs.ModeSymlink:
		e.Kind, e.Mode = seal.Symlink, 0o777
		e.Link, err = r.dir.Readlink(p)
	case fs.ModeNamedPipe:
		e.Kind = seal.FIFO
	case fs.ModeDevice:
		e.Kind = seal.BlockDev
	case fs.ModeDevice | fs.ModeCharDevice:
		e.Kind = seal.CharDev
	default:
		r.opt.warn("%s is a socket and left out", p)
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", p, err)
	}
	if e.IsDevice() {
		if !r.opt.Devices {
			r.opt.warn("%s is a device node and left out: keep it with --devices", p)
			return nil, nil
		}
		e.Major, e.Minor = unix.Major(uint64(st.Rdev)), unix.Minor(uint64(st.Rdev)) //nolint:unconvert // Rdev has 32 bits on some systems
	}
	n.Entry = e
	return n, nil
}

func (r *Rootfs) xattrs(p string) (map[string]string, error) {
	f, err := r.dir.Open(p)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return seal.ReadXattrs(f)
}
