package volumes

import (
	"encoding/json"
	"errors"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/cradlestack/cradlestack/csi-plugin/filer/api"
	"github.com/cradlestack/cradlestack/csi-plugin/mount"
	"github.com/cradlestack/cradlestack/csi-plugin/volume"
)

// What a host mounts is tested in a machine whose kernel has an NFS client (TestVMSoakFilerMounts); here is what needs none.

// A filer that has the volume vol, and publications.
type filer struct {
	mu        sync.Mutex
	published map[string]bool
}

func (f *filer) ids() (ids []string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for id := range f.published {
		ids = append(ids, id)
	}
	return ids
}

func serve(t *testing.T, published ...string) (*filer, *Backend) {
	t.Helper()
	dir, err := os.MkdirTemp("", "stage-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	f := &filer{published: map[string]bool{}}
	for _, id := range published {
		f.published[id] = true
	}
	mux := http.NewServeMux()
	answer := func(w http.ResponseWriter, v any) { _ = json.NewEncoder(w).Encode(v) }
	mux.HandleFunc("GET /volumes/{id}", func(w http.ResponseWriter, r *http.Request) {
		answer(w, volume.Volume{ID: r.PathValue("id"), Parameters: volume.Parameters{Class: volume.NFS}})
	})
	mux.HandleFunc("GET /publications", func(w http.ResponseWriter, _ *http.Request) {
		all := []api.Publication{}
		for _, id := range f.ids() {
			all = append(all, api.Publication{ID: id, Address: "192.0.2.1:2049", Export: "/vol/secret"})
		}
		answer(w, all)
	})
	mux.HandleFunc("DELETE /publications/{id}", func(w http.ResponseWriter, r *http.Request) {
		f.mu.Lock()
		defer f.mu.Unlock()
		delete(f.published, r.PathValue("id"))
		answer(w, struct{}{})
	})
	l, err := net.Listen("unix", filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: mux}
	done := make(chan error)
	go func() { done <- server.Serve(l) }()
	t.Cleanup(func() {
		server.Close()
		<-done
	})
	b := Open(api.Client{Socket: filepath.Join(dir, "s")})
	b.dir = filepath.Join(dir, "nfs")
	return f, b
}

// left writes a note, as a call that was killed, or the time before a reboot, has left it.
func (b *Backend) left(t *testing.T, id, text string) {
	t.Helper()
	if err := errors.Join(os.MkdirAll(b.notes(), 0o700), os.MkdirAll(b.point(id), 0o700), os.WriteFile(b.noteFile(id), []byte(text), 0o600)); err != nil {
		t.Fatal(err)
	}
}

func (b *Backend) rest(t *testing.T) (names []string) {
	t.Helper()
	for _, dir := range []string{b.notes(), filepath.Join(b.dir, "mounts")} {
		entries, err := os.ReadDir(dir)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
		for _, e := range entries {
			names = append(names, e.Name())
		}
	}
	return names
}

// What is published and not mounted is found, and ended: of this host's own publications, and no others.
func TestRepairEndsPublications(t *testing.T) {
	f, b := serve(t, "host-own", "host-others")
	b.left(t, "vol", `{"publication":"host-own"}`)
	for _, look := range []bool{true, false} {
		var found []string
		if err := b.Repair(t.Context(), look, func(what string) { found = append(found, what) }); err != nil {
			t.Fatal(err)
		}
		if len(found) != 1 || !strings.HasPrefix(found[0], "volume vol: published for this host, and not mounted") {
			t.Errorf("found %q", found)
		}
		if look && (len(f.ids()) != 2 || len(b.rest(t)) != 2) {
			t.Errorf("who only looks leaves %v, %v", f.ids(), b.rest(t))
		}
	}
	if ids := f.ids(); len(ids) != 1 || ids[0] != "host-others" || len(b.rest(t)) > 0 {
		t.Errorf("left are the publications %v, and %v", ids, b.rest(t))
	}
}

// What was to be mounted again before a reboot is not afterwards: nobody is there who has it.
func TestNoteAfterReboot(t *testing.T) {
	f, b := serve(t, "host-own")
	place := t.TempDir()
	b.left(t, "vol", `{"publication":"host-own","former":"filer:/x","boot":"another","places":[{"at":"`+place+`","root":"/","options":"rw"}]}`)
	var found []string
	if err := b.Repair(t.Context(), false, func(what string) { found = append(found, what) }); err != nil {
		t.Fatal(err)
	}
	if len(found) != 1 || !strings.Contains(found[0], "and not mounted") || len(f.ids()) > 0 || len(b.rest(t)) > 0 {
		t.Errorf("found %q; left are the publications %v, and %v", found, f.ids(), b.rest(t))
	}
	if mounted, err := mount.Is(place); err != nil || mounted {
		t.Errorf("mounted: %t, %v", mounted, err)
	}
}

// A filer that is away costs no note: the publication would never end.
func TestRepairWithoutFiler(t *testing.T) {
	_, b := serve(t)
	b.left(t, "vol", `{"publication":"host-own"}`)
	b.client.Socket += "-gone"
	if err := b.Repair(t.Context(), false, func(what string) { t.Errorf("found %s", what) }); !errors.Is(err, volume.ErrUnavailable) {
		t.Errorf("without a filer: %v", err)
	}
	if rest := b.rest(t); len(rest) != 2 {
		t.Errorf("left are %v", rest)
	}
}

// What was never staged needs no filer to be unstaged; a note that is damaged is named.
func TestUnstage(t *testing.T) {
	f, b := serve(t, "host-own")
	away := b.client
	b.client.Socket += "-gone"
	for _, id := range []string{"vol", "../x", ""} {
		if err := b.Unstage(t.Context(), id); err != nil {
			t.Errorf("%q: %v", id, err)
		}
	}
	b.client = away
	for _, text := range []string{"", "{", `{"publication":"../x"}`, `{"publication":""}`} {
		b.left(t, "vol", text)
		if err := b.Unstage(t.Context(), "vol"); err == nil || !strings.Contains(err.Error(), b.noteFile("vol")) {
			t.Errorf("a note %q: %v", text, err)
		}
	}
	b.left(t, "vol", `{"publication":"host-own"}`)
	if err := b.Unstage(t.Context(), "vol"); err != nil || len(f.ids()) > 0 || len(b.rest(t)) > 0 {
		t.Errorf("%v; left are %v, %v", err, f.ids(), b.rest(t))
	}
}

// A host without an NFS client says what it lacks and what to do, and publishes nothing.
func TestStageWithoutClient(t *testing.T) {
	if err := mount.NFSClient(); !errors.Is(err, mount.ErrNoNFS) {
		t.Skipf("this host has an NFS client, or this is not root: %v", err)
	}
	f, b := serve(t)
	_, err := b.Stage(t.Context(), "vol", volume.Use{As: volume.AsFiles})
	if !errors.Is(err, volume.ErrHost) || !strings.Contains(err.Error(), "volume vol: ") || !strings.Contains(err.Error(), "modprobe nfs") || !strings.Contains(err.Error(), "attach=direct") {
		t.Errorf("without a client: %v", err)
	}
	if len(f.ids()) > 0 || len(b.rest(t)) > 0 {
		t.Errorf("left are %v, %v", f.ids(), b.rest(t))
	}
	for _, as := range []volume.As{volume.AsRaw, volume.AsGuest} {
		if _, err := b.Stage(t.Context(), "vol", volume.Use{As: as}); !errors.Is(err, volume.ErrInvalid) {
			t.Errorf("staged as %d: %v", as, err)
		}
	}
}

// Volumes that are staged at the same time, the first ones of a host, give it one identity.
func TestIdentity(t *testing.T) {
	for range 50 {
		b := Open(api.Client{})
		b.dir = t.TempDir()
		var g sync.WaitGroup
		for range 8 {
			g.Go(func() {
				if id, err := b.identity(t.Context()); err != nil || len(id) != 26 {
					t.Errorf("it is %q, %v", id, err)
				}
			})
		}
		g.Wait()
	}
}

func TestAddresses(t *testing.T) {
	b := Open(api.Client{Socket: "/there"})
	all, err := b.addresses()
	if err != nil {
		t.Fatal(err)
	}
	loopback := false
	for _, p := range all {
		if !p.IsSingleIP() {
			t.Errorf("%v is more than this host", p)
		}
		loopback = loopback || p.Addr().IsLoopback()
	}
	if !loopback {
		t.Errorf("a filer of this host may see it at 127.0.0.1, and not at %v", all)
	}
	b.client = api.Client{Address: "192.0.2.1:2051"}
	if all, err = b.addresses(); err != nil && !errors.Is(err, volume.ErrUnavailable) {
		t.Error(err)
	}
	for _, p := range all {
		if p.Addr().IsLoopback() {
			t.Errorf("a filer elsewhere sees it at %v", p)
		}
	}
}
