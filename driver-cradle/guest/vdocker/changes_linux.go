package vdocker

import (
	"errors"
	"io/fs"
	"net/http"
	"os"
	"path"
	"path/filepath"
	"slices"
	"syscall"

	"github.com/moby/moby/api/types/container"
	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/driver-cradle/guest"
	"github.com/cradlestack/cradlestack/internal/dockerhttp"
)

// changes answers docker diff.
func (a *api) changes(w http.ResponseWriter, _ *http.Request, c *guest.Container) error {
	all, err := changesOf(c)
	if err != nil {
		return err
	}
	return dockerhttp.Answer(w, http.StatusOK, append([]container.FilesystemChange{}, all...))
}

// changesOf is what the writable layer has that the image has not. What is in a directory follows it.
func changesOf(c *guest.Container) ([]container.FilesystemChange, error) {
	if c.Upper() == "" {
		return nil, dockerhttp.NewError(http.StatusNotImplemented, "a volume is the container's root: there is no image to compare it with")
	}
	lowers := slices.Clone(c.Lowers())
	slices.Reverse(lowers)
	d := &differ{upper: c.Upper(), lowers: lowers}
	err := d.directory("/")
	return d.changes, err
}

// differ compares an overlay's upper directory with its lower ones, topmost first. In upper, a device 0:0 stands for what was
// deleted, and a directory marked opaque hides what is below (Documentation/filesystems/overlayfs.rst).
type differ struct {
	upper   string
	lowers  []string
	changes []container.FilesystemChange
}

// ours are the places that a runtime makes in every root for what it mounts there; docker keeps them in a layer of its own.
var ours = []string{
	"/dev", "/dev/console", "/dev/pts", "/dev/shm", "/proc", "/sys", "/etc/hostname", "/etc/hosts", "/etc/mtab", "/etc/resolv.conf", "/.dockerenv",
}

// directory records the changes in one directory, each after that of its parent.
func (d *differ) directory(dir string) error {
	entries, err := os.ReadDir(filepath.Join(d.upper, dir))
	if err != nil {
		return err
	}
	for _, e := range entries {
		name := path.Join(dir, e.Name())
		info, err := e.Info()
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		if err := d.entry(name, info); err != nil {
			return err
		}
	}
	return nil
}

func (d *differ) entry(name string, info fs.FileInfo) error {
	before, below := d.below(name)
	if isWhiteout(info) {
		if below {
			d.record(name, container.ChangeDelete)
		}
		return nil
	}
	place := len(d.changes)
	if info.IsDir() {
		if err := d.directory(name); err != nil {
			return err
		}
		if d.opaque(name) && below && before.IsDir() {
			if err := d.hidden(name); err != nil {
				return err
			}
		}
	}
	kind := container.ChangeModify
	switch {
	case !below:
		if slices.Contains(ours, name) && len(d.changes) == place {
			return nil
		}
		kind = container.ChangeAdd
	case len(d.changes) > place:
		// What is in it has changed, so it has.
	case info.IsDir() && before.IsDir() && sameDirectory(before, info, d.onlyOurs(name)):
		return nil
	}
	d.changes = slices.Insert(d.changes, place, container.FilesystemChange{Kind: kind, Path: name})
	return nil
}

func (d *differ) record(name string, kind container.ChangeType) {
	d.changes = append(d.changes, container.FilesystemChange{Kind: kind, Path: name})
}

// below gives what the image has at a path.
func (d *differ) below(name string) (fs.FileInfo, bool) {
	for _, lower := range d.lowers {
		info, err := os.Lstat(filepath.Join(lower, name))
		if err == nil {
			return info, !isWhiteout(info)
		}
		if d.hides(lower, name) {
			return nil, false
		}
	}
	return nil, false
}

// hides tells whether a layer hides what those below it have at a path that it does not have itself: one of the directories above is
// a whiteout, opaque or no directory there.
func (d *differ) hides(lower, name string) bool {
	for dir := path.Dir(name); dir != "/"; dir = path.Dir(dir) {
		info, err := os.Lstat(filepath.Join(lower, dir))
		if err == nil && (!info.IsDir() || isOpaque(filepath.Join(lower, dir))) {
			return true
		}
	}
	return false
}

func (d *differ) opaque(name string) bool { return isOpaque(filepath.Join(d.upper, name)) }

// hidden records as deleted what the image has in a directory that was deleted and made again.
func (d *differ) hidden(dir string) error {
	seen := map[string]bool{}
	for _, lower := range d.lowers {
		entries, err := os.ReadDir(filepath.Join(lower, dir))
		if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ENOTDIR) {
			return err
		}
		for _, e := range entries {
			name := path.Join(dir, e.Name())
			if _, below := d.below(name); seen[name] || !below {
				continue
			}
			seen[name] = true
			if _, err := os.Lstat(filepath.Join(d.upper, name)); errors.Is(err, fs.ErrNotExist) {
				d.record(name, container.ChangeDelete)
			}
		}
	}
	return nil
}

// onlyOurs tells whether all that a directory has in upper is the runtime's.
func (d *differ) onlyOurs(dir string) bool {
	entries, err := os.ReadDir(filepath.Join(d.upper, dir))
	return err == nil && len(entries) > 0 && !slices.ContainsFunc(entries, func(e fs.DirEntry) bool { return !slices.Contains(ours, path.Join(dir, e.Name())) })
}

// sameDirectory tells whether a directory was only copied up on the way to something in it. An entry of the runtime's has changed its
// time.
func sameDirectory(before, now fs.FileInfo, anyTime bool) bool {
	a, b := before.Sys().(*syscall.Stat_t), now.Sys().(*syscall.Stat_t)
	return before.Mode() == now.Mode() && a.Uid == b.Uid && a.Gid == b.Gid && (anyTime || before.ModTime().Equal(now.ModTime()))
}

func isWhiteout(info fs.FileInfo) bool {
	st, ok := info.Sys().(*syscall.Stat_t)
	return ok && info.Mode()&fs.ModeCharDevice != 0 && st.Rdev == 0
}

func isOpaque(dir string) bool {
	var value [1]byte
	n, err := unix.Lgetxattr(dir, "trusted.overlay.opaque", value[:])
	return err == nil && n == 1 && value[0] == 'y'
}

// sizes gives the bytes of the writable layer, and of all layers together.
func sizes(c *guest.Container) (writable, all int64, err error) {
	if upper := c.Upper(); upper != "" {
		if writable, err = treeSize(upper); err != nil {
			return 0, 0, err
		}
	}
	all = writable
	for _, lower := range c.Lowers() {
		n, err := treeSize(lower)
		if err != nil {
			return 0, 0, err
		}
		all += n
	}
	return writable, all, nil
}

// treeSize adds up the sizes of files, each counted once.
func treeSize(dir string) (n int64, err error) {
	seen := map[uint64]bool{}
	err = filepath.WalkDir(dir, func(_ string, e fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil || e.IsDir() {
			return err
		}
		info, err := e.Info()
		if err != nil {
			return nil //nolint:nilerr // gone
		}
		if st, ok := info.Sys().(*syscall.Stat_t); ok && st.Nlink > 1 {
			if seen[st.Ino] {
				return nil
			}
			seen[st.Ino] = true
		}
		n += info.Size()
		return nil
	})
	return n, err
}
