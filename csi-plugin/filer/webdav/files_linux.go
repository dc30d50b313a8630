package webdav

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/net/webdav"
	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/csi-plugin/filer/snapshots"
	"github.com/cradlestack/cradlestack/csi-plugin/tree"
)

// A volume is a directory that is served.
type volume struct {
	root   *os.Root
	locks  *locks                   // nil of a snapshot
	synced func(took time.Duration) // nil where nobody asks

	snapshots *snapshots.Opened // nil where there are none

	copies chan struct{} // one of maxCopies for each directory that is being copied

	mu    sync.Mutex
	parts int // in its temporary directory
}

func openVolume(name, root, locksFile string) (*volume, error) {
	l, err := openLocks(locksFile)
	if err != nil {
		return nil, err
	}
	r, err := os.OpenRoot(root)
	if err != nil {
		return nil, err
	}
	l.prefix = "/" + name
	if err := tree.RemoveAll(r, temporary); err != nil { // a process that was killed leaves it
		return nil, errors.Join(err, r.Close())
	}
	return &volume{root: r, locks: l, copies: make(chan struct{}, maxCopies)}, nil
}

// rel is a path in the volume as os.Root has it.
func rel(name string) string {
	if name = strings.TrimPrefix(path.Clean("/"+name), "/"); name == "" {
		return "."
	}
	return name
}

// visible refuses what is none of the volume's files.
func visible(name string) error {
	first, _, _ := strings.Cut(rel(name), "/")
	if slices.Contains(Hidden, first) {
		return &fs.PathError{Op: "open", Path: name, Err: fs.ErrNotExist}
	}
	return nil
}

// stat follows links in the volume. What is neither a file nor a directory is not there.
func (v *volume) stat(name string) (fs.FileInfo, error) {
	err := visible(name)
	if err == nil && v.former(name) {
		err = &fs.PathError{Op: "stat", Path: name, Err: fs.ErrNotExist}
	}
	if err != nil {
		return nil, err
	}
	fi, err := v.root.Stat(rel(name))
	if err == nil && !fi.IsDir() && !fi.Mode().IsRegular() {
		return nil, &fs.PathError{Op: "stat", Path: name, Err: fs.ErrNotExist}
	}
	if err != nil {
		return nil, err
	}
	return info{fi}, nil
}

// open opens a file or directory for reading. O_NONBLOCK is for a FIFO that has taken its place.
func (v *volume) open(name string) (*file, error) {
	if _, err := v.stat(name); err != nil {
		return nil, err
	}
	f, err := v.root.OpenFile(rel(name), os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, err
	}
	fi, err := f.Stat()
	if err == nil && !fi.IsDir() && !fi.Mode().IsRegular() {
		err = &fs.PathError{Op: "open", Path: name, Err: fs.ErrNotExist}
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return &file{File: f, info: info{fi}, volume: v, name: path.Clean("/" + name)}, nil
}

// sync puts names in a directory on stable storage.
func (v *volume) sync(dir string) error {
	d, err := v.root.Open(rel(dir))
	if err != nil {
		return err
	}
	return errors.Join(v.timed(d.Sync), d.Close())
}

// timed does what brings something to stable storage.
func (v *volume) timed(sync func() error) error {
	began := time.Now()
	err := sync()
	if v.synced != nil {
		v.synced(time.Since(began))
	}
	return err
}

// syncAll does that with the whole file system.
func (v *volume) syncAll() error {
	d, err := v.root.Open(".")
	if err != nil {
		return err
	}
	return errors.Join(v.timed(func() error { return unix.Syncfs(int(d.Fd())) }), d.Close())
}

// part is a new name in the temporary directory. done removes what is there then, and the directory with the last one.
func (v *volume) part() (name string, done func(), err error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.parts == 0 {
		if err := tree.RemoveAll(v.root, temporary); err != nil {
			return "", nil, err
		}
		if err := v.root.Mkdir(temporary, 0o700); err != nil {
			return "", nil, err
		}
	}
	v.parts++
	name = temporary + "/" + rand.Text()
	return name, func() {
		_ = tree.RemoveAll(v.root, name) // what stays is removed with the directory
		v.mu.Lock()
		defer v.mu.Unlock()
		if v.parts--; v.parts == 0 {
			_ = tree.RemoveAll(v.root, temporary)
		}
	}, nil
}

// An info has the entity tag that all of this package agrees about.
type info struct{ fs.FileInfo }

// ETag is webdav.ETager's. A file that is uploaded anew is another one; one that is written in place has another time or size, as far as the kernel's clock tells.
func (i info) ETag(context.Context) (string, error) { return i.etag(), nil }

func (i info) etag() string {
	var ino uint64
	if st, ok := i.Sys().(*unixStat); ok {
		ino = st.Ino
	}
	return fmt.Sprintf(`"%x-%x-%x"`, ino, i.ModTime().UnixNano(), i.Size())
}

// A file is one that is open for reading, as package webdav takes it.
type file struct {
	*os.File
	info   info
	volume *volume
	name   string
	prefix string // of the volume's URLs
}

func (f *file) Stat() (fs.FileInfo, error) { return f.info, nil }

func (f *file) Write([]byte) (int, error) { return 0, fs.ErrPermission }

// Readdir hides what is not to be seen, and what can't be read.
func (f *file) Readdir(n int) ([]fs.FileInfo, error) {
	all, err := f.File.Readdir(n)
	seen := all[:0]
	for _, fi := range all {
		if f.name != "/" || !slices.Contains(Hidden, fi.Name()) && !f.volume.former(fi.Name()) {
			seen = append(seen, fi)
		}
	}
	return seen, err
}

// tooMany says whether a directory has more than n names.
func (f *file) tooMany(n int) (bool, error) {
	for {
		names, err := f.Readdirnames(1024)
		if n -= len(names); n < 0 {
			return true, nil
		}
		if errors.Is(err, io.EOF) {
			return false, nil
		}
		if err != nil {
			return false, err
		}
	}
}

// A view is the volume as package webdav reads it, to list and set properties. It changes no names.
type view struct {
	*volume
	prefix string
}

var errNotHere = errors.New("the library was not asked to do this")

func (view) Mkdir(context.Context, string, fs.FileMode) error { return errNotHere }
func (view) RemoveAll(context.Context, string) error          { return errNotHere }
func (view) Rename(context.Context, string, string) error     { return errNotHere }

// OpenFile opens for reading, whatever the flags: a property is set by a descriptor that reads.
func (v view) OpenFile(_ context.Context, name string, _ int, _ fs.FileMode) (webdav.File, error) {
	f, err := v.open(name)
	if err != nil {
		return nil, err
	}
	f.prefix = v.prefix
	return f, nil
}

func (v view) Stat(_ context.Context, name string) (fs.FileInfo, error) { return v.stat(name) }
