package tree

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"

	"golang.org/x/sys/unix"
)

// RemoveAll removes a file or folder; that it is not there is no error. os.Root.RemoveAll has a directory open for each level, and who has a volume may make more of
// these than a process may have files open: what lies deeper than Deepest is moved up first.
func RemoveAll(root *os.Root, folder string) error {
	err := root.Remove(folder)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if !full(err) {
		return err
	}
	top, err := root.OpenRoot(folder)
	if err != nil {
		return err
	}
	defer top.Close()
	r := remover{top: top}
	if err := r.empty(top, ""); err != nil {
		return err
	}
	return root.Remove(folder)
}

// Deepest is how many levels are open at a time.
const Deepest = 50

// full says whether an error is that of a directory in which there is something.
func full(err error) bool { return errors.Is(err, unix.ENOTEMPTY) || errors.Is(err, unix.EEXIST) }

type remover struct {
	top   *os.Root
	moved int
}

// empty removes what is in dir, which is called at in the top one.
func (r *remover) empty(dir *os.Root, at string) error {
	for {
		names, err := some(dir)
		if err != nil || len(names) == 0 {
			return err
		}
		for _, name := range names {
			if err := r.remove(dir, name, path.Join(at, name)); err != nil {
				return err
			}
		}
	}
}

func (r *remover) remove(dir *os.Root, name, at string) error {
	err := dir.Remove(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if !full(err) {
		return err
	}
	if strings.Count(at, "/") >= Deepest {
		return r.up(at)
	}
	sub, err := dir.OpenRoot(name)
	if err != nil {
		return err
	}
	defer sub.Close()
	if err := r.empty(sub, at); err != nil {
		return err
	}
	return dir.Remove(name)
}

// up moves a directory to the top, which is emptied last.
func (r *remover) up(at string) error {
	for {
		r.moved++
		name := fmt.Sprintf(".deep-%d", r.moved)
		if _, err := r.top.Lstat(name); errors.Is(err, fs.ErrNotExist) { // else a call that was interrupted has left it
			return r.top.Rename(at, name)
		} else if err != nil {
			return err
		}
	}
}

// some names in a directory, none where it is empty.
func some(dir *os.Root) ([]string, error) {
	d, err := dir.Open(".")
	if err != nil {
		return nil, err
	}
	defer d.Close()
	names, err := d.Readdirnames(1000)
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return names, err
}
