package vdocker

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	securejoin "github.com/cyphar/filepath-securejoin"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/sys/user"
	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/driver-cradle/guest"
	"github.com/cradlestack/cradlestack/internal/dockerhttp"
	"github.com/cradlestack/cradlestack/spec"
)

// statHeader tells what is at the path, as base64 of JSON.
const statHeader = "X-Docker-Container-Path-Stat"

// found is something in a container.
type found struct {
	root *root
	dir  *os.File
	base string // in dir; "": dir itself
	info fs.FileInfo
	name string // as asked for, absolute
}

func (f *found) Close() {
	f.dir.Close()
	f.root.Close()
}

// find looks a path of the request up. A slash or dot at its end follows a link to a directory, as in docker cp.
func find(r *http.Request, c *guest.Container) (*found, error) {
	name := dockerhttp.Parameter(r, "path")
	if name == "" {
		return nil, dockerhttp.Invalid("missing path: the request's parameter path is empty")
	}
	name = cleanPath(name)
	root, err := openRoot(c.Rootfs())
	if err != nil {
		return nil, err
	}
	f := &found{root: root, name: name}
	f.dir, f.base, f.info, err = root.lookup(name)
	if err != nil {
		root.Close()
		return nil, lookupError(err, r, name)
	}
	return f, nil
}

// cleanPath is a path of the container without detours. A slash or dot at its end stays: it means something.
func cleanPath(name string) string {
	clean := path.Join("/", name)
	switch {
	case path.Base("/"+name) == ".":
		return strings.TrimSuffix(clean, "/") + "/."
	case strings.HasSuffix(name, "/") && clean != "/":
		return clean + "/"
	}
	return clean
}

func lookupError(err error, r *http.Request, name string) error {
	if errors.Is(err, fs.ErrNotExist) {
		return dockerhttp.NewError(http.StatusNotFound, fmt.Sprintf("Could not find the file %s in container %s", name, r.PathValue("id")))
	}
	if errors.Is(err, unix.ENOTDIR) {
		return dockerhttp.Invalid("%s is not a directory", name)
	}
	return err
}

// setStat adds the header that docker cp decides by.
func (f *found) setStat(w http.ResponseWriter, c *guest.Container) error {
	s := container.PathStat{Name: path.Base(f.name), Size: f.info.Size(), Mode: f.info.Mode(), Mtime: f.info.ModTime()}
	if s.Mode&fs.ModeSymlink != 0 {
		// Where it leads in the container, be there something or not.
		target, err := securejoin.SecureJoin(c.Rootfs(), f.name)
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(c.Rootfs(), target)
		if err != nil {
			return err
		}
		s.LinkTarget = path.Join("/", rel)
	}
	text, err := json.Marshal(s)
	if err != nil {
		return err
	}
	w.Header().Set(statHeader, base64.StdEncoding.EncodeToString(text))
	return nil
}

func (a *api) statPath(w http.ResponseWriter, r *http.Request, c *guest.Container) error {
	f, err := find(r, c)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.setStat(w, c)
}

func (a *api) getArchive(w http.ResponseWriter, r *http.Request, c *guest.Container) error {
	f, err := find(r, c)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.setStat(w, c); err != nil {
		return err
	}
	w.Header().Set("Content-Type", "application/x-tar")
	if err := pack(r.Context(), w, f.dir, f.base, archiveName(f.name), false); err != nil {
		return cutOff(r)
	}
	c.Emit("archive-path", nil)
	return nil
}

// archiveName is what the names in an archive begin with: docker cp expects the last element of the path that it asked for, which is
// "/" for the root.
func archiveName(asked string) string {
	if strings.HasSuffix(asked, "/.") {
		return "."
	}
	return path.Base(asked)
}

// cutOff ends an answer that can't be completed: the client sees a broken transfer, not the end of an archive. It returns where
// the client has gone.
func cutOff(r *http.Request) error {
	if r.Context().Err() != nil {
		return nil //nolint:nilerr // nobody is left to tell
	}
	panic(http.ErrAbortHandler)
}

func (a *api) putArchive(w http.ResponseWriter, r *http.Request, c *guest.Container) error {
	name := dockerhttp.Parameter(r, "path")
	if name == "" {
		return dockerhttp.Invalid("missing path: the request's parameter path is empty")
	}
	root, err := openRoot(c.Rootfs())
	if err != nil {
		return err
	}
	defer root.Close()
	dir, err := root.open(path.Join("/", name), unix.O_PATH)
	if err != nil {
		return lookupError(err, r, name)
	}
	info, err := dir.Stat()
	dir.Close()
	if err != nil {
		return err
	}
	if !info.IsDir() {
		return dockerhttp.Invalid("extraction point is not a directory")
	}
	s := c.Spec()
	u := &unpacker{ctx: r.Context(), root: root, base: path.Join("/", name), noReplace: dockerhttp.Truth(r, "noOverwriteDirNonDir")}
	if u.writable, err = writable(root, s); err != nil {
		return err
	}
	if _, err := u.parent(u.base); err != nil { // refused before anything is read
		return err
	}
	if dockerhttp.Truth(r, "copyUIDGID") && s.User != "" {
		if u.owner, err = lookupOwner(root, s.User); err != nil {
			return err
		}
	}
	if err := u.unpack(r.Body); err != nil {
		return err
	}
	c.Emit("extract-to-dir", nil)
	w.WriteHeader(http.StatusOK)
	return nil
}

var (
	errReadOnlyRoot   = dockerhttp.NewError(http.StatusForbidden, "container rootfs is marked read-only")
	errReadOnlyVolume = dockerhttp.NewError(http.StatusForbidden, "mounted volume is marked read-only")
)

// writable tells directories that may be written to: not on a root that the container has read-only, nor on such a volume.
func writable(root *root, s spec.Container) (func(*os.File) error, error) {
	rootMount, err := mountID(root.dir)
	if err != nil {
		return nil, err
	}
	readOnly := s.ReadOnly || slices.ContainsFunc(s.Mounts, func(m spec.Mount) bool { return path.Clean("/"+m.Path) == "/" && m.ReadOnly })
	return func(dir *os.File) error {
		mount, err := mountID(dir)
		if err != nil {
			return err
		}
		if mount == rootMount && readOnly {
			return errReadOnlyRoot
		}
		var st unix.Statfs_t
		if err := unix.Fstatfs(int(dir.Fd()), &st); err == nil && st.Flags&unix.ST_RDONLY != 0 {
			return errReadOnlyVolume
		}
		return nil
	}, nil
}

// lookupOwner gives the ids of the container's user, by its own files.
func lookupOwner(root *root, name string) (*[2]int, error) {
	open := func(file string) *os.File {
		f, err := root.open(file, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY)
		if err != nil {
			return nil
		}
		if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() || info.Size() > 4<<20 {
			f.Close()
			return nil
		}
		return f
	}
	passwd, group := open("/etc/passwd"), open("/etc/group")
	defer passwd.Close()
	defer group.Close()
	u, err := user.GetExecUser(name, nil, passwd, group)
	if err != nil {
		return nil, dockerhttp.Invalid("user %s: %v", name, err)
	}
	return &[2]int{u.Uid, u.Gid}, nil
}

// export answers docker export: the container's root without what is mounted in it. With the parameter layer, which docker has not, it is what the
// container has changed alone, as a layer of an image.
func (a *api) export(w http.ResponseWriter, r *http.Request, c *guest.Container) error {
	var changed []container.FilesystemChange
	layer := dockerhttp.Truth(r, "layer")
	if layer {
		var err error
		if changed, err = changesOf(c); err != nil {
			return err
		}
	}
	all, err := openRoot(c.Rootfs())
	if err != nil {
		return err
	}
	defer all.Close()
	root, err := all.withoutMounts()
	if err != nil {
		return err
	}
	defer root.Close()
	w.Header().Set("Content-Type", "application/octet-stream")
	if layer {
		if packLayer(r.Context(), w, root, changed) != nil {
			return cutOff(r)
		}
		return nil
	}
	if err := pack(r.Context(), w, root.dir, "", "", true); err != nil {
		return cutOff(r)
	}
	c.Emit("export", nil)
	return nil
}
