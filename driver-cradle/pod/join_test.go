//go:build linux

package pod

import (
	"bufio"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

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
	j.Container.Mounts = []spec.Mount{{Volume: "own", Path: "/own"}, {Volume: "theirs", Path: "/shared", Subpath: "a", ReadOnly: true}}
	j.Shared = map[string]string{"theirs": "/var/data"}
	if _, err := joinOf(j, img, []spec.Mount{{Volume: "disk", Path: "/var/data", Raw: true}}); err == nil || !strings.Contains(err.Error(), "no volume at /var/data") {
		t.Errorf("a volume that the pod's own container has not mounted: %v", err)
	}
	w, err := joinOf(j, img, []spec.Mount{{Volume: "own", Path: "/var/data"}}) // by the same name as the other's own
	if err != nil {
		t.Fatal(err)
	}
	if m := w.Container.Mounts[1]; m != (spec.Mount{Volume: "own", Path: "/shared", Subpath: "a", ReadOnly: true}) {
		t.Errorf("the pod's volume is mounted as %+v", m)
	}
	w.Container.Mounts = append(w.Container.Mounts[:1], w.Container.Mounts[2:]...)
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

// A call is bounded in what it sends, and in how many there are at a time: the process that reads it attends to other pods as well.
func TestHostCallIsBounded(t *testing.T) {
	dir := t.TempDir()
	r := (&Dir{path: dir}).running(nil, nil, &spec.Launch{Name: "p"}, time.Now(), true)
	defer r.stop(errEnded)
	call := func() (client net.Conn, done chan struct{}) {
		client, host := net.Pipe()
		done = make(chan struct{})
		go func() {
			defer close(done)
			r.answerCall(host, bufio.NewReader(host))
			host.Close()
		}()
		t.Cleanup(func() { client.Close() })
		return client, done
	}
	const begin = "POST " + spec.JoinPath + " HTTP/1.1\r\nX: "
	client, done := call()
	for sent, line := 0, begin; ; sent, line = sent+len(line), strings.Repeat("a", 64<<10) {
		if _, err := client.Write([]byte(line)); err != nil {
			break // it has let go
		}
		if sent > 2*maxCall {
			t.Fatal("it takes a header without end")
		}
	}
	<-done
	var slow []net.Conn
	for range maxCalls {
		c, _ := call()
		if _, err := c.Write([]byte(begin)); err != nil { // which somebody has read
			t.Fatal(err)
		}
		slow = append(slow, c)
	}
	last, done := call()
	go last.Write([]byte("no request\r\n\r\n"))
	select {
	case <-done:
		t.Fatal("more calls at a time than there may be")
	default:
	}
	slow[0].Close()
	<-done
}

// The last container that has joined with an image lets go of it; the pod's own holds are others.
func TestJoinedLetGoOfImages(t *testing.T) {
	root := t.TempDir()
	images, err := image.Open(root)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	r := (&Dir{path: dir}).running(nil, nil, &spec.Launch{Name: "p"}, time.Now(), true)
	defer r.stop(errEnded)
	r.joining = &Joining{Images: images}
	if err := os.Mkdir(r.holder(), 0o700); err != nil {
		t.Fatal(err)
	}
	img := &image.Image{ID: "sha256:" + strings.Repeat("2", 64)}
	for _, owner := range []string{dir, r.holder()} {
		if _, err := images.Hold(img, owner); err != nil {
			t.Fatal(err)
		}
	}
	all := joinedContainers{"a": {Image: img.ID}, "b": {Image: img.ID}}
	for _, id := range []string{"a", "b"} {
		if err := r.remove(all, id); err != nil {
			t.Fatal(err)
		}
		holds, err := os.ReadDir(filepath.Join(root, "holds"))
		if err != nil || len(holds) != 1+min(len(all), 1) {
			t.Errorf("with %d containers: %v, %v", len(all), holds, err)
		}
		if kept, err := r.dir.joined(); err != nil || len(kept) != len(all) {
			t.Errorf("%d are noted, %v", len(kept), err)
		}
	}
}
