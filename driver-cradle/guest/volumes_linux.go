package guest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/driver-cradle/wire"
	"github.com/cradlestack/cradlestack/spec"
)

// A volume is one of the pod's, mounted once; containers get bind mounts of it.
type volume struct {
	spec spec.Volume
	dev  string // block: its device node
	path string // where the agent has it: a directory, or a single file
	file bool

	mu     sync.Mutex // freeze, thaw, grow
	frozen bool
	expiry *time.Timer // of a freeze
}

// copies says whether an empty one gets the image's content, as docker does with volumes and does not with bind mounts.
func (v *volume) copies() bool { return v.spec.Directory == nil || v.spec.Directory.Fill }

// shared says whether other guests may have it mounted at the same time.
func (v *volume) shared() bool {
	return v.spec.NFS != nil || v.spec.Ceph != nil || v.spec.Directory != nil
}

func (v *volume) readOnly() bool {
	s := v.spec
	return s.Block != nil && s.Block.ReadOnly || s.Directory != nil && s.Directory.ReadOnly || s.NFS != nil && s.NFS.ReadOnly || s.Ceph != nil && s.Ceph.ReadOnly
}

// mountVolumes brings up all volumes at once.
func (p *Pod) mountVolumes(ctx context.Context) error {
	l := p.launch
	raw := map[string]bool{} // true: only raw mounts so far
	for _, c := range l.Launch.Containers {
		for _, m := range c.Mounts {
			if only, seen := raw[m.Volume]; !seen {
				raw[m.Volume] = m.Raw
			} else {
				raw[m.Volume] = only && m.Raw
			}
		}
	}
	if err := p.mountShare(); err != nil {
		return err
	}
	var wg sync.WaitGroup
	errs := make([]error, len(l.Launch.Volumes))
	for i, s := range l.Launch.Volumes {
		v := &volume{spec: s, path: filepath.Join(runDir, "volumes", s.Name)}
		if p.volumes[s.Name] != nil {
			return &stateError{ErrInvalid, fmt.Sprintf("volume %s is there twice", s.Name)}
		}
		p.volumes[s.Name] = v
		wg.Go(func() {
			if err := p.mountVolume(ctx, v, raw[s.Name]); err != nil {
				errs[i] = fmt.Errorf("volume %s: %w", s.Name, err)
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

func (p *Pod) mountVolume(ctx context.Context, v *volume, rawOnly bool) error {
	s := v.spec
	if s.Name != filepath.Base(s.Name) || strings.HasPrefix(s.Name, ".") {
		return &stateError{ErrInvalid, "its name is no file name"}
	}
	if s.Directory == nil && s.Scratch == nil {
		if err := os.MkdirAll(v.path, 0o755); err != nil {
			return err
		}
	}
	switch {
	case s.Block != nil:
		lun, ok := p.disk(wire.DiskVolume + s.Name)
		if !ok {
			return errors.New("the host attached no disk for it")
		}
		dev, err := p.uevents.disk(ctx, wire.DiskVolume+s.Name, lun)
		if err != nil {
			return err
		}
		v.dev = dev
		if rawOnly {
			return nil
		}
		return mountBlock(v)
	case s.Directory != nil:
		return p.mountDirectory(v)
	case s.NFS != nil:
		return mountNFS(ctx, s.NFS, v.path, p.Launch().Launch.ID)
	case s.Ceph != nil:
		return mountCeph(s.Ceph, v.path)
	case s.Tmpfs != nil:
		data := "mode=0755"
		if s.Tmpfs.Size > 0 {
			data += fmt.Sprintf(",size=%d", int64(s.Tmpfs.Size))
		}
		return mount("tmpfs", v.path, "tmpfs", 0, data)
	case s.Scratch != nil:
		v.path = filepath.Join(p.scratch, "volumes", s.Name)
		return os.MkdirAll(v.path, 0o755)
	}
	return &stateError{ErrInvalid, "none of block, directory, nfs, ceph, tmpfs, scratch is set"}
}

// mountBlock mounts a block volume whose file system is the one asked for. A blank disk was formatted by the host before; what is
// here and foreign is somebody's data.
func mountBlock(v *volume) error {
	b := v.spec.Block
	want := b.FSType
	if want == "" {
		want = "ext4"
	}
	kind, err := fsKindOf(v.dev)
	if err != nil {
		return err
	}
	switch {
	case kind == "blank":
		return fmt.Errorf("its disk is blank: the host formats it before the pod starts (mkfs.%s)", want)
	case kind == "":
		return fmt.Errorf("its disk holds neither ext4 nor xfs and is left as it is: attach it raw, or empty it first")
	case kind != want:
		return fmt.Errorf("its disk holds %s, not %s: set fsType to %s", kind, want, kind)
	}
	flags, data := parseMountOptions(0, b.Options)
	if v.readOnly() {
		flags |= unix.MS_RDONLY
	}
	if kind == "xfs" {
		data = append(spec.WithoutMountOptions(data, "nouuid"), "nouuid") // a snapshot's clone has its origin's uuid
	}
	err = mount(v.dev, v.path, kind, flags, strings.Join(data, ","))
	if errors.Is(err, unix.EROFS) && v.readOnly() {
		err = fmt.Errorf("its last user did not put its file system away, which is repaired by mounting it writable once: %w", err)
	}
	if err != nil {
		return err
	}
	if flags&unix.MS_RDONLY == 0 {
		dropLostFound(v.path)
	}
	return nil
}

// dropLostFound removes mkfs's directory from an otherwise empty file system: programs want a new volume to be empty (initdb), and
// fsck makes another when it needs one.
func dropLostFound(dir string) {
	if entries, err := os.ReadDir(dir); err == nil && len(entries) == 1 && entries[0].Name() == "lost+found" {
		_ = unix.Rmdir(filepath.Join(dir, "lost+found"))
	}
}

// shareOptions of 9p. Ownership and modes are checked here and set there; cache=mmap reads and writes through and yet lets programs
// map files shared; msize is the most that QEMU's virtqueue of 128 entries carries.
const shareOptions = "trans=virtio,version=9p2000.L,access=client,cache=mmap,msize=512000"

// mountShare mounts the one 9p device that all shared directories are in, if there is one in use.
func (p *Pod) mountShare() error {
	for _, d := range p.launch.Directories {
		if d.Type == "9p" {
			at := filepath.Join(runDir, "share")
			if err := os.Mkdir(at, 0o700); err != nil {
				return err
			}
			err := mount(wire.ShareTag, at, "9p", 0, shareOptions)
			if errors.Is(err, unix.ENODEV) {
				return fmt.Errorf("share directories: this boot package's kernel has no 9p: use the package %q, or virtiofs", "default")
			}
			if err == nil {
				err = attachShare(at)
			}
			return err
		}
	}
	return nil
}

// attachShare looks the root of a 9p file system up for the first time. Linux attaches a user then, and of two who do so at once one may be told
// that the root does not exist: it finds the other's new handle as that of the root's parent, which is the root, and walks to "/" from there
// (fs/9p/fid.c, v9fs_fid_lookup_with_uid). Nobody but this agent's user looks the root up: containers have what is below it.
func attachShare(root string) error {
	_, err := os.Lstat(root)
	return err
}

// mountDirectory finds a shared directory or file.
func (p *Pod) mountDirectory(v *volume) error {
	for _, d := range p.launch.Directories {
		if d.Volume != v.spec.Name {
			continue
		}
		root := filepath.Join(runDir, "share")
		if d.Type == "virtiofs" {
			root = filepath.Join(runDir, "virtiofs-"+v.spec.Name)
			if err := os.Mkdir(root, 0o700); err != nil {
				return err
			}
			if err := mount(d.Tag, root, "virtiofs", 0, ""); err != nil {
				return err
			}
		} else if d.Type != "9p" {
			return &stateError{ErrInvalid, fmt.Sprintf("its transport %q is neither 9p nor virtiofs", d.Type)}
		}
		v.file = d.File
		at, err := openMountPoint(runDir, filepath.Join("volumes", v.spec.Name), d.File)
		if err != nil {
			return err
		}
		defer at.Close()
		source, err := openBeneath(root, filepath.Join(".", d.Path))
		if err != nil {
			return err
		}
		defer source.Close()
		return bind(fdPath(source), at.path(), 0)
	}
	return errors.New("the host shared no directory for it")
}

// bindVolume puts a volume, or a part of it, at a container's mount point.
func bindVolume(v *volume, m spec.Mount, at mountPoint) error {
	source := v.path
	if m.Subpath != "" {
		f, err := v.part(m)
		if err != nil {
			return err
		}
		defer f.Close()
		source = fdPath(f)
	}
	var attributes uint64
	if m.ReadOnly || v.readOnly() {
		attributes = unix.MOUNT_ATTR_RDONLY
	}
	return bind(source, at.path(), attributes)
}

// isFile says whether what a mount names is a single file.
func (v *volume) isFile(m spec.Mount) (bool, error) {
	if m.Subpath == "" {
		return v.file, nil
	}
	f, err := v.part(m)
	if err != nil {
		return false, err
	}
	defer f.Close()
	st, err := f.Stat()
	return err == nil && !st.IsDir(), err
}

// part opens the part of a volume that a mount names, with docker's words for one that is not there or not inside (moby daemon/internal/safepath/errors.go).
func (v *volume) part(m spec.Mount) (*os.File, error) {
	f, err := openBeneath(v.path, filepath.Join(".", m.Subpath))
	switch {
	case errors.Is(err, unix.EXDEV):
		err = fmt.Errorf("path concatenation escapes the base directory: %w", err)
	case err != nil:
		err = fmt.Errorf("cannot access path %w", err)
	}
	if err != nil {
		return nil, fmt.Errorf("subpath %s of volume %s: %w", m.Subpath, m.Volume, err)
	}
	return f, nil
}

// disk gives the LUN that the host attached a disk at.
func (p *Pod) disk(key string) (lun int, ok bool) {
	for _, d := range p.launch.Disks {
		if d.Key == key {
			return d.LUN, true
		}
	}
	return 0, false
}
