package ceph

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/csi-plugin/mount"
	"github.com/cradlestack/cradlestack/csi-plugin/volume"
	"github.com/cradlestack/cradlestack/spec"
)

// clientsOf begins the names of the cephx clients that a volume's keys are of; what follows names the attachment.
func (f *found) clientsOf() string {
	return strings.Join([]string{"cradle", f.pool.FS, f.pool.Group, f.id, ""}, ":")
}

// attachment names what has a volume mounted, among all hosts: this host, or a guest by the target that it was published at.
func (b *Backend) attachment(target string) string {
	sum := sha256.Sum256([]byte(b.config.Host + "\x00" + target))
	return hex.EncodeToString(sum[:8])
}

// reading is what every client may ask the monitors for: their own map and those of the object stores and metadata servers, and how full pools are.
const reading = "allow service mon r, allow service mds r, allow service osd r, allow service pg r"

// key makes a client that can do nothing but read, or read and write, the files below a path and the objects in the volume's namespace. A key that an earlier
// volume of the name has left is replaced.
func (s *session) key(ctx context.Context, f *found, target, path string, readOnly bool) (*spec.CephVolume, error) {
	if f.namespace == "" {
		return nil, fmt.Errorf("volume %s: its subvolume has no namespace of its own, so that no key could be for it alone", f.id)
	}
	access := "rw"
	if readOnly {
		access = "r"
	}
	attachment := s.b.attachment(target)
	c := &spec.CephVolume{FileSystem: f.pool.FS, Path: path, Client: f.clientsOf() + attachment, ReadOnly: readOnly}
	var err error
	if c.Monitors, err = s.monitors(ctx); err != nil {
		return nil, err
	}
	a := attached{Host: s.b.config.Host, Boot: s.b.boot, Target: target}
	if err := s.run(ctx, nil, f.of("metadata set", "key_name", attachedKey+attachment, "value", quoted(a))); err != nil {
		return nil, err
	}
	f.attached[attachment] = a
	var all []struct {
		Key string `json:"key"`
	}
	get := func() error {
		return s.run(ctx, &all, asks(monitor, "auth get-or-create", "entity", "client."+c.Client, "caps", []string{
			"mon", reading,
			"mds", "allow " + access + " fsname=" + f.pool.FS + " path=" + path,
			"osd", "allow " + access + " pool=" + f.data + " namespace=" + f.namespace,
		}))
	}
	err = get()
	if errors.Is(err, errInvalid) { // it has other capabilities
		if err = s.unkey(ctx, f, attachment); err == nil {
			err = get()
		}
	}
	if err == nil && len(all) != 1 {
		err = fmt.Errorf("ceph auth get-or-create has made %d keys", len(all))
	}
	if err != nil {
		return nil, err
	}
	c.Secret = all[0].Key
	return c, nil
}

// monitors are the addresses that clients begin at.
func (s *session) monitors(ctx context.Context) (all []string, err error) {
	var dump struct {
		Mons []struct {
			Addrs struct {
				Vec []struct{ Type, Addr string } `json:"addrvec"`
			} `json:"public_addrs"`
		} `json:"mons"`
	}
	if err := s.run(ctx, &dump, asks(monitor, "mon dump")); err != nil {
		return nil, err
	}
	for _, m := range dump.Mons {
		i := slices.IndexFunc(m.Addrs.Vec, func(a struct{ Type, Addr string }) bool { return a.Type == "v2" })
		if i < 0 {
			return nil, fmt.Errorf("%w: a monitor has no address of messenger version 2: ceph mon enable-msgr2", volume.ErrUnavailable)
		}
		all = append(all, m.Addrs.Vec[i].Addr)
	}
	return all, nil
}

// revoke removes the key of what is attached at a target, if there is one, and ends the session of who still has one with it: what that writes from now on is
// refused.
func (s *session) revoke(ctx context.Context, f *found, target string) error {
	attachment := s.b.attachment(target)
	if _, ok := f.attached[attachment]; !ok {
		return nil
	}
	if err := s.unkey(ctx, f, attachment); err != nil {
		return err
	}
	return s.detached(ctx, f, attachment)
}

// unkey removes a key, with the session of who has one by it.
func (s *session) unkey(ctx context.Context, f *found, attachment string) error {
	if err := s.removeKey(ctx, f, attachment); err != nil {
		return err
	}
	return s.evict(ctx, f, attachment)
}

func (s *session) removeKey(ctx context.Context, f *found, attachment string) error {
	return s.removes(ctx, asks(monitor, "auth rm", "entity", "client."+f.clientsOf()+attachment))
}

// evict ends the sessions of who has the volume mounted by a key.
func (s *session) evict(ctx context.Context, f *found, attachment string) error {
	return s.removes(ctx, f.of("evict", "auth_id", f.clientsOf()+attachment))
}

// detached removes the note of an attachment that has no key any more.
func (s *session) detached(ctx context.Context, f *found, attachment string) error {
	if err := s.removes(ctx, f.of("metadata rm", "key_name", attachedKey+attachment)); err != nil {
		return err
	}
	delete(f.attached, attachment)
	return nil
}

// revokeAll removes the keys of a volume that nobody has mounted, and that is to go: those of lost hosts as well.
func (s *session) revokeAll(ctx context.Context, f *found) error {
	for attachment := range f.attached {
		if err := s.removeKey(ctx, f, attachment); err != nil {
			return err
		}
		if err := s.detached(ctx, f, attachment); err != nil {
			return err
		}
	}
	return nil
}

// A mounting is a mount that ceph-fuse or the kernel makes on this host.
type mounting struct {
	b    *Backend
	name string // of its directories: a volume's, or one that no volume can have
}

func (b *Backend) mounting(name string) *mounting { return &mounting{b, name} }

func (b *Backend) point(name string) string { return filepath.Join(b.config.Dir, "mounts", name) }

func (m *mounting) point() string { return m.b.point(m.name) }

// file is one beside the mount, which is gone after a reboot as the mount is.
func (m *mounting) file(name string) string {
	return filepath.Join(m.b.config.Dir, "run", m.name, name)
}

// alive opens the file that a ceph-fuse has locked for as long as it is there.
func (m *mounting) alive() (f *os.File, running bool, err error) {
	f, err = os.OpenFile(m.file("alive"), os.O_RDWR, 0)
	if errors.Is(err, fs.ErrNotExist) {
		if err := os.MkdirAll(m.file(""), 0o700); err != nil {
			return nil, false, err
		}
		f, err = os.OpenFile(m.file("alive"), os.O_RDWR|os.O_CREATE, 0o600)
	}
	if err != nil {
		return nil, false, err
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return f, true, nil
	}
	return f, false, err
}

// State of a mount.
type state int

const (
	absent state = iota
	living
	dead    // its ceph-fuse has ended, or its session with the cluster
	hanging // it does not answer, as long as the cluster does not
)

// patience is how long something on this host may take to answer.
const patience = 20 * time.Second

func (m *mounting) state() (state, error) {
	type answer struct {
		state state
		err   error
	}
	answered := make(chan answer, 1)
	go func() { // of a cluster that does not answer it waits for that
		st, err := m.look()
		answered <- answer{st, err}
	}()
	select {
	case a := <-answered:
		return a.state, a.err
	case <-time.After(patience):
		return hanging, nil
	}
}

func (m *mounting) look() (state, error) {
	if mounted, err := mount.Is(m.point()); err != nil || !mounted {
		return absent, err
	}
	var st unix.Statfs_t
	err := unix.Statfs(m.point(), &st)
	if err == nil { // a monitor answers that, also who has no session with the metadata server any more
		_, err = os.Lstat(m.point())
	}
	for _, lost := range []error{unix.ENOTCONN, unix.ECONNABORTED, unix.ESHUTDOWN, unix.ENOENT} {
		if errors.Is(err, lost) {
			return dead, nil
		}
	}
	return living, err
}

// errHangs is a mount that does not answer.
func (m *mounting) errHangs() error {
	return fmt.Errorf("%w: what is mounted on %s does not answer: see \"ceph status\"", volume.ErrUnavailable, m.point())
}

// idling is after how long nobody who has staged a volume can still be about to mount it at its place.
const idling = 5 * time.Minute

// idle says whether a mount was left by a call that did not come to its end: it is at no other place, and was not asked for of late.
func (m *mounting) idle() (bool, error) {
	used, err := os.Stat(m.file("used"))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil || time.Since(used.ModTime()) < idling {
		return false, err
	}
	others, err := m.others()
	return len(others) == 0, err
}

// use says that a mount is asked for now.
func (m *mounting) use() error {
	if err := os.MkdirAll(m.file(""), 0o700); err != nil {
		return err
	}
	return os.WriteFile(m.file("used"), nil, 0o600)
}

// up mounts, unless that is done. made is called for the key when one is needed.
func (m *mounting) up(ctx context.Context, made func() (*spec.CephVolume, error)) error {
	if err := m.use(); err != nil {
		return err
	}
	switch st, err := m.state(); {
	case err != nil:
		return err
	case st == living:
		return nil
	case st == hanging:
		return m.errHangs()
	case st == dead:
		if err := m.replace(ctx, made); err != nil {
			return err
		}
		return nil
	}
	if err := m.wait(ctx, func(mounted, running bool) bool { return mounted || !running }); err != nil {
		return err
	}
	if mounted, err := mount.Is(m.point()); err != nil || mounted { // by one that an interrupted call has started
		return err
	}
	return m.start(ctx, made)
}

// wait waits until what is said of the mount and its ceph-fuse will do.
func (m *mounting) wait(ctx context.Context, will func(mounted, running bool) bool) error {
	ctx, cancel := context.WithTimeoutCause(ctx, answering, m.errHangs())
	defer cancel()
	for pause := time.Millisecond; ; pause = min(2*pause, 50*time.Millisecond) {
		f, running, err := m.alive()
		if err != nil {
			return err
		}
		f.Close()
		mounted, err := mount.Is(m.point())
		if err != nil {
			return err
		}
		if will(mounted, running) {
			return nil
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

func (m *mounting) start(ctx context.Context, made func() (*spec.CephVolume, error)) error {
	c, err := made()
	if err != nil {
		return err
	}
	if err := os.MkdirAll(m.point(), 0o700); err != nil {
		return err
	}
	if kernel() {
		source, data := c.Mount()
		flags := uintptr(unix.MS_NODEV | unix.MS_NOSUID)
		if c.ReadOnly {
			flags |= unix.MS_RDONLY
		}
		if err := unix.Mount(source, m.point(), "ceph", flags, strings.Join(data, ",")); err != nil {
			return fmt.Errorf("mount ceph of %s on %s: %w", source, m.point(), err)
		}
		return nil
	}
	return m.fuse(ctx, c)
}

// kernel says whether this host's kernel has a client for CephFS, and one that is coherent.
func kernel() bool {
	var uts unix.Utsname
	if unix.Uname(&uts) != nil || !spec.CephCoherent(unix.ByteSliceToString(uts.Release[:])) {
		return false
	}
	text, err := os.ReadFile("/proc/filesystems")
	return err == nil && slices.Contains(strings.Fields(string(text)), "ceph")
}

// fuse starts a ceph-fuse, which outlasts this process, and waits until it has mounted.
func (m *mounting) fuse(ctx context.Context, c *spec.CephVolume) error {
	path, err := exec.LookPath("ceph-fuse")
	if err != nil {
		return fmt.Errorf("%w: this host's kernel has no CephFS (modprobe ceph, Linux 6.12.7), and the program ceph-fuse is missing: apt-get install ceph-fuse", volume.ErrUnavailable)
	}
	held, running, err := m.alive()
	if err != nil {
		return err
	}
	defer held.Close()
	if running {
		return m.errHangs()
	}
	keyring := m.file("keyring")
	if err := os.WriteFile(keyring, fmt.Appendf(nil, "[client.%s]\n\tkey = %s\n", c.Client, c.Secret), 0o600); err != nil {
		return err
	}
	log, err := os.OpenFile(m.file("log"), os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	options := "nodev,nosuid"
	if c.ReadOnly {
		options += ",ro"
	}
	args := append(m.b.client("client."+c.Client, keyring), "-f", m.point(), "-r", c.Path, "--client_fs", c.FileSystem, "-o", options,
		"--fuse_disable_pagecache=true",   // or a read may be of what the host's kernel remembers
		"--fuse_default_permissions=true", // the kernel asks for a process's capabilities, and not ceph-fuse for root: a pod's QEMU serves files by some of these alone
		"--client_mount_timeout="+fmt.Sprint(int(patience.Seconds())), "--log_file=", "--admin_socket=", "--log_to_stderr=true", "--err_to_stderr=true")
	if strings.HasPrefix(m.name, copying) {
		args = append(args, "--client_oc=false") // an error of writing is the writer's, who does not ask for it again: FUSE has no syncfs
	}
	cmd := exec.Command(path, args...)
	cmd.Env = []string{"LC_ALL=C", "PATH=/usr/sbin:/usr/bin:/sbin:/bin"}
	cmd.Dir = "/"
	cmd.Stdout, cmd.Stderr = log, log
	cmd.ExtraFiles = []*os.File{held}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return err
	}
	outlive(cmd.Process.Pid)
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }() // until it ends, which may be long after
	deadline := time.After(answering)
	for pause := time.Millisecond; ; pause = min(2*pause, 50*time.Millisecond) {
		if mounted, err := mount.Is(m.point()); err == nil && mounted {
			return nil
		}
		select {
		case <-time.After(pause):
		case err := <-ended:
			return fmt.Errorf("%w: ceph-fuse has ended: %w: %s", volume.ErrUnavailable, err, m.said())
		case <-deadline:
			_ = cmd.Process.Kill()
			return fmt.Errorf("%w: ceph-fuse has not mounted for %v: %s", volume.ErrUnavailable, answering, m.said())
		case <-ctx.Done():
			_ = cmd.Process.Kill()
			return context.Cause(ctx)
		}
	}
}

// said is the last line that a ceph-fuse has written.
func (m *mounting) said() string {
	text, err := os.ReadFile(m.file("log"))
	if err != nil {
		return err.Error()
	}
	return lastLine(strings.TrimSpace(string(text)))
}

// outlive takes a process out of the cgroups that this one is in, as far as this one may: whoever starts this plugin may end all that is in them with it.
func outlive(pid int) {
	own, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return
	}
	for line := range strings.Lines(string(own)) {
		parts := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(parts) != 3 || parts[2] == "/" {
			continue
		}
		to := filepath.Join("/sys/fs/cgroup", strings.TrimPrefix(parts[1], "name="))
		if parts[1] == "" { // version 2, whose root need not take processes
			to = "/sys/fs/cgroup/cradle-ceph-fuse"
			_ = os.Mkdir(to, 0o755)
		}
		_ = os.WriteFile(filepath.Join(to, "cgroup.procs"), fmt.Append(nil, pid), 0)
	}
}

// down unmounts, and returns when all that was written is in the cluster.
func (m *mounting) down(ctx context.Context) error {
	if err := m.unmount(ctx); err != nil {
		return err
	}
	return m.forget()
}

func (m *mounting) unmount(ctx context.Context) error {
	st, err := m.state()
	switch {
	case err != nil:
		return err
	case st == hanging:
		return m.errHangs()
	case st == dead:
		err = m.drop()
	case st == living:
		if err = mount.Patiently(ctx, func() error { return unix.Unmount(m.point(), unix.UMOUNT_NOFOLLOW) }); errors.Is(err, unix.EBUSY) {
			err = fmt.Errorf("%s: %w: end what still uses it", m.point(), volume.ErrInUse)
		}
	}
	if err != nil {
		return err
	}
	return m.wait(ctx, func(mounted, running bool) bool { return !mounted && !running })
}

// away unmounts what was mounted for a copy that nobody makes any more, also where it hangs, or where the process that copies has not ended yet: what that does from
// now on fails.
func (m *mounting) away(ctx context.Context) error {
	mounted, err := mount.Is(m.point())
	if err == nil && mounted {
		err = m.drop()
	} else if err == nil {
		if _, err := os.Lstat(m.file("")); errors.Is(err, fs.ErrNotExist) { // or what wait makes there would be left by who is killed, without a note in the cluster
			return gone(os.Remove(m.point()))
		}
	}
	if err == nil {
		err = m.wait(ctx, func(mounted, running bool) bool { return !mounted && !running })
	}
	if err != nil {
		return err
	}
	return m.forget()
}

// forget removes the files of what is not mounted any more.
func (m *mounting) forget() error {
	return errors.Join(gone(os.Remove(m.point())), os.RemoveAll(m.file("")))
}

func gone(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// others are the mounts of the same file system elsewhere: what was published.
func (m *mounting) others() ([]*mountinfo.Info, error) { return mount.Others(m.point()) }

// replace mounts again what a ceph-fuse that has died has left, at each place where it was.
func (m *mounting) replace(ctx context.Context, made func() (*spec.CephVolume, error)) error {
	all, err := m.others()
	if err != nil {
		return err
	}
	if err := m.drop(); err != nil {
		return err
	}
	if err := m.wait(ctx, func(mounted, running bool) bool { return !mounted && !running }); err != nil {
		return err
	}
	if err := m.start(ctx, made); err != nil {
		return err
	}
	for _, one := range all {
		if err := mount.Detach(one.Mountpoint); err != nil {
			return err
		}
		if err := mount.Bind(filepath.Join(m.point(), one.Root), one.Mountpoint, mount.OptionsOf(one)); err != nil {
			return err
		}
	}
	return nil
}

// drop unmounts what is dead, and ends a ceph-fuse that is left without a session: also where files are open, it has no kernel to serve then.
func (m *mounting) drop() error {
	err := unix.Unmount(m.point(), unix.MNT_FORCE|unix.UMOUNT_NOFOLLOW)
	if err != nil { // busy, or gone
		err = mount.Detach(m.point())
	}
	return err
}

// copying begins the name of what is mounted for a copy, of which the name of the clone follows; what that is made of has another one at its end. No volume's
// begins so.
const copying = ":"

// cloneOf is the clone for which something of that name is mounted, if it is for a copy; else the volume.
func cloneOf(name string) (id string, copied bool) {
	return strings.Trim(name, copying), strings.HasPrefix(name, copying)
}

// lend mounts a path for a copy, by a key of its own. The name is of the mount, copying and the clone, whose lock is held.
func (s *session) lend(ctx context.Context, f *found, name, path string, readOnly bool) (*mounting, error) {
	m := s.b.mounting(name)
	if err := m.away(ctx); err != nil {
		return nil, err
	}
	if err := m.start(ctx, func() (*spec.CephVolume, error) { return s.key(ctx, f, name, path, readOnly) }); err != nil {
		return nil, errors.Join(err, s.uncopy(ctx, f, name))
	}
	return m, nil
}

// giveBack is lend's end. What an err has interrupted need not come to its own.
func (s *session) giveBack(ctx context.Context, f *found, m *mounting, err error) error {
	if err != nil {
		return s.uncopy(ctx, f, m.name)
	}
	if err := m.down(ctx); err != nil {
		return err
	}
	return s.revoke(ctx, f, m.name)
}

// Stage is volume.Backend's. A volume is mounted once on a host.
func (b *Backend) Stage(ctx context.Context, id string, use volume.Use) (source volume.Source, err error) {
	if !volume.ValidName(id) {
		return source, fmt.Errorf("volume %q: %w", id[:min(len(id), volume.MaxName)], volume.ErrNotFound)
	}
	err = b.with(ctx, func(ctx context.Context, s *session) error {
		f, err := s.volume(ctx, id)
		switch {
		case err != nil:
			return err
		case use.As == volume.AsRaw || use.As == volume.AsGuest && !f.Direct:
			return volume.Invalid("volume", "class %s is of file volumes, which have no block device", f.Class)
		case use.As == volume.AsFiles && f.Direct:
			return volume.Invalid("volume", "attach=direct is what guests attach themselves, and nothing else is")
		case use.As == volume.AsGuest:
			return nil // what it needs, Attach tells
		}
		if err := s.up(ctx, f); err != nil {
			return fmt.Errorf("stage volume %s: %w", id, err)
		}
		source.Directory = b.point(id)
		return nil
	}, id)
	return source, err
}

func (s *session) up(ctx context.Context, f *found) error {
	return s.b.mounting(f.id).up(ctx, func() (*spec.CephVolume, error) {
		attachment := s.b.attachment("")
		if _, ok := f.attached[attachment]; ok { // of a mount that is no more: its session would keep its files and locks for a minute
			if err := s.evict(ctx, f, attachment); err != nil {
				return nil, err
			}
		}
		return s.key(ctx, f, "", f.path, false)
	})
}

// Unstage is volume.Backend's.
func (b *Backend) Unstage(ctx context.Context, id string) error {
	if !volume.ValidName(id) {
		return nil
	}
	ctx, unlock, err := b.locks().Take(ctx, id)
	if err != nil {
		return err
	}
	defer unlock()
	m := b.mounting(id)
	if _, err := os.Lstat(m.file("")); errors.Is(err, fs.ErrNotExist) {
		if mounted, err := mount.Is(m.point()); err != nil || !mounted {
			return err
		}
	}
	if others, err := m.others(); err != nil || len(others) > 0 {
		return err
	}
	if err := m.unmount(ctx); err != nil { // which needs no cluster that answers commands
		return fmt.Errorf("unstage volume %s: %w", id, err)
	}
	s, err := b.session(ctx)
	if err != nil {
		return err
	}
	defer s.close()
	return s.unstage(ctx, m)
}

// unstage unmounts a volume, which is locked, and removes the host's key.
func (s *session) unstage(ctx context.Context, m *mounting) error {
	if err := m.unmount(ctx); err != nil {
		return err
	}
	f, err := s.find(ctx, m.name)
	if err == nil {
		err = s.revoke(ctx, f, "")
	}
	if err != nil && !errors.Is(err, volume.ErrNotFound) {
		return err
	}
	return m.forget() // only now: it says that there is a key
}

// Attach is volume.Attacher's.
func (b *Backend) Attach(ctx context.Context, id, target string, readOnly bool) (v spec.Volume, err error) {
	if !volume.ValidName(id) {
		return v, fmt.Errorf("volume %q: %w", id[:min(len(id), volume.MaxName)], volume.ErrNotFound)
	}
	err = b.with(ctx, func(ctx context.Context, s *session) error {
		f, err := s.volume(ctx, id)
		if err == nil && !f.Direct {
			err = volume.Invalid("volume", "it is attached by hosts; attach=direct is what guests attach themselves")
		}
		if err != nil {
			return err
		}
		c, err := s.key(ctx, f, target, f.path, readOnly)
		v = spec.Volume{Name: id, Class: f.Class, Ceph: c}
		return err
	}, id)
	return v, err
}

// Detach is volume.Attacher's.
func (b *Backend) Detach(ctx context.Context, id, target string) error {
	if !volume.ValidName(id) {
		return nil
	}
	return b.with(ctx, func(ctx context.Context, s *session) error {
		f, err := s.find(ctx, id)
		if err == nil && f.Direct {
			err = s.revoke(ctx, f, target)
		}
		if errors.Is(err, volume.ErrNotFound) {
			return nil
		}
		return err
	}, id)
}
