package guest

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	securejoin "github.com/cyphar/filepath-securejoin"
	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/spec"
)

// A point is one thing mounted into a container.
type point struct {
	path    string
	volume  *volume // nil: tmpfs, or a file of the agent's
	mount   spec.Mount
	source  string // a file of the agent's
	options string // tmpfs
}

// assemble builds the container's root in the agent's mount namespace: layers and writable layer, then volumes, tmpfs and the files
// that docker mounts, outermost first.
func (c *Container) assemble() error {
	points, err := c.points()
	if err != nil {
		return err
	}
	if len(points) > 0 && points[0].path == "/" {
		if err := c.mountRootVolume(points[0]); err != nil {
			return err
		}
		points = points[1:]
	} else if err := c.mountOverlay(); err != nil {
		return err
	}
	if err := c.makeWorkingDir(); err != nil {
		return err
	}
	// Before anything covers it: what the image has where volumes go.
	for _, p := range points {
		if p.volume == nil || !p.volume.copies() || p.mount.NoCopy || p.mount.ReadOnly || p.volume.readOnly() {
			continue
		}
		if err := c.fill(p); err != nil {
			return fmt.Errorf("volume %s: %w", p.mount.Volume, err)
		}
	}
	return c.mountPoints(points)
}

// refresh makes the root as a new start finds it: tmpfs empty, docker's files as they were. Layers and volumes stay.
func (c *Container) refresh() error {
	points, err := c.points()
	if err != nil {
		return err
	}
	if len(c.spec.Tmpfs) == 0 {
		return c.writeFiles()
	}
	list, err := mountsBelow(c.rootfs)
	if err != nil {
		return err
	}
	for _, at := range list {
		if at == c.rootfs {
			continue
		}
		if err := unix.Unmount(at, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
			return &os.PathError{Op: "unmount", Path: at, Err: err}
		}
	}
	if len(points) > 0 && points[0].path == "/" {
		points = points[1:]
	}
	return c.mountPoints(points)
}

// points are the container's mounts, outermost first, as docker sorts them. Those below /dev, /proc and /sys are kept for the stage.
func (c *Container) points() ([]point, error) {
	if err := c.writeFiles(); err != nil {
		return nil, err
	}
	var all []point
	taken := map[string]bool{}
	add := func(p point) {
		p.path = filepath.Clean("/" + p.path)
		if !taken[p.path] {
			taken[p.path] = true
			all = append(all, p)
		}
	}
	c.nodes = nil
	for _, m := range c.spec.Mounts {
		v := c.pod.volumeNamed(m.Volume)
		if v == nil {
			return nil, &stateError{ErrInvalid, fmt.Sprintf("mount %s: there is no volume %s", m.Path, m.Volume)}
		}
		if m.Raw {
			n, err := rawNode(v, m.Path)
			if err != nil {
				return nil, err
			}
			c.nodes = append(c.nodes, n)
			continue
		}
		add(point{path: m.Path, volume: v, mount: m})
	}
	for path, options := range c.spec.Tmpfs {
		add(point{path: path, options: options})
	}
	for _, name := range []string{"hosts", "hostname", "resolv.conf"} {
		// moby container/container_unix.go NetworkMounts: as writable as the root is.
		add(point{path: "/etc/" + name, source: c.file(name), mount: spec.Mount{ReadOnly: c.spec.ReadOnly}})
	}
	slices.SortFunc(all, func(a, b point) int {
		return cmp.Or(strings.Count(strings.TrimSuffix(a.path, "/"), "/")-strings.Count(strings.TrimSuffix(b.path, "/"), "/"), strings.Compare(a.path, b.path))
	})
	c.late = nil
	var early []point
	for _, p := range all {
		if !inSystemDir(p.path) {
			early = append(early, p)
			continue
		}
		l, err := p.late()
		if err != nil {
			return nil, err
		}
		c.late = append(c.late, l)
	}
	return early, nil
}

func inSystemDir(path string) bool {
	for _, dir := range []string{"/dev", "/proc", "/sys"} {
		if path == dir || strings.HasPrefix(path, dir+"/") {
			return true
		}
	}
	return false
}

// late is a mount that the stage makes.
func (p point) late() (lateMount, error) {
	if p.volume == nil {
		flags, data, err := parseTmpfsOptions(p.options)
		return lateMount{Target: p.path, Flags: flags, Options: strings.Join(data, ",")}, err
	}
	if p.mount.Subpath != "" {
		return lateMount{}, &stateError{ErrInvalid, fmt.Sprintf("mount %s: no subpath of a volume can be mounted there", p.path)}
	}
	return lateMount{Source: p.volume.path, File: p.volume.file, Target: p.path, ReadOnly: p.mount.ReadOnly || p.volume.readOnly()}, nil
}

func rawNode(v *volume, path string) (deviceNode, error) {
	if !strings.HasPrefix(path, "/dev/") {
		path = "/dev/volumes/" + v.spec.Name
	}
	if v.dev == "" {
		return deviceNode{}, &stateError{ErrInvalid, fmt.Sprintf("volume %s is no block volume and can't be attached raw", v.spec.Name)}
	}
	var st unix.Stat_t
	if err := unix.Stat(v.dev, &st); err != nil {
		return deviceNode{}, &os.PathError{Op: "stat", Path: v.dev, Err: err}
	}
	return deviceNode{Path: path, Dev: st.Rdev}, nil
}

// baseLayer is below the image's layers and holds what docker's init layer adds where an image lacks it (moby
// daemon/initlayer/setup_unix.go): the places of what is mounted, and the marks by which programs know that they are in a container.
const baseLayer = runDir + "/l/base"

// makeBaseLayer makes it in the agent's memory; it is part of the template.
func makeBaseLayer() error {
	for _, dir := range []string{"dev/pts", "dev/shm", "proc", "sys", "etc"} {
		if err := os.MkdirAll(filepath.Join(baseLayer, dir), 0o755); err != nil {
			return err
		}
	}
	for _, file := range []string{".dockerenv", "etc/hosts", "etc/hostname", "etc/resolv.conf", "dev/console"} {
		if err := os.WriteFile(filepath.Join(baseLayer, file), nil, 0o755); err != nil {
			return err
		}
	}
	return os.Symlink("/proc/mounts", filepath.Join(baseLayer, "etc/mtab"))
}

// mountOverlay stacks the image's layers and the writable one.
func (c *Container) mountOverlay() error {
	lowers := slices.Clone(c.lowers)
	slices.Reverse(lowers) // overlayfs: uppermost first
	c.upper = filepath.Join(c.dir, "upper")
	work := filepath.Join(c.dir, "work")
	for dir, mode := range map[string]os.FileMode{c.upper: 0o755, work: 0o700} {
		if err := os.MkdirAll(dir, mode); err != nil {
			return err
		}
	}
	options := "lowerdir=" + strings.Join(lowers, ":") + ",upperdir=" + c.upper + ",workdir=" + work
	if len(options) >= os.Getpagesize() {
		return fmt.Errorf("%d layers are more than an overlay takes: build the image with fewer", len(lowers))
	}
	if err := mount("overlay", c.rootfs, "overlay", 0, options); err != nil {
		return err
	}
	return nil
}

// mountRootVolume makes a volume the root. When it is empty the image's content is copied in, once.
func (c *Container) mountRootVolume(p point) error {
	if len(c.spec.Layers) > 0 && !p.mount.ReadOnly && !p.volume.readOnly() && p.mount.Subpath == "" {
		if err := c.mountOverlay(); err != nil {
			return err
		}
		err := fillVolume(p.volume.path, c.rootfs, p.volume.shared(), c.pod.filling(p.mount.Volume, c.layersSize()))
		c.pod.filled()
		if uerr := unix.Unmount(c.rootfs, 0); err == nil && uerr != nil {
			err = &os.PathError{Op: "unmount", Path: c.rootfs, Err: uerr}
		}
		if err != nil {
			return err
		}
	}
	c.upper = ""
	at, err := openBeneath(c.rootfs, ".")
	if err != nil {
		return err
	}
	defer at.Close()
	// Read-only mounts of /: the stage does it, after it has made what is missing.
	m := p.mount
	m.ReadOnly = false
	return bindVolume(p.volume, m, mountPoint{at})
}

// makeWorkingDir makes WORKDIR in the writable layer, as docker does when it creates a container.
func (c *Container) makeWorkingDir() error {
	dir := filepath.Clean("/" + c.spec.WorkingDir)
	if dir == "/" || inSystemDir(dir) {
		return nil
	}
	at, err := openMountPoint(c.rootfs, dir, false)
	if err != nil {
		if errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.EEXIST) {
			return nil // entering it fails, with docker's exit code
		}
		return err
	}
	return at.Close()
}

// fill copies the image's content into an empty volume.
func (c *Container) fill(p point) error {
	file, err := p.volume.isFile(p.mount)
	if err != nil || file {
		return err
	}
	into := p.volume.path
	if p.mount.Subpath != "" {
		f, err := p.volume.part(p.mount)
		if err != nil {
			return err
		}
		defer f.Close()
		into = fdPath(f)
	}
	source, err := securejoin.SecureJoin(c.rootfs, p.path)
	if err != nil {
		return err
	}
	defer c.pod.filled()
	return fillVolume(into, source, p.volume.shared(), c.pod.filling(p.mount.Volume, 0))
}

// layersSize is about how many bytes the image's content has.
func (c *Container) layersSize() (size int64) {
	for _, dir := range c.lowers[1:] {
		var st unix.Statfs_t
		if unix.Statfs(dir, &st) == nil {
			size += int64(st.Blocks-st.Bfree) * st.Bsize
		}
	}
	return size
}

func (c *Container) mountPoints(points []point) error {
	for _, p := range points {
		if err := c.mountPoint(p); err != nil {
			return fmt.Errorf("mount %s: %w", p.path, err)
		}
	}
	return nil
}

func (c *Container) mountPoint(p point) error {
	file := p.source != ""
	if p.volume != nil {
		var err error
		if file, err = p.volume.isFile(p.mount); err != nil {
			return err
		}
	}
	existed := p.volume == nil && p.source == "" && c.has(p.path)
	at, err := openMountPoint(c.rootfs, p.path, file)
	if err != nil {
		return err
	}
	defer at.Close()
	switch {
	case p.volume != nil:
		return bindVolume(p.volume, p.mount, at)
	case p.source != "":
		if p.mount.ReadOnly {
			return bind(p.source, at.path(), unix.MOUNT_ATTR_RDONLY)
		}
		return bind(p.source, at.path(), 0)
	}
	flags, data, err := parseTmpfsOptions(p.options)
	if err != nil {
		return err
	}
	if _, set := spec.MountOption(data, "mode"); !set && existed {
		// As runc: a tmpfs takes on the mode of the directory it covers.
		if st, err := at.Stat(); err == nil {
			var raw unix.Stat_t
			if unix.Fstat(int(at.Fd()), &raw) == nil && st.IsDir() {
				data = append(data, fmt.Sprintf("mode=%o", raw.Mode&0o7777))
			}
		}
	}
	return mount("tmpfs", at.path(), "tmpfs", flags, strings.Join(data, ","))
}

// has says whether the path exists inside the root.
func (c *Container) has(path string) bool {
	at, err := securejoin.SecureJoin(c.rootfs, path)
	if err != nil {
		return false
	}
	_, err = os.Lstat(at)
	return err == nil
}

// file is the place of a file that docker mounts into every container. It is in memory, which costs the least at start.
func (c *Container) file(name string) string { return filepath.Join(runDir, "c", c.spec.ID, name) }

// writeFiles writes those files anew.
func (c *Container) writeFiles() error {
	l := c.pod.launch
	var addresses []string
	for _, i := range l.Interfaces {
		for _, a := range i.Addresses {
			addresses = append(addresses, a.Addr().String())
		}
	}
	host := c.hostname()
	for name, content := range map[string]string{
		"hosts":       hostsFile(host, c.spec.Domainname, addresses, l.Launch.Network.ExtraHosts),
		"hostname":    host + "\n",
		"resolv.conf": resolvConf(c.pod.dns()),
	} {
		// In place: a running exec or a bind mount holds the file itself.
		if err := os.WriteFile(c.file(name), []byte(content), 0o644); err != nil {
			return err
		}
	}
	return nil
}

func (c *Container) hostname() string {
	if c.spec.Hostname != "" {
		return c.spec.Hostname
	}
	if h := c.pod.launch.Launch.Hostname; h != "" {
		return h
	}
	return c.spec.ID[:min(12, len(c.spec.ID))]
}

// stageConfig is what the container's command runs as.
func (c *Container) stageConfig() (stageConfig, error) {
	s := c.spec
	caps, err := resolveCaps(s.Privileged, s.CapAdd, s.CapDrop)
	if err != nil {
		return stageConfig{}, err
	}
	limits, err := resolveLimits(s.Ulimits)
	if err != nil {
		return stageConfig{}, err
	}
	shm := s.ShmSize
	if shm == 0 {
		shm = spec.DefaultShmSize
	}
	host := c.hostname()
	readOnly := s.ReadOnly
	for _, m := range s.Mounts {
		if filepath.Clean("/"+m.Path) == "/" && m.ReadOnly {
			readOnly = true
		}
	}
	c.pod.crew.mu.Lock()
	size := c.console
	c.pod.crew.mu.Unlock()
	if size == [2]uint16{} {
		size = c.pod.Launch().ConsoleSize
	}
	return stageConfig{
		Rootfs: c.rootfs, Hostname: host, Domainname: s.Domainname, ReadOnly: readOnly, Init: s.Init, ShmSize: int64(shm), Sysctls: s.Sysctls,
		Devices: s.Devices, Nodes: c.nodes, Mounts: c.late,
		Args: slices.Concat(s.Entrypoint, s.Command), Env: containerEnv(s.Env, host, s.TTY), Cwd: s.WorkingDir, User: s.User, Groups: s.GroupAdd,
		TTY: s.TTY, Rows: size[0], Cols: size[1], Caps: caps, Privileged: s.Privileged, Shield: ownShield(s), NoNewPrivs: s.NoNewPrivs, Limits: limits, OOMScore: s.Resources.OOMScoreAdj,
	}, nil
}

// ownShield is that of a container that asks for another one than docker's default; nil for the others.
func ownShield(s *spec.Container) *shield {
	if s.MaskedPaths == nil && s.ReadonlyPaths == nil && !s.WritableCgroups {
		return nil
	}
	own := &shield{WritableSys: s.Privileged, WritableCgroups: s.WritableCgroups}
	if !s.Privileged {
		own.Masked, own.ReadOnly = maskedPaths, append(slices.Clone(readOnlyPaths), procSys)
	}
	if s.MaskedPaths != nil {
		own.Masked = *s.MaskedPaths
	}
	if s.ReadonlyPaths != nil {
		own.ReadOnly = *s.ReadonlyPaths
	}
	return own
}
