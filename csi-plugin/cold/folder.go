package cold

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"sync"
	"syscall"

	"github.com/cradlestack/cradlestack/csi-plugin/volume"
)

// A Folder is a Store in a directory of this host, which may be another's by NFS. Nothing that lies in it leads out of it: others may write there.
type Folder struct {
	path string

	mu    sync.Mutex
	mark  string // that the directory has where it is the one that is meant; "" where nobody knows
	fresh string // one for a directory that has none yet
}

// OpenFolder looks at nothing yet: the directory may be missing, and come.
func OpenFolder(dir string) (*Folder, error) {
	dir, err := filepath.Abs(dir)
	return &Folder{path: dir}, err
}

// Begun says whether a directory is one that a plugin has used as cold storage.
func Begun(dir string) bool {
	for _, name := range []string{marks, listsDir} {
		if fi, err := os.Stat(filepath.Join(dir, name)); err == nil && fi.IsDir() {
			return true
		}
	}
	return false
}

// marks has an empty file for each backend that has used the directory, whose note says its name: a directory that lacks it is another one, such as that on which nothing is mounted.
const marks = "pools/"

// use finds out what mark the directory has; begin gives it one where the backend has used none in its place before.
func (f *Folder) use(ctx context.Context, n volume.Noter, begin bool) error {
	if f.known() == "" {
		note, err := n.Note(ctx)
		if err != nil {
			return err
		}
		mark, place, _ := strings.Cut(note, " ")
		switch {
		case place == f.path:
			f.know(mark)
		case begin:
			if mark, err = f.begin(); err == nil {
				err = n.SetNote(ctx, mark+" "+f.path)
			}
			if err != nil {
				return err
			}
			f.know(mark)
		}
	}
	root, err := f.open()
	if err != nil {
		return err
	}
	return root.Close()
}

func (f *Folder) known() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.mark
}

func (f *Folder) know(mark string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.mark = mark
}

// begin makes the directory where it is missing, and a mark in it: the same one again, should the backend not have kept its note.
func (f *Folder) begin() (mark string, err error) {
	if err := os.MkdirAll(f.path, 0o700); err != nil {
		return "", err
	}
	if f.fresh == "" {
		f.fresh = rand.Text()
	}
	return f.fresh, f.Put(context.Background(), marks+f.fresh, nil)
}

// open opens the directory, for one thing that is done in it: so it can be unmounted and mounted meanwhile, and what is done comes to where it was looked at.
func (f *Folder) open() (*os.Root, error) {
	root, err := os.OpenRoot(f.path)
	mark := f.known()
	if err == nil && mark != "" {
		if _, err = root.Stat(marks + mark); err != nil {
			root.Close()
		}
	}
	switch {
	case err == nil:
		return root, nil
	case mark != "" && errors.Is(err, fs.ErrNotExist):
		// No fs.ErrNotExist, which would be that of an object.
		return nil, fmt.Errorf("cold storage %s: %w: it is not the directory that copies were made to before; mount that one there (should this one have its place from now on, make the file %s in it)",
			f.path, volume.ErrUnavailable, marks+mark)
	default:
		return nil, fmt.Errorf("cold storage %s: %w: %s", f.path, volume.ErrUnavailable, err.Error())
	}
}

// temporary is what a name begins with that is not whole yet.
const temporary = ".part-"

// Put is Store's.
func (f *Folder) Put(ctx context.Context, name string, data []byte) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	root, err := f.open()
	if err != nil {
		return err
	}
	defer root.Close()
	dir, base := path.Split(name)
	dir = path.Clean(dir)
	if err := makeDir(root, dir); err != nil {
		return err
	}
	part := path.Join(dir, temporary+base)
	if err = write(root, part, data); err == nil {
		err = root.Rename(part, name)
	}
	if err != nil {
		return errors.Join(err, remove(root, part))
	}
	return syncDir(root, dir)
}

// write makes a file, whatever is there: who can write to the directory may have put there what leads elsewhere, or what nobody reads.
func write(root *os.Root, name string, data []byte) error {
	if err := remove(root, name); err != nil {
		return err
	}
	f, err := root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	return errors.Join(err, f.Sync(), f.Close())
}

func remove(root *os.Root, name string) error {
	err := root.Remove(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// makeDir makes a directory and those above it that are missing, as durably as what will be in it.
func makeDir(root *os.Root, dir string) error {
	if _, err := root.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	above := path.Dir(dir)
	if err := makeDir(root, above); err != nil {
		return err
	}
	if err := root.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return syncDir(root, above)
}

func syncDir(root *os.Root, dir string) error {
	d, err := root.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// Get is Store's.
func (f *Folder) Get(ctx context.Context, name string, most int64) ([]byte, error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	root, err := f.open()
	if err != nil {
		return nil, err
	}
	defer root.Close()
	o, err := root.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer o.Close()
	fi, err := o.Stat()
	if err != nil {
		return nil, err
	}
	if !fi.Mode().IsRegular() {
		return nil, fmt.Errorf("cold storage %s: %s is no file, but %v", f.path, name, fi.Mode())
	}
	return readMost(o, most)
}

// List is Store's.
func (f *Folder) List(ctx context.Context, prefix string, each func(string) error) error {
	root, err := f.open()
	if err != nil {
		return err
	}
	defer root.Close()
	return fs.WalkDir(root.FS(), path.Clean("./"+prefix), func(name string, d fs.DirEntry, err error) error {
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return nil // removed meanwhile
		case err != nil:
			return err
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case d.IsDir():
			return nil
		}
		return each(name) // what is not whole as well, which nothing else is called like
	})
}

// Delete is Store's.
func (f *Folder) Delete(_ context.Context, name string) error {
	root, err := f.open()
	if err != nil {
		return err
	}
	defer root.Close()
	return remove(root, name)
}
