package main

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cradlestack/cradlestack/csi-plugin/dir"
	"github.com/cradlestack/cradlestack/csi-plugin/filer/api"
	"github.com/cradlestack/cradlestack/csi-plugin/filer/lease"
	"github.com/cradlestack/cradlestack/csi-plugin/filer/volumes"
	"github.com/cradlestack/cradlestack/csi-plugin/tree"
	"github.com/cradlestack/cradlestack/csi-plugin/volume"
)

func testFiler(t *testing.T, backend volume.Backend) *filer {
	by := lease.New()
	by.Extend(lease.Forever)
	by.Open()
	d := t.TempDir()
	return &filer{
		backend: backend, keptBy: onDirectories, dir: d, state: d, kept: d, lease: by, long: t.Context(), log: slog.New(slog.DiscardHandler),
		entered: map[string]*visit{}, leaving: map[string]bool{}, atWork: make(chan struct{}, maxAtWork), comparing: make(chan struct{}, maxComparing), lists: tree.NewMemory(1 << 30),
	}
}

// What who has the key asks for is checked as if anybody had: it is refused, by the sentinel of the package volume, and nothing is made. Nomad's users are not answered at all.
func TestVolumesRefused(t *testing.T) {
	pool := t.TempDir()
	b, err := dir.Open([]dir.Pool{{Name: "default", Path: pool}})
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	f := testFiler(t, b)
	f.shared, f.images = true, true
	f.audit = newAudit(f.state, f.log)
	handler := f.handler()
	ask := func(h http.Handler, method, path, body string) (code int, text string) {
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequest(method, path, strings.NewReader(body)))
		data, _ := io.ReadAll(w.Result().Body)
		return w.Code, string(data)
	}
	if _, err := b.Create(t.Context(), volume.Request{Name: "block", Size: 1 << 20, Parameters: volume.Parameters{Class: volume.LV2}}); err != nil {
		t.Fatal(err)
	}
	const nfs = `"parameters":{"class":"nfs"}`
	for _, c := range []struct {
		method, path, body, kind string
	}{
		{"PUT", "/volumes/v", ``, "invalid"},
		{"PUT", "/volumes/v", `{"size":"x"}`, "invalid"},
		{"PUT", "/volumes/v", `{` + strings.Repeat(" ", maxRequest) + nfs + `}`, "invalid"},
		{"PUT", "/volumes/v", `{"parameters":{"class":"lv2"}}`, "invalid"},
		{"PUT", "/volumes/v", `{"parameters":{"class":"nfs","colour":"red"}}`, "invalid"},
		{"PUT", "/volumes/v", `{"parameters":{"class":"nfs","snapshots":"hourly=1000000"}}`, "invalid"},
		{"PUT", "/volumes/v", `{"parameters":{"class":"nfs","pool":"../x"}}`, "invalid"},
		{"PUT", "/volumes/v", `{"size":1048576,` + nfs + `}`, "invalid"},
		{"PUT", "/volumes/v", `{"limit":1048576,` + nfs + `}`, "invalid"},
		{"PUT", "/volumes/v", `{"size":-1,` + nfs + `}`, "range"},
		{"PUT", "/volumes/v", `{"origin":{"copy":"a@b"},` + nfs + `}`, "invalid"},
		{"PUT", "/volumes/v", `{"origin":{"volume":"a","snapshot":"a@b"},` + nfs + `}`, "invalid"},
		{"PUT", "/volumes/v", `{"origin":{"snapshot":"../a@b"},` + nfs + `}`, "invalid"},
		{"PUT", "/volumes/v", `{"origin":{"volume":"absent"},` + nfs + `}`, "not found"},
		{"PUT", "/volumes/v", `{"origin":{"volume":"../absent"},` + nfs + `}`, "not found"},
		{"PUT", "/volumes/v", `{"origin":{"volume":"block"},` + nfs + `}`, "invalid"},
		{"PUT", "/volumes/..%2fv", `{` + nfs + `}`, "invalid"},
		{"PUT", "/volumes/.lock", `{` + nfs + `}`, "invalid"},
		{"PUT", "/volumes/" + strings.Repeat("v", volume.MaxName+1), `{` + nfs + `}`, "invalid"},
		{"GET", "/volumes/..%2f..%2fetc", "", "not found"},
		{"GET", "/volumes/block", "", "invalid"},
		{"DELETE", "/volumes/block", "", "invalid"},
		{"POST", "/volumes/block/expand", `{"bytes":2097152}`, "invalid"},
		{"POST", "/volumes/absent/expand", `{"bytes":2097152}`, "not found"},
		{"POST", "/volumes/absent/expand", `{"bytes":-1}`, "range"},
		{"POST", "/volumes/absent/expand", `{"bytes":2,"limit":1}`, "range"},
		{"PUT", "/snapshots/block@s", "", "invalid"},
		{"DELETE", "/snapshots/block@s", "", "invalid"},
		{"PUT", "/snapshots/absent@s", "", "not found"},
		{"PUT", "/snapshots/absent", "", "not found"},
		{"PUT", "/snapshots/..%2fa@s", "", "not found"},
		{"POST", "/switch", "", "invalid"},
		{"GET", "/capacity?class=lv2", "", "invalid"},
		{"GET", "/capacity?class=nfs&colour=red", "", "invalid"},
		{"GET", "/capacity?class=nfs&pool=none", "", "invalid"},
	} {
		if code, text := ask(handler, c.method, c.path, c.body); code < 400 || !strings.Contains(text, `"kind":"`+c.kind+`"`) {
			t.Errorf("%s %.60s %.80s: %d %s; and it is %s", c.method, c.path, c.body, code, text, c.kind)
		}
	}
	for _, c := range [][2]string{{"DELETE", "/volumes/absent"}, {"DELETE", "/volumes/..%2fabsent"}, {"DELETE", "/snapshots/absent@s"}, {"DELETE", "/snapshots/no"}} {
		if code, text := ask(handler, c[0], c[1], ""); code != http.StatusOK {
			t.Errorf("%v, which is not there: %d %s", c, code, text)
		}
	}
	for path, want := range map[string]string{"/volumes": `{"volumes":[]}`, "/snapshots": "[]", "/snapshots?volume=..%2f": "[]", "/backend": `{"name":"dir","pools":["default"]}`} {
		if code, text := ask(handler, "GET", path, ""); code != http.StatusOK || strings.TrimSpace(text) != want {
			t.Errorf("GET %s: %d %s; want %s", path, code, text, want)
		}
	}
	entries, err := os.ReadDir(pool)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if e.Name() != "block" && e.Name() != ".lock" {
			t.Errorf("made: %s", filepath.Join(pool, e.Name()))
		}
	}
	users := f.usersHandler(&nomad{})
	for _, c := range [][2]string{{"PUT", "/volumes/v"}, {"DELETE", "/volumes/v"}, {"GET", "/volumes/v"}, {"GET", "/volumes"}, {"POST", "/volumes/v/expand"}, {"PUT", "/snapshots/v@s"}, {"DELETE", "/snapshots/v@s"}, {"GET", "/snapshots"}, {"GET", "/capacity"}, {"GET", "/backend"}, {"GET", "/ready"}} {
		if code, text := ask(users, c[0], c[1], `{`+nfs+`}`); code != http.StatusNotFound && code != http.StatusMethodNotAllowed {
			t.Errorf("a user's %v: %d %s", c, code, text)
		}
	}
}

// slow is a backend whose deletions wait.
type slow struct {
	volume.Backend
	goOn chan error
}

func (s slow) Get(_ context.Context, id string) (volume.Volume, error) {
	return volume.Volume{ID: id, Parameters: volume.Parameters{Class: volume.NFS}}, nil
}

func (slow) Snapshot(context.Context, volume.SnapshotRequest) (s volume.Snapshot, err error) {
	return s, nil
}

func (slow) DeleteSnapshot(context.Context, volume.SnapshotID) error { return nil }

func (slow) Snapshots(context.Context, string) ([]volume.Snapshot, error) { return nil, nil }

func (s slow) Delete(ctx context.Context, _ string) error {
	select {
	case err := <-s.goOn:
		return err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// What takes long goes on after its call, under the lease, and is done once: who asks again hears of it. Nobody gets the volume meanwhile. A filer that hands over ends it.
func TestVolumesLast(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := slow{goOn: make(chan error)}
		f := testFiler(t, b)
		long, stop := context.WithCancelCause(t.Context())
		f.long = long
		idle := func() bool { _, idle := f.lease.Lapsed(); return idle }
		for range 2 {
			began := time.Now()
			if err := f.deleteVolume(t.Context(), "v"); !errors.Is(err, api.ErrGoesOn) || time.Since(began) != answerTime {
				t.Fatalf("after %v: %v", time.Since(began), err)
			}
			if idle() {
				t.Error("the lease is not held")
			}
		}
		clients := []netip.Prefix{netip.MustParsePrefix("192.0.2.1/32")}
		if _, err := f.publish(t.Context(), api.Publication{ID: "p", Volume: "v", Clients: clients}); !errors.Is(err, volume.ErrInUse) {
			t.Errorf("what is being deleted is published: %v", err)
		}
		// Another volume's does not wait.
		other := make(chan error)
		go func() { other <- f.deleteVolume(t.Context(), "w") }()
		synctest.Wait()
		b.goOn <- nil
		b.goOn <- nil
		if err := <-other; err != nil {
			t.Error(err)
		}
		synctest.Wait()
		if !idle() || len(f.leaving) > 0 || len(f.atWork) > 0 {
			t.Errorf("the lease is held after the end, or %v", f.leaving)
		}
		again := make(chan error)
		go func() { again <- f.deleteVolume(t.Context(), "v") }()
		synctest.Wait()
		f.lease.Pause()
		if err := f.deleteVolume(t.Context(), "x"); !errors.Is(err, api.ErrAway) {
			t.Errorf("while it hands over: %v", err)
		}
		stop(lease.ErrEnded)
		if err := <-again; !errors.Is(err, api.ErrAway) || !errors.Is(err, lease.ErrEnded) {
			t.Errorf("cut off by the end: %v", err)
		}
		f.work.Wait()
		if !idle() {
			t.Error("the lease is held")
		}
	})
}

// What takes longer than a call, and fails, is told to who asks for the same again, and to nobody else: begun anew each time it would never come to an end.
func TestVolumesFail(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := slow{goOn: make(chan error)}
		f := testFiler(t, b)
		for range 2 {
			if err := f.deleteVolume(t.Context(), "v"); !errors.Is(err, api.ErrGoesOn) {
				t.Fatal(err)
			}
			again := make(chan error)
			go func() { again <- f.deleteVolume(t.Context(), "v") }()
			synctest.Wait()
			b.goOn <- volume.ErrNoSpace
			if err := <-again; !errors.Is(err, volume.ErrNoSpace) {
				t.Errorf("what has failed meanwhile: %v", err)
			}
		}
		if err := f.deleteVolume(t.Context(), "v"); !errors.Is(err, api.ErrGoesOn) { // once it is told, it is done anew
			t.Fatal(err)
		}
		b.goOn <- volume.ErrNoSpace
		synctest.Wait()
		// Who asks for something else, or much later, asks for the first time.
		if _, err := f.takeSnapshot(t.Context(), volume.SnapshotRequest{ID: volume.SnapshotID{Volume: "v", Name: "s"}}); errors.Is(err, volume.ErrNoSpace) {
			t.Errorf("another one is told that, too: %v", err)
		}
		for range 2 {
			if err := f.deleteVolume(t.Context(), "v"); !errors.Is(err, api.ErrGoesOn) {
				t.Errorf("and now: %v", err)
			}
			b.goOn <- volume.ErrNoSpace
			time.Sleep(2 * told)
		}
		if err := f.deleteVolume(t.Context(), "v"); !errors.Is(err, api.ErrGoesOn) {
			t.Fatal(err)
		}
		b.goOn <- nil
		f.work.Wait()
	})
}

// What somebody has is not deleted.
func TestVolumesHad(t *testing.T) {
	b := slow{goOn: make(chan error, 1)}
	f := testFiler(t, b)
	deleted := func() error {
		b.goOn <- nil
		err := f.deleteVolume(t.Context(), "v")
		select {
		case <-b.goOn:
		default:
		}
		return err
	}
	if err := f.published().write("p", api.Publication{ID: "p", Volume: "v"}); err != nil {
		t.Fatal(err)
	}
	if err := deleted(); !errors.Is(err, volume.ErrInUse) || !strings.Contains(err.Error(), "cradle-filer unpublish p") {
		t.Errorf("published: %v", err)
	}
	if err := errors.Join(f.published().remove("p"), f.granted().write("g", api.Grant{ID: "g", Volume: "v"})); err != nil {
		t.Fatal(err)
	}
	if err := deleted(); !errors.Is(err, volume.ErrInUse) {
		t.Errorf("granted: %v", err)
	}
	if err := f.granted().remove("g"); err != nil {
		t.Fatal(err)
	}
	f.entered["v"] = &visit{}
	if err := deleted(); !errors.Is(err, volume.ErrInUse) {
		t.Errorf("being rolled back: %v", err)
	}
	delete(f.entered, "v")
	if err := deleted(); err != nil {
		t.Error(err)
	}
}

// Who only looks does not wait for a change, which may wait for storage, and minds nothing that is removed meanwhile.
func TestStatusWhileChanging(t *testing.T) {
	f := testFiler(t, slow{})
	for _, id := range []string{"p", "q"} {
		if err := errors.Join(f.published().write(id, api.Publication{ID: id, Volume: "v"}), f.granted().write(id, api.Grant{ID: id, Volume: "w", Secret: "secret"})); err != nil {
			t.Fatal(err)
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if s, err := f.status(); err != nil || s.Publications != 2 || s.Grants != 2 || s.Volumes != 2 {
		t.Errorf("%+v, %v", s, err)
	}
	gone := filepath.Join(f.kept, "publications/gone.json")
	if err := os.Symlink("removed", gone); err != nil { // is listed, and can't be read any more
		t.Fatal(err)
	}
	if all, err := f.publications(); err != nil || len(all) != 2 {
		t.Errorf("%+v, %v", all, err)
	}
	if all, err := f.grants(); err != nil || len(all) != 2 || all[0].Secret != "" {
		t.Errorf("%+v, %v", all, err)
	}
}

// halved is a backend of which one pool is missing.
type halved struct{ volume.Backend }

func (halved) List(context.Context) ([]volume.Volume, error) {
	return []volume.Volume{{ID: "v", Parameters: volume.Parameters{Class: volume.NFS}}, {ID: "w", Parameters: volume.Parameters{Class: volume.LV2}}}, volume.ErrUnavailable
}

// The volumes of pools that are there are listed, though another pool is missing, of which the error tells.
func TestVolumesHalved(t *testing.T) {
	f := testFiler(t, halved{})
	socket := filepath.Join(f.dir, "s")
	l, err := listenControl(socket)
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: f.handler()}
	done := make(chan error)
	go func() { done <- server.Serve(l) }()
	all, err := volumes.Open(api.Client{Socket: socket}).List(t.Context())
	if !errors.Is(err, volume.ErrUnavailable) || len(all) != 1 || all[0].ID != "v" {
		t.Errorf("there are %v, %v", all, err)
	}
	server.Close()
	<-done
}

// Who may only read a volume compares it as often as he likes, and does not hold up who rolls it back.
func TestRollbackEndsComparison(t *testing.T) {
	f := &filer{entered: map[string]*visit{}}
	f.mu.Lock()
	defer f.mu.Unlock()
	comparing, end := context.WithCancelCause(t.Context())
	left, err := f.begin(t.Context(), "v", end)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.begin(t.Context(), "v", func(error) {}); !errors.Is(err, volume.ErrInUse) {
		t.Errorf("compared twice: %v", err)
	}
	go func() {
		<-comparing.Done()
		f.mu.Lock()
		defer f.mu.Unlock()
		left()
	}()
	left, err = f.begin(t.Context(), "v", nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := context.Cause(comparing); !errors.Is(err, volume.ErrInUse) {
		t.Errorf("who compares is told %v", err)
	}
	for what, end := range map[string]context.CancelCauseFunc{"rolled back": nil, "compared": func(error) {}} {
		if _, err := f.begin(t.Context(), "v", end); !errors.Is(err, volume.ErrInUse) {
			t.Errorf("%s while it is being rolled back: %v", what, err)
		}
	}
	left()
	if len(f.entered) > 0 {
		t.Errorf("left are %v", f.entered)
	}
	// Who gives up waits for nobody.
	if _, err := f.begin(t.Context(), "v", func(error) {}); err != nil {
		t.Fatal(err)
	}
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := f.begin(gone, "v", nil); !errors.Is(err, context.Canceled) {
		t.Errorf("a caller who has gone: %v", err)
	}
}
