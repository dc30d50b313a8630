package server

import (
	"bytes"
	"encoding/binary"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/hashicorp/nomad/api"
	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/spec"
)

func inotifyEvent(mask uint32, name string, length int) []byte {
	var b bytes.Buffer
	for _, n := range []uint32{1, mask, 0, uint32(length)} {
		_ = binary.Write(&b, binary.NativeEndian, n)
	}
	b.WriteString(name)
	b.Write(make([]byte, max(0, length-len(name))))
	return b.Bytes()
}

func TestCreatedNames(t *testing.T) {
	all := slices.Concat(inotifyEvent(unix.IN_CREATE, "a.main", 16), inotifyEvent(unix.IN_CREATE, "b.main", 16), inotifyEvent(unix.IN_IGNORED, "", 0))
	if names, gone := createdNames(all); !slices.Equal(names, []string{"a.main", "b.main"}) || !gone {
		t.Errorf("%q, %v", names, gone)
	}
	for n := range all { // what is cut off is no event
		if names, _ := createdNames(all[:n]); len(names) != n/32 && n < 64 {
			t.Errorf("%d bytes: %q", n, names)
		}
	}
	long := inotifyEvent(unix.IN_CREATE, "x", 16)
	binary.NativeEndian.PutUint32(long[12:], 1<<31)
	if names, _ := createdNames(long); names != nil {
		t.Errorf("%q", names)
	}
}

// A pod whose node says that it answers runs, until Nomad says what it knows better.
func TestPodAnswers(t *testing.T) {
	w := newWatch()
	w.change(func() {
		w.jobs["docker-a"] = &jobState{run: 1, allocs: map[string]*api.AllocationListStub{}}
		w.take(&api.AllocationListStub{ID: "1", JobID: "docker-a", CreateIndex: 5, ModifyIndex: 5, ClientStatus: "pending", DesiredStatus: "run"})
	})
	phase := func() phase {
		w.mu.Lock()
		defer w.mu.Unlock()
		return w.stateOf("docker-a", 1, anyTry).phase
	}
	changed := w.changed
	w.answers("2")
	if phase() != phasePending || w.isEarly("1") {
		t.Error("it runs, as another one answers")
	}
	w.answers("1")
	select {
	case <-changed:
	default:
		t.Error("nobody was told")
	}
	if phase() != phaseRunning || !w.isEarly("1") {
		t.Error("it does not run")
	}
	told := func(index uint64, status string, task *api.TaskState) {
		a := &api.AllocationListStub{ID: "1", JobID: "docker-a", CreateIndex: 5, ModifyIndex: index, ClientStatus: status, DesiredStatus: "run"}
		if task != nil {
			a.TaskStates = map[string]*api.TaskState{"main": task}
		}
		w.change(func() { w.take(a) })
	}
	told(6, "pending", &api.TaskState{State: "pending"}) // on its way before that
	if phase() != phaseRunning {
		t.Error("it does not run any more, as Nomad was late")
	}
	told(7, "running", &api.TaskState{State: "running", StartedAt: time.Now()})
	if phase() != phaseRunning || w.isEarly("1") {
		t.Error("it is early, though Nomad knows")
	}
	told(8, "failed", nil)
	w.answers("1")
	if phase() != phaseEnded {
		t.Error("it runs, though it has failed")
	}
}

// What the driver does with the directory is noticed; where that comes later, as well.
func TestFollowAnswering(t *testing.T) {
	s := &Server{Config: Config{Pods: t.TempDir()}, tenants: map[Access]*tenant{}}
	one := &tenant{watch: newWatch()}
	s.tenants[Access{}] = one
	one.watch.change(func() {
		one.watch.jobs["docker-a"] = &jobState{run: 1, allocs: map[string]*api.AllocationListStub{}}
		one.watch.take(&api.AllocationListStub{ID: "1-2", JobID: "docker-a", CreateIndex: 5, ClientStatus: "pending", DesiredStatus: "run"})
	})
	if err := s.watchAnswering(t.Context()); err == nil {
		t.Error("there is no directory")
	}
	dir := filepath.Join(s.Pods, spec.AnsweringDir)
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- s.watchAnswering(t.Context()) }()
	for !one.watch.isEarly("1-2") {
		for _, name := range []string{"1-2.other", "nothing", "1-2.main"} {
			if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.Remove(filepath.Join(dir, name)); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := os.Remove(dir); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; err == nil {
		t.Error("the directory is gone, and nobody has noticed")
	}
}
