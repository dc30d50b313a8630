package launch

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Exec becomes the service. It only returns if that failed, and the process is
// of no further use then.
func (r *Root) Exec(ctx context.Context, c Config) error {
	if len(c.Argv) == 0 {
		return errors.New("the image names no command: give one after --")
	}
	volumes, err := order(slices.Concat(callerDirs(c.Env, c.Volumes), c.Volumes))
	if err != nil {
		return err
	}
	lockThread()
	umask, err := r.mount(volumes, c.Workdir)
	if err != nil {
		return err
	}
	if c.OOMScoreAdj != nil {
		if err := os.WriteFile("/proc/self/oom_score_adj", []byte(strconv.Itoa(*c.OOMScoreAdj)), 0); err != nil {
			return fmt.Errorf("set the OOM score: %w", err)
		}
	}
	if c.User != "" {
		u, err := lookup(c.User)
		if err != nil {
			return err
		}
		if err := u.become(); err != nil {
			return fmt.Errorf("become user %s: %w", c.User, err)
		}
		if u.home != "" && u.uid != 0 {
			c.Env = setenv(c.Env, "HOME", u.home)
		}
	}
	if err := unix.Chdir(workdir(c.Workdir)); err != nil {
		return fmt.Errorf("working directory %s: %w", c.Workdir, err)
	}
	name, err := find(c.Argv[0], c.Env)
	if err != nil {
		return err
	}
	unix.Umask(umask)
	// From here on a signal is the service's own. One that came before ends
	// bali, as it would have ended the service.
	signal.Reset()
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	err = unix.Exec(name, c.Argv, c.Env)
	return &NotStarted{ExitNotRunnable, fmt.Errorf("start %s: %w%s", name, err, execHint(err))}
}

func execHint(err error) string {
	switch {
	case errors.Is(err, unix.ENOENT):
		return ": its interpreter or dynamic loader is not in the image"
	case errors.Is(err, unix.ENOEXEC):
		return ": it is no program of this architecture, or a script without #!"
	case errors.Is(err, unix.EACCES):
		return ": it is not executable for this user"
	}
	return ""
}

func workdir(w string) string {
	if w == "" {
		return "/"
	}
	return w
}

// mount builds the service's file system and moves into it. It returns the
// caller's umask, which must not take the service's user the way to folders that
// are made here.
func (r *Root) mount(volumes []Volume, workdir string) (umask int, err error) {
	if err := enter(); err != nil {
		return 0, err
	}
	return unix.Umask(0), r.build(volumes, workdir)
}

func (r *Root) build(volumes []Volume, workdir string) error {
	trees := make([]*tree, len(volumes))
	for i, v := range volumes {
		t, err := clone(v.Host)
		if err != nil {
			return fmt.Errorf("volume %s:%s: %w%s", v.Host, v.Target, err, missing(err))
		}
		var attr uint64
		if v.ReadOnly {
			attr = unix.MOUNT_ATTR_RDONLY
		}
		if err := t.set(attr, v.Propagation); err != nil {
			return fmt.Errorf("volume %s:%s: set its options: %w", v.Host, v.Target, err)
		}
		trees[i] = t
	}
	system := make([]*tree, len(hostDirs))
	for i, d := range hostDirs {
		t, err := clone(d)
		if err != nil {
			return fmt.Errorf("share %s: %w", d, err)
		}
		system[i] = t
	}
	files, err := cloneFiles()
	if err != nil {
		return err
	}
	if err := sever(); err != nil {
		return err
	}
	root, err := r.mountRoot()
	if err != nil {
		return err
	}
	if err := prepare(root, workdir); err != nil {
		return err
	}
	for i, d := range hostDirs {
		if err := system[i].attach(root, d); err != nil {
			return fmt.Errorf("share %s: %w", d, err)
		}
	}
	for _, f := range files {
		if err := f.attach(root); err != nil {
			return fmt.Errorf("share %s: %w", f.name, err)
		}
	}
	for i, v := range volumes {
		if err := trees[i].attach(root, v.Target); err != nil {
			return fmt.Errorf("volume %s:%s: %w", v.Host, v.Target, err)
		}
	}
	return pivot(root)
}

func missing(err error) string {
	if errors.Is(err, unix.ENOENT) {
		return ": make it on the host first"
	}
	return ""
}

// prepare makes what a service expects and an image may lack.
func prepare(root *os.File, workdir string) error {
	if workdir != "" {
		d, err := target(root, path.Clean(workdir), true)
		if err != nil {
			return fmt.Errorf("working directory: %w", err)
		}
		d.Close()
	}
	if err := unix.Mkdirat(int(root.Fd()), "tmp", 0o700); err == nil {
		return unix.Fchmodat(int(root.Fd()), "tmp", 0o1777, 0)
	} else if !errors.Is(err, unix.EEXIST) {
		return err
	}
	return nil
}

// callerDirs are folders that systemd or Nomad made for the service and named
// in its environment: they are there at the same path, as they would be without
// an image. What is in /run, or in a volume, is there anyway.
func callerDirs(env []string, volumes []Volume) []Volume {
	var out []Volume
	add := func(p string) {
		host := slices.ContainsFunc(hostDirs, func(d string) bool { return inside(p, d) })
		known := slices.ContainsFunc(slices.Concat(volumes, out), func(v Volume) bool { return inside(p, v.Target) })
		if path.IsAbs(p) && !host && !known {
			out = append(out, Volume{Host: p, Target: path.Clean(p), Propagation: Shared})
		}
	}
	for _, key := range []string{
		// systemd.exec(5); several are separated by colons
		"STATE_DIRECTORY", "CACHE_DIRECTORY", "LOGS_DIRECTORY", "CONFIGURATION_DIRECTORY", "RUNTIME_DIRECTORY", "CREDENTIALS_DIRECTORY",
		// Nomad's runtime environment
		"NOMAD_ALLOC_DIR", "NOMAD_TASK_DIR", "NOMAD_SECRETS_DIR",
		// sd_notify(3); a socket is mounted like a file
		"NOTIFY_SOCKET",
	} {
		for p := range strings.SplitSeq(getenv(env, key), ":") {
			add(p)
		}
	}
	return out
}

func getenv(env []string, key string) string {
	for _, e := range slices.Backward(env) {
		if v, ok := strings.CutPrefix(e, key+"="); ok {
			return v
		}
	}
	return ""
}

func setenv(env []string, key, value string) []string {
	env = slices.DeleteFunc(slices.Clone(env), func(e string) bool { return strings.HasPrefix(e, key+"=") })
	return append(env, key+"="+value)
}

const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// find is execvp's search, in the new root and as the new user.
func find(name string, env []string) (string, error) {
	if strings.Contains(name, "/") {
		if _, err := os.Stat(name); errors.Is(err, os.ErrNotExist) {
			return "", &NotStarted{ExitNotFound, fmt.Errorf("start %s: there is no such file in the image", name)}
		}
		return name, nil
	}
	list := getenv(env, "PATH")
	if list == "" {
		list = defaultPath
	}
	for dir := range strings.SplitSeq(list, ":") {
		p := filepath.Join(dir, name)
		if fi, err := os.Stat(p); err == nil && fi.Mode().IsRegular() && unix.Access(p, unix.X_OK) == nil {
			return p, nil
		}
	}
	return "", &NotStarted{ExitNotFound, fmt.Errorf("start %s: it is not in the image's PATH %s", name, list)}
}
