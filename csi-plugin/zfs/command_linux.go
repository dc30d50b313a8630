package zfs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"

	"github.com/cradlestack/cradlestack/csi-plugin/mount"
	"github.com/cradlestack/cradlestack/csi-plugin/volume"
)

// Errors of the program zfs, which has them as text alone (lib/libzfs/libzfs_util.c and the callers).
var (
	errNoDataset = volume.ErrNotFound
	errExists    = errors.New("exists already")
	errBusy      = volume.ErrInUse
	errChildren  = errors.New("has dependents")
)

var texts = []struct {
	text string
	is   error
}{
	{"dataset does not exist", errNoDataset},
	{"could not find any snapshots to destroy", errNoDataset},
	{"no such pool", volume.ErrUnavailable},
	{"parent does not exist", volume.ErrUnavailable},
	{"modules are not loaded", volume.ErrUnavailable},
	{"pool I/O is currently suspended", volume.ErrUnavailable},
	{"pool is read-only", volume.ErrUnavailable},
	{"Read-only file system", volume.ErrUnavailable},
	{"dataset already exists", errExists},
	{"dataset is busy", errBusy},
	{"pool or dataset is busy", errBusy},
	{"has dependent clones", errChildren},
	{"has children", errChildren},
	{"out of space", volume.ErrNoSpace},
	{"space quota exceeded", volume.ErrNoSpace},
	{"No space left on device", volume.ErrNoSpace},
	{"size is greater than available space", volume.ErrNoSpace},
	{"permission denied", volume.ErrUnavailable},
}

// zfs runs the program, which goes on should this process be killed, and has the context's lock meanwhile.
func zfs(ctx context.Context, args ...string) (string, error) { return command(ctx, "zfs", args...) }

func command(ctx context.Context, name string, args ...string) (string, error) {
	var out bytes.Buffer
	err := execute(ctx, func(cmd *exec.Cmd) error {
		cmd.Stdout = &out
		return cmd.Run()
	}, name, args...)
	return out.String(), err
}

// stream runs the program zfs, and gives what it writes to read as it comes.
func stream(ctx context.Context, read func(io.Reader) error, args ...string) error {
	return execute(ctx, func(cmd *exec.Cmd) error {
		out, err := cmd.StdoutPipe()
		if err == nil {
			err = cmd.Start()
		}
		if err != nil {
			return err
		}
		rerr := read(out)
		if rerr != nil {
			_ = cmd.Process.Kill()
		}
		if err := cmd.Wait(); rerr == nil {
			return err
		}
		return rerr
	}, "zfs", args...)
}

func execute(ctx context.Context, run func(*exec.Cmd) error, name string, args ...string) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	path, err := exec.LookPath(name)
	for _, dir := range []string{"/usr/sbin/", "/sbin/", "/usr/local/sbin/"} {
		if err == nil {
			break
		}
		path, err = exec.LookPath(dir + name)
	}
	if err != nil {
		return fmt.Errorf("%w: %s is missing: apt-get install zfsutils-linux", volume.ErrUnavailable, name)
	}
	var errs bytes.Buffer
	cmd := exec.Command(path, args...)
	cmd.Stderr = &errs
	cmd.Env = []string{"LC_ALL=C", "PATH=/usr/sbin:/usr/bin:/sbin:/bin"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if f := mount.Held(ctx); f != nil {
		cmd.ExtraFiles = []*os.File{f}
	}
	err = run(cmd)
	if err == nil {
		return nil
	}
	what := name + " " + args[0]
	text := strings.TrimSpace(errs.String())
	if text == "" {
		return fmt.Errorf("%s: %w", what, err)
	}
	for _, t := range texts {
		if strings.Contains(text, t.text) {
			return fmt.Errorf("%s: %w: %s", what, t.is, text)
		}
	}
	return fmt.Errorf("%s: %s", what, text)
}

// rows cuts what -H prints.
func rows(out string) (all [][]string) {
	for line := range strings.Lines(out) {
		all = append(all, strings.Split(strings.TrimRight(line, "\n"), "\t"))
	}
	return all
}
