//go:build vm

package guest_test

import (
	"strings"
	"testing"

	"github.com/cradlestack/cradlestack/driver-cradle/vmm"
	"github.com/cradlestack/cradlestack/driver-cradle/wire"
	"github.com/cradlestack/cradlestack/spec"
)

// joiner is a container of another image, whose layers are plugged into the machine.
func (m *machine) joiner(image string, c spec.Container) wire.Join {
	m.Helper()
	img := pull(m, image)
	c.ID = strings.Repeat("abcdef01", 8)
	c.Image.Reference, c.Env = img.Reference, img.Config.Config.Env
	j := wire.Join{Run: 1}
	for _, layer := range img.Layers {
		c.Layers = append(c.Layers, spec.Layer{DiffID: layer.DiffID})
		key := wire.DiskLayer + layer.DiffID
		lun, ok := m.LUN(key)
		if !ok {
			var err error
			if lun, err = m.AddDisk(m.Context(), vmm.Disk{Key: key, Path: layer.Path, ReadOnly: true}); err != nil {
				m.Fatal(err)
			}
		}
		j.Disks = append(j.Disks, wire.Disk{Key: key, LUN: lun, ReadOnly: true})
	}
	j.Container = c
	return j
}

// TestVMJoin: a container of another image joins a pod that runs, with its files, volumes and limits, and shares its network.
func TestVMJoin(t *testing.T) {
	p := podSpec{}
	p.Containers = []spec.Container{sh("own", "mkdir /www; echo page >/www/index.html; httpd -p 127.0.0.1:8080 -h /www; trap 'exit 3' TERM; echo up; sleep 1000 & wait")}
	m := boots(t, p)
	m.prints("own", "up")
	t.Log("booted")
	j := m.joiner("debian", sh("guest", `cat /data/file /kept 2>/dev/null; hostname; echo kept | tee /data/file >/kept; exec 3<>/dev/tcp/127.0.0.1/8080
printf "GET / HTTP/1.0\r\n\r\n" >&3; cat <&3; trap "exit 7" TERM; echo running; sleep 1000 & wait`))
	j.Container.Command[0] = "bash"
	j.Container.Resources.Memory = 64 << 20
	j.Container.Mounts = []spec.Mount{{Volume: "own-data", Path: "/data"}}
	j.Volumes = []spec.Volume{{Name: "own-data", Scratch: &spec.ScratchVolume{}}}

	var s wire.ContainerStatus
	join := func() {
		t.Log("joins")
		t.Helper()
		if err := m.call("POST", wire.PathJoin, j, &s); err != nil {
			t.Fatal(err)
		}
	}
	join()
	if s.State != wire.StateCreated {
		t.Errorf("it was not held: %+v", s)
	}
	join() // whose answer did not come
	if err := m.do("guest", "start"); err != nil {
		t.Fatal(err)
	}
	m.prints("guest", "running")
	if out, _ := m.logs("guest"); !strings.Contains(out, "page") || !strings.HasPrefix(out, m.launch.Launch.Hostname+"\n") {
		t.Errorf("the pod's own container was not reached, or it has another host name: %q", out)
	}
	if e := m.exec("guest", guestExec("sh", "-c", "cat /sys/fs/cgroup/memory.max; cat /etc/os-release | grep ^ID="), ""); e.Stdout != "67108864\nID=debian\n" {
		t.Errorf("exec: %+v", e)
	}
	if err := m.do("guest", "stop"); err != nil {
		t.Fatal(err)
	}
	if s := m.state("guest"); s.ExitCode != 7 || s.Running {
		t.Errorf("state %+v", s)
	}
	join()
	if s := m.state("guest"); s.Status != wire.StateExited {
		t.Errorf("the same run once more changed it: %+v", s)
	}
	if s := m.state("own"); !s.Running {
		t.Errorf("its end was not its own alone: %+v", s)
	}
	// One that shares processes and memory with the pod's own sees and has them, and so has what is executed in it.
	m.exec("own", guestExec("sh", "-c", "echo shm >/dev/shm/file"), "")
	shares := m.joiner("debian", sh("shares", "cat /dev/shm/file; cat /proc/1/comm; test $$ != 1 && echo not the first; exec sleep 1000"))
	shares.Container.ID, shares.PID, shares.IPC = strings.Repeat("12345678", 8), m.launch.Launch.Containers[0].ID, m.launch.Launch.Containers[0].ID
	if err := m.call("POST", wire.PathJoin, shares, &s); err != nil {
		t.Fatal(err)
	}
	if err := m.do("shares", "start"); err != nil {
		t.Fatal(err)
	}
	m.prints("shares", "shm\nsh\nnot the first\n")
	const inside = "cat /dev/shm/file; readlink /proc/self/ns/ipc; readlink /proc/self/ns/pid"
	if e, own := m.exec("shares", guestExec("sh", "-c", inside), ""), m.exec("own", guestExec("sh", "-c", inside), ""); e.Stdout != own.Stdout || !strings.HasPrefix(e.Stdout, "shm\nipc:[") {
		t.Errorf("exec: %+v, and in the pod's own %+v", e, own)
	}
	if err := m.do("shares", "stop"); err != nil {
		t.Fatal(err)
	}
	if s := m.state("own"); !s.Running {
		t.Errorf("the end of one that shares its processes has ended the pod's own: %+v", s)
	}
	if err := m.call("POST", wire.PathLeave+"?container="+shares.Container.ID, nil, nil); err != nil {
		t.Fatal(err)
	}
	j.Run = 2
	join()
	if err := m.do("guest", "start"); err != nil {
		t.Fatal(err)
	}
	m.prints("guest", "kept\nkept\n")

	other := j
	other.Container.ID = m.launch.Launch.Containers[0].ID
	if err := m.call("POST", wire.PathJoin, other, nil); err == nil {
		t.Error("a container joined in the place of the pod's own")
	}
	if err := m.call("POST", wire.PathLeave+"?container="+m.launch.Launch.Containers[0].ID, nil, nil); err == nil {
		t.Error("the pod's own container left")
	}
	t.Log("leaves")
	for range 2 { // the second time it has left
		if err := m.call("POST", wire.PathLeave+"?container="+j.Container.ID, nil, nil); err != nil {
			t.Fatal(err)
		}
	}
	for _, d := range j.Disks {
		if d.Key == m.launch.Disks[1].Key {
			continue
		}
		if err := m.RemoveDisk(t.Context(), d.LUN); err != nil { // nobody uses it
			t.Error(err)
		}
	}
	t.Log("its disks are unplugged")
	j = m.joiner("debian", j.Container)
	j.Container.Layers = j.Container.Layers[:len(j.Disks)]
	j.Container.Mounts, j.Run = nil, 3
	join()
	if err := m.do("guest", "start"); err != nil {
		t.Fatal(err)
	}
	m.prints("guest", "running")
	if out, _ := m.logs("guest"); strings.Contains(out, "kept") {
		t.Errorf("files of a container that has left: %q", out)
	}
	t.Log("the pod stops")
	if err := m.do("own", "stop"); err != nil {
		t.Fatal(err)
	}
	e := m.ends()
	if e.ExitCode != 3 || len(e.Containers) != 2 || e.Containers[1].ExitCode != 7 {
		t.Errorf("the pod's end: %+v", e)
	}
	if err := m.call("POST", wire.PathJoin, wire.Join{Container: spec.Container{ID: "late", Name: "late"}}, nil); err == nil {
		t.Error("a container joined a pod that has ended")
	}
}
