package driver

import (
	"errors"
	"reflect"
	"strings"
	"testing"

	"github.com/hashicorp/nomad/plugins/drivers"

	"github.com/cradlestack/cradlestack/spec"
)

// mounting is a pod of a task that Nomad gives mounts.
func mounting(t *testing.T, h *host, mounts ...*drivers.MountConfig) (*spec.Pod, []attachment, error) {
	t.Helper()
	return mountingWith(t, h, "", mounts...)
}

// mountingWith is mounting with more of the task's configuration.
func mountingWith(t *testing.T, h *host, config string, mounts ...*drivers.MountConfig) (*spec.Pod, []attachment, error) {
	t.Helper()
	task, c, err := parseTask(t, `job "j" {
		group "g" {
			task "t" {
				driver = "cradle"
				config {
					image = "debian:12"
					`+config+`
				}
			}
		}
	}`)
	if err != nil {
		t.Fatal(err)
	}
	nomads := aTask(task)
	nomads.AllocDir, nomads.Mounts = "", mounts
	return attachedPodOf(nomads, c, h)
}

// Which volumes get the image's content is the task's to say.
func TestVolumeCopy(t *testing.T) {
	h := aHost()
	h.direct = func(path string) (*spec.DirectAttachment, error) {
		if path != "/files" {
			return nil, nil
		}
		return &spec.DirectAttachment{Volume: spec.Volume{Name: "files", Block: &spec.BlockVolume{Path: "/pool/files.img"}}}, nil
	}
	mounts := []*drivers.MountConfig{{TaskPath: "/direct", HostPath: "/files"}, {TaskPath: "/shared", HostPath: "/srv/shared"}, {TaskPath: "/other", HostPath: "/srv/other"}}
	for _, test := range []struct {
		config string
		copies []bool
	}{
		{"", []bool{true, false, false}},
		{`volume_copy = ["/shared", "/direct"]`, []bool{true, true, false}},
		{`volume_no_copy = ["/direct", "/shared"]`, []bool{false, false, false}},
	} {
		p, _, err := mountingWith(t, h, test.config, mounts...)
		if err != nil {
			t.Errorf("%s: %v", test.config, err)
			continue
		}
		for i, m := range p.Containers[0].Mounts {
			d := p.Volumes[i].Directory
			if m.NoCopy == test.copies[i] || d != nil && d.Fill != test.copies[i] {
				t.Errorf("%s: %s is %+v, of %+v", test.config, m.Path, m, d)
			}
		}
	}
	if _, _, err := mountingWith(t, h, `volume_copy = ["/elsewhere"]`, mounts...); err == nil || !strings.Contains(err.Error(), "volume_copy: /elsewhere is no destination of a volume_mount") {
		t.Errorf("a destination that is none: %v", err)
	}
}

func TestDirectVolumes(t *testing.T) {
	h := aHost()
	h.direct = func(path string) (*spec.DirectAttachment, error) {
		d := &spec.DirectAttachment{Target: path, Control: "/run/cradle/direct/" + path[1:] + ".sock", Volume: spec.Volume{Name: "id-of-" + path[1:], Class: "lv2"}}
		block := &spec.BlockVolume{Path: "/pool/" + path[1:] + ".img", FSType: "xfs", Options: "noatime"}
		switch path {
		case "/files":
			d.Volume.Block, d.Limits = block, spec.IOLimits{IOPS: 100}
		case "/raw", "/node":
			d.Volume.Block, d.Raw = block, true
		case "/nfs":
			d.Volume.NFS = &spec.NFSVolume{Address: "filer", Export: "/x"}
		case "/broken":
			return nil, errors.New("its record can't be read")
		default:
			return nil, nil
		}
		return d, nil
	}
	p, attached, err := mounting(t, h,
		&drivers.MountConfig{TaskPath: "data", HostPath: "/files"}, &drivers.MountConfig{TaskPath: "/raw", HostPath: "/raw", Readonly: true},
		&drivers.MountConfig{TaskPath: "/dev/disk", HostPath: "/node"}, &drivers.MountConfig{TaskPath: "/nfs", HostPath: "/nfs", Readonly: true},
		&drivers.MountConfig{TaskPath: "/dir", HostPath: "/srv/dir"})
	if err != nil {
		t.Fatal(err)
	}
	block := func(path string, readOnly bool) *spec.BlockVolume {
		return &spec.BlockVolume{Path: "/pool/" + path + ".img", FSType: "xfs", Options: "noatime", ReadOnly: readOnly}
	}
	if want := []spec.Volume{
		{Name: "data", Class: "lv2", Block: block("files", false)},
		{Name: "raw", Class: "lv2", Block: block("raw", true)},
		{Name: "dev-disk", Class: "lv2", Block: block("node", false)},
		{Name: "nfs", Class: "lv2", NFS: &spec.NFSVolume{Address: "filer", Export: "/x", ReadOnly: true}},
		{Name: "dir", Directory: &spec.DirectoryVolume{Path: "/srv/dir"}},
	}; !reflect.DeepEqual(p.Volumes, want) {
		t.Errorf("volumes %+v", p.Volumes)
	}
	if want := []spec.Mount{
		{Volume: "data", Path: "/data"},
		{Volume: "raw", Raw: true, ReadOnly: true},
		{Volume: "dev-disk", Path: "/dev/disk", Raw: true},
		{Volume: "nfs", Path: "/nfs", ReadOnly: true},
		{Volume: "dir", Path: "/dir", NoCopy: true},
	}; !reflect.DeepEqual(p.Containers[0].Mounts, want) {
		t.Errorf("mounts %+v", p.Containers[0].Mounts)
	}
	control := func(name string) string { return "/run/cradle/direct/" + name + ".sock" }
	if want := []attachment{
		{Volume: "data", ID: "id-of-files", Path: "/pool/files.img", Limits: spec.IOLimits{IOPS: 100}, Control: control("files")},
		{Volume: "raw", ID: "id-of-raw", Raw: true, Control: control("raw")},
		{Volume: "dev-disk", ID: "id-of-node", Path: "/pool/node.img", Raw: true, Control: control("node")},
		{Volume: "nfs", ID: "id-of-nfs", Control: control("nfs")},
	}; !reflect.DeepEqual(attached, want) {
		t.Errorf("attached %+v", attached)
	}
	if _, _, err := mounting(t, h, &drivers.MountConfig{TaskPath: "/x", HostPath: "/broken"}); err == nil || !strings.Contains(err.Error(), "volume_mount /x: its record can't be read") {
		t.Errorf("a record that can't be read: %v", err)
	}
}

// A block device has the file system that is on it.
func TestBlockDevices(t *testing.T) {
	h := aHost()
	h.fsType = func(path string) (string, error) {
		return map[string]string{"/dev/loop1": "xfs", "/dev/loop2": "ext4"}[path], nil
	}
	p, _, err := mounting(t, h, &drivers.MountConfig{TaskPath: "/dev/wanted", HostPath: "/dev/loop1"}, &drivers.MountConfig{TaskPath: "/dev/volumes/a", HostPath: "/dev/loop2"})
	if err != nil {
		t.Fatal(err)
	}
	if want := []spec.Mount{{Volume: "dev-wanted", Path: "/dev/wanted", Raw: true}, {Volume: "a", Raw: true}}; !reflect.DeepEqual(p.Containers[0].Mounts, want) {
		t.Errorf("raw devices: %+v", p.Containers[0].Mounts)
	}
	for device, want := range map[string]string{"/dev/loop1": "xfs", "/dev/loop2": "ext4", "/dev/loop3": ""} {
		p, _, err := mounting(t, h, &drivers.MountConfig{TaskPath: "/x", HostPath: device})
		if err != nil || p.Volumes[0].Block.FSType != want {
			t.Errorf("%s: %+v, %v", device, p, err)
		}
	}
}

// What a microVM can't have is refused with the reason.
func TestRefusedMounts(t *testing.T) {
	for _, mode := range []string{"host-to-task", "bidirectional"} {
		_, _, err := mounting(t, aHost(), &drivers.MountConfig{TaskPath: "/x", HostPath: "/srv/x", PropagationMode: mode})
		if want := "volume_mount /x: propagation_mode: " + mode + " is not possible between a host and a microVM: use private"; err == nil || err.Error() != want {
			t.Errorf("%s: %v", mode, err)
		}
	}
	if _, _, err := mounting(t, aHost(), &drivers.MountConfig{TaskPath: "/x", HostPath: "/srv/x", PropagationMode: "private"}); err != nil {
		t.Error(err)
	}
	task, c, err := parseTask(t, "job \"j\" {\n group \"g\" {\n task \"t\" {\n driver = \"cradle\"\n config {\n image = \"debian:12\"\n}\n}\n}\n}")
	if err != nil {
		t.Fatal(err)
	}
	nomads := aTask(task)
	nomads.Devices = []*drivers.DeviceConfig{{HostPath: "/dev/nvidia0", TaskPath: "/dev/nvidia0"}}
	if _, err := podOf(nomads, c, aHost()); err == nil || !strings.Contains(err.Error(), "device: /dev/nvidia0 can't be given to a microVM") {
		t.Errorf("a host's device: %v", err)
	}
}
