package server

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/hashicorp/nomad/api"
	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/dockerapi/translate"
	"github.com/cradlestack/cradlestack/spec"
)

// Nomad's client tells its server of tasks that have started at most five times a second, and the server gathers that once more. On the pods' own node the driver says it
// as well, at once: see spec.AnsweringDir.

// answeringRetry is the time until a directory is looked for again that is not there: the driver makes it when it is first used.
const answeringRetry = 5 * time.Second

// followAnswering takes what the task driver on this machine tells, until ctx ends.
func (s *Server) followAnswering(ctx context.Context) {
	for {
		err := s.watchAnswering(ctx)
		if ctx.Err() != nil {
			return
		}
		s.Log.Debug("watch the pods of this machine", "error", err)
		if !sleepFor(ctx, answeringRetry) {
			return
		}
	}
}

func (s *Server) watchAnswering(ctx context.Context) error {
	dir := filepath.Join(s.Pods, spec.AnsweringDir)
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return fmt.Errorf("inotify: %w", err)
	}
	events := os.NewFile(uintptr(fd), "inotify")
	defer events.Close()
	if _, err := unix.InotifyAddWatch(fd, dir, unix.IN_CREATE|unix.IN_ONLYDIR); err != nil {
		return &os.PathError{Op: "watch", Path: dir, Err: err}
	}
	defer context.AfterFunc(ctx, func() { _ = events.SetReadDeadline(time.Unix(1, 0)) })()
	buf := make([]byte, 64<<10)
	for {
		n, err := events.Read(buf)
		if err != nil {
			return err
		}
		names, gone := createdNames(buf[:n])
		for _, name := range names {
			if alloc, task, _ := strings.Cut(name, "."); task == translate.Own {
				s.podAnswers(alloc)
			}
		}
		if gone {
			return errors.New("the directory is gone")
		}
	}
}

// createdNames are the names in inotify(7)'s events; gone, that there are no more of them.
func createdNames(b []byte) (names []string, gone bool) {
	const mask, length = 4, 12 // struct inotify_event: wd, mask, cookie, len, name
	for len(b) >= unix.SizeofInotifyEvent {
		size := unix.SizeofInotifyEvent + int(binary.NativeEndian.Uint32(b[length:]))
		if size > len(b) {
			break
		}
		if binary.NativeEndian.Uint32(b[mask:])&unix.IN_IGNORED != 0 {
			gone = true
		}
		if name := strings.TrimRight(string(b[unix.SizeofInotifyEvent:size]), "\x00"); name != "" {
			names = append(names, name)
		}
		b = b[size:]
	}
	return names, gone
}

// podAnswers takes for running what Nomad has still pending.
func (s *Server) podAnswers(alloc string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, t := range s.tenants {
		t.watch.answers(alloc)
	}
}

func (w *watch) answers(alloc string) {
	w.mu.Lock()
	found := false
	for _, j := range w.jobs {
		a := j.allocs[alloc]
		if a == nil || a.ClientStatus != api.AllocClientStatusPending || a.DesiredStatus != api.AllocDesiredStatusRun || hasBegun(a) {
			continue
		}
		now := *a
		now.TaskStates = map[string]*api.TaskState{translate.Own: {State: taskRunning, StartedAt: time.Now().UTC()}}
		j.allocs[alloc], found = &now, true
		j.choose()
	}
	w.mu.Unlock()
	if found {
		w.change(func() {})
	}
}

// isEarly says whether a pod is known to answer that Nomad's servers have not heard of.
func isEarly(a *api.AllocationListStub) bool {
	return a != nil && a.ClientStatus == api.AllocClientStatusPending && hasBegun(a)
}

// isEarly says the same of an allocation by its id.
func (w *watch) isEarly(alloc string) bool { return isEarly(w.allocation(alloc)) }

// runs says whether Nomad's servers have an allocation as running.
func (w *watch) runs(alloc string) bool {
	a := w.allocation(alloc)
	return a != nil && a.ClientStatus == api.AllocClientStatusRunning
}

// allocation is what is known of one by its id, nil for nothing: it is not changed any more, but replaced.
func (w *watch) allocation(id string) *api.AllocationListStub {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, j := range w.jobs {
		if a := j.allocs[id]; a != nil {
			return a
		}
	}
	return nil
}
