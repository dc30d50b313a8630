package cold

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/cradlestack/cradlestack/internal/durable"
)

// A Folder is a Store in a directory of this host, which may be another's by NFS.
type Folder struct{ path string }

// OpenFolder makes the directory where it is missing.
func OpenFolder(dir string) (*Folder, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	return &Folder{dir}, nil
}

// temporary is what a name begins with that is not whole yet.
const temporary = ".part-"

// Put is Store's.
func (f *Folder) Put(ctx context.Context, name string, data []byte) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	to := filepath.Join(f.path, filepath.FromSlash(name))
	dir := filepath.Dir(to)
	if err := makeDir(dir); err != nil {
		return err
	}
	part, err := os.OpenFile(filepath.Join(dir, temporary+filepath.Base(to)), os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = part.Write(data)
	if err = errors.Join(err, part.Sync(), part.Close()); err != nil {
		return err
	}
	if err := os.Rename(part.Name(), to); err != nil {
		return err
	}
	return durable.SyncDir(dir)
}

// makeDir makes a directory and those above it that are missing, as durably as what will be in it.
func makeDir(dir string) error {
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	above := filepath.Dir(dir)
	if err := makeDir(above); err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return durable.SyncDir(above)
}

// Get is Store's.
func (f *Folder) Get(ctx context.Context, name string, most int64) ([]byte, error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	o, err := os.Open(filepath.Join(f.path, filepath.FromSlash(name)))
	if err != nil {
		return nil, err
	}
	defer o.Close()
	return readMost(o, most)
}

// List is Store's.
func (f *Folder) List(ctx context.Context, prefix string, each func(string) error) error {
	err := fs.WalkDir(os.DirFS(f.path), path.Clean("./"+prefix), func(name string, d fs.DirEntry, err error) error {
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return nil // removed meanwhile
		case err != nil:
			return err
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case d.IsDir() || strings.HasPrefix(d.Name(), temporary):
			return nil
		}
		return each(name)
	})
	return err
}

// Delete is Store's.
func (f *Folder) Delete(_ context.Context, name string) error {
	err := os.Remove(filepath.Join(f.path, filepath.FromSlash(name)))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}
