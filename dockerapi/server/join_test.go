package server

import (
	"strings"
	"testing"

	"github.com/cradlestack/cradlestack/spec"
)

// A container that joins has those volumes that the other one has, at whatever path, and as that has them.
func TestSharedVolumes(t *testing.T) {
	pod := func(mounts ...spec.Mount) *spec.Pod {
		p := &spec.Pod{Containers: []spec.PodContainer{{Settings: spec.Settings{Mounts: mounts}}}, Volumes: []spec.Volume{
			{Name: "data", Class: "lv2"}, {Name: "files", Class: "nfs"}, {Name: "host-1", Directory: &spec.DirectoryVolume{Path: "/srv"}}, {Name: "anonymous-1", Scratch: &spec.ScratchVolume{}},
		}}
		return p
	}
	own := []spec.Mount{{Volume: "data", Path: "/var/data"}, {Volume: "files", Path: "/files", ReadOnly: true}, {Volume: "host-1", Path: "/ro", ReadOnly: true}, {Volume: "host-1", Path: "/rw"}}
	x := &record{Name: "web", Pod: pod(own...)}
	p := pod(spec.Mount{Volume: "data", Path: "/d"}, spec.Mount{Volume: "files", Path: "/f", ReadOnly: true}, spec.Mount{Volume: "host-1", Path: "/h"}, spec.Mount{Volume: "anonymous-1", Path: "/a"})
	shared, err := sharedVolumes(x, p)
	if err != nil || len(shared) != 3 || shared["data"] != "/var/data" || shared["files"] != "/files" || shared["host-1"] != "/rw" {
		t.Errorf("%v, %v", shared, err)
	}
	p.Containers[0].Mounts[1].ReadOnly = false
	if _, err := sharedVolumes(x, p); err == nil || !strings.Contains(err.Error(), "/web has it mounted read-only") {
		t.Errorf("written where the other one only reads: %v", err)
	}
	x.Pod.Containers[0].Mounts = own[1:]
	if _, err := sharedVolumes(x, p); err == nil || !strings.Contains(err.Error(), "data is none of them") {
		t.Errorf("a volume that the other one has not got: %v", err)
	}
}
