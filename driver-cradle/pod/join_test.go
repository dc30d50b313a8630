//go:build linux

package pod

import (
	"bufio"
	"strings"
	"testing"

	"github.com/cradlestack/cradlestack/driver-cradle/image"
	"github.com/cradlestack/cradlestack/spec"
)

// What the guest is told of a container that joins: the image's and its own volumes have names that none of the pod's have.
func TestJoinOf(t *testing.T) {
	img := &image.Image{Reference: "registry/app", ID: "sha256:" + strings.Repeat("2", 64), Digest: "sha256:" + strings.Repeat("3", 64), Layers: []image.Layer{{DiffID: "sha256:" + strings.Repeat("1", 64)}}}
	img.Config.Config.Cmd = []string{"serve"}
	img.Config.Config.Volumes = map[string]struct{}{"/data": {}}
	j := &spec.Join{ID: strings.Repeat("ab", 32), Run: 3, Volumes: []spec.Volume{{Name: "own", Scratch: &spec.ScratchVolume{}}}}
	j.Container.Name, j.Container.Image = "side", "app"
	j.Container.Mounts = []spec.Mount{{Volume: "own", Path: "/own"}}
	w, err := joinOf(j, img)
	if err != nil {
		t.Fatal(err)
	}
	if w.Container.ID != j.ID || w.Run != 3 || len(w.Container.Layers) != 1 || len(w.Volumes) != 2 || len(w.Container.Mounts) != 2 {
		t.Fatalf("%+v", w)
	}
	names := map[string]bool{}
	for _, v := range w.Volumes {
		names[v.Name] = true
	}
	for _, m := range w.Container.Mounts {
		if !names[m.Volume] || m.Volume == "own" {
			t.Errorf("mount %+v is none of %v", m, names)
		}
	}
	if j.Container.Mounts[0].Volume != "own" {
		t.Error("the caller's was changed")
	}
}

func TestIsHostCall(t *testing.T) {
	for begin, want := range map[string]bool{
		"POST " + spec.JoinPath + " HTTP/1.1\r\nHost: x\r\n\r\n":              true,
		"POST " + spec.LeavePath + "?container=a HTTP/1.1\r\nHost: x\r\n\r\n": true,
		"GET " + spec.JoinPath + " HTTP/1.1\r\nHost: x\r\n\r\n":               false,
		"POST /containers/main/start HTTP/1.1\r\n\r\n":                        false,
		"GET /_ping HTTP/1.0\r\n\r\n":                                         false,
		"P":                                                                   false,
		"":                                                                    false,
	} {
		in := bufio.NewReader(strings.NewReader(begin))
		if got, _ := isHostCall(in); got != want {
			t.Errorf("%q: %v", begin, got)
		}
		if kept, _ := in.Peek(in.Buffered()); string(kept) != begin {
			t.Errorf("of %q %q is passed on", begin, kept)
		}
	}
}
