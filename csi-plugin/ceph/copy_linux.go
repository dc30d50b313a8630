package ceph

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/csi-plugin/mount"
	"github.com/cradlestack/cradlestack/csi-plugin/tree"
	"github.com/cradlestack/cradlestack/csi-plugin/volume"
)

// copierName is the name under which this program, executed anew, copies files from one directory to another.
//
// Whoever has files open of a mount that hangs can start no program: the copy of the process that is to become it closes them first, which writes what is in
// them. The plugin itself opens none therefore.
const copierName = "cradle-csi-copy"

func init() {
	if len(os.Args) != 3 || os.Args[0] != copierName {
		return
	}
	go func() { // who has started this is gone, and may be started again
		_, _ = io.Copy(io.Discard, os.Stdin)
		os.Exit(1)
	}()
	err := copyFiles(context.Background(), os.Args[1], os.Args[2])
	if err == nil {
		os.Exit(0)
	}
	fmt.Fprintln(os.Stderr, err)
	code := 1
	if errno := syscall.Errno(0); errors.As(err, &errno) {
		code = int(errno)
	}
	os.Exit(code)
}

// copyFiles fills an empty directory with what is in another one.
func copyFiles(ctx context.Context, from, to string) error {
	source, err := os.OpenRoot(from)
	if err != nil {
		return err
	}
	defer source.Close()
	target, err := os.OpenRoot(to)
	if err != nil {
		return err
	}
	defer target.Close()
	g, ctx := errgroup.WithContext(ctx)
	r, w := io.Pipe()
	g.Go(func() error {
		err := tree.Send(ctx, source, ".", nil, w)
		return errors.Join(err, w.CloseWithError(err))
	})
	g.Go(func() error {
		_, err := tree.Receive(ctx, target, r)
		if err == nil {
			err = mount.SyncRoot(target)
		}
		return errors.Join(err, r.CloseWithError(err))
	})
	return g.Wait()
}

// transfer copies a part of what is mounted to the root of another mount, in a process of its own. Where ctx ends before it does neither mount is of use any more.
func transfer(ctx context.Context, from *mounting, part string, to *mounting) error {
	cmd := exec.Command("/proc/self/exe")
	cmd.Args = []string{copierName, filepath.Join(from.point(), part), to.point()}
	cmd.Env = []string{} // its memory has no token
	cmd.Dir = "/"
	var said bytes.Buffer
	cmd.Stderr = &said
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // a signal to the plugin's group is not for it
	alive, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	defer alive.Close()
	if err := cmd.Start(); err != nil {
		return err
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		err = cmd.Wait()
	}()
	select {
	case <-ended:
	case <-ctx.Done():
		_ = cmd.Process.Kill()
		why := errors.Join(context.Cause(ctx), from.drop(), to.drop()) // it ends once no call of its waits for an answer
		select {
		case <-ended:
		case <-time.After(patience):
			why = fmt.Errorf("%w; process %d, which copied, does not end", why, cmd.Process.Pid)
		}
		return why
	}
	if err == nil {
		return nil
	}
	text := lastLine(strings.TrimSpace(said.String()))
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		switch errno := syscall.Errno(max(exit.ExitCode(), 0)); errno {
		case unix.ENOSPC, unix.EDQUOT:
			return fmt.Errorf("%w: %s", volume.ErrNoSpace, text)
		case unix.ENOTCONN, unix.ECONNABORTED, unix.ESHUTDOWN:
			return fmt.Errorf("%w: %s", volume.ErrUnavailable, text)
		}
	}
	return fmt.Errorf("copy its files: %w: %s", err, text)
}
