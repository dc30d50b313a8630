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
	"sync"
	"syscall"
	"time"

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
	{"pool is imported on", volume.ErrUnavailable},
	{"previously in use from another system", volume.ErrUnavailable},
	{"parent does not exist", volume.ErrUnavailable},
	{"modules are not loaded", volume.ErrUnavailable},
	{"pool I/O is currently suspended", volume.ErrUnavailable},
	{"pool is read-only", volume.ErrUnavailable},
	{"Read-only file system", volume.ErrUnavailable},
	{"dataset already exists", errExists},
	{"dataset is busy", errBusy},
	{"pool or dataset is busy", errBusy},
	{"pool is busy", errBusy},
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
	err := execute(ctx, func(cmd *exec.Cmd, zpool string) error {
		cmd.Stdout = &out
		if err := cmd.Start(); err != nil {
			return err
		}
		return await(cmd, zpool)
	}, name, args...)
	if errors.Is(err, ErrSuspended) {
		return "", err // the program may still write
	}
	return out.String(), err
}

// stream runs the program zfs, and gives what it writes to read as it comes, until the context ends.
func stream(ctx context.Context, read func(io.Reader) error, args ...string) error {
	return execute(ctx, func(cmd *exec.Cmd, zpool string) error {
		out, err := cmd.StdoutPipe()
		if err == nil {
			err = cmd.Start()
		}
		if err != nil {
			return err
		}
		whole := make(chan struct{})
		var watch sync.WaitGroup
		watch.Go(func() {
			if suspension(whole, zpool) != nil {
				out.Close()
			}
		})
		stop := context.AfterFunc(ctx, func() { out.Close() })
		rerr := read(out)
		if !stop() && rerr != nil {
			rerr = context.Cause(ctx)
		}
		close(whole)
		watch.Wait()
		if rerr != nil {
			_ = cmd.Process.Kill()
		}
		if err := await(cmd, zpool); rerr == nil || errors.Is(err, ErrSuspended) {
			return err
		}
		return rerr
	}, "zfs", args...)
}

// ErrSuspended is that all I/O of a zpool waits for a person.
var ErrSuspended = fmt.Errorf("%w: it is suspended, as its disks failed: nothing in it is read or written before they are back and \"zpool clear\" was run; see \"zpool status\"", volume.ErrUnavailable)

// Suspended tells it of a zpool, without asking ZFS, which may hold its answer back meanwhile (zpoolprops(7), failmode=wait).
func Suspended(zpool string) error {
	state, err := os.ReadFile("/proc/spl/kstat/zfs/" + zpool + "/state")
	if err == nil && strings.TrimSpace(string(state)) == "SUSPENDED" {
		return fmt.Errorf("zpool %s: %w", zpool, ErrSuspended)
	}
	return nil // also of one that is not there: ZFS says so itself
}

// suspension waits until a zpool is suspended, or done is closed.
func suspension(done <-chan struct{}, zpool string) error {
	for {
		select {
		case <-done:
			return nil
		case <-time.After(time.Second):
			if err := Suspended(zpool); err != nil {
				return err
			}
		}
	}
}

// await waits for a program's end. In a zpool that is suspended it has none, not even by a signal: it is left alone then, with its locks, and ends once the zpool
// is there again.
func await(cmd *exec.Cmd, zpool string) error { return unlessSuspended(zpool, cmd.Wait) }

// unlessSuspended waits for the end of do, which it leaves alone where the zpool is suspended.
func unlessSuspended(zpool string, do func() error) error {
	ended := make(chan struct{})
	var err error
	go func() {
		defer close(ended)
		err = do()
	}()
	if err := suspension(ended, zpool); err != nil {
		return err
	}
	<-ended
	return err
}

// reaching has do open, read or write a dataset's device, which in a zpool that is suspended comes to no end. What is left alone then keeps the context's locks.
func reaching(ctx context.Context, dataset string, do func(context.Context) error) error {
	if err := Suspended(zpool(dataset)); err != nil {
		return err
	}
	kept, release, err := mount.Keep(ctx)
	if err != nil {
		return err
	}
	return unlessSuspended(zpool(dataset), func() error {
		defer release()
		return do(kept)
	})
}

// execute has run do with a program, whose last argument is a zpool or something in one.
func execute(ctx context.Context, run func(_ *exec.Cmd, zpool string) error, name string, args ...string) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	pool := zpool(args[len(args)-1])
	if err := Suspended(pool); err != nil {
		return err
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
	err = run(cmd, pool)
	if err == nil || errors.Is(err, ErrSuspended) {
		return err // of a program that was left alone, what it says is still being read
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
