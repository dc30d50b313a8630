package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	nomadapi "github.com/hashicorp/nomad/api"

	"github.com/cradlestack/cradlestack/csi-plugin/dir"
	"github.com/cradlestack/cradlestack/csi-plugin/filer/api"
	"github.com/cradlestack/cradlestack/csi-plugin/filer/gateway"
	"github.com/cradlestack/cradlestack/csi-plugin/volume"
)

// nomadFor answers as Nomad does: reader may read the volumes of the namespace tenant, writer change them.
func nomadFor(t *testing.T) *httptest.Server {
	t.Helper()
	mux := http.NewServeMux() // as Nomad has one, it sends clients to what a path with .. in it leads to
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		token := r.Header.Get(api.TokenHeader)
		known := token == "reader" || token == "writer"
		switch {
		case r.URL.Path == "/v1/acl/token/self" && known:
			_ = json.NewEncoder(w).Encode(nomadapi.ACLToken{Name: "the " + token, AccessorID: "0-1"})
		case !known || r.URL.Query().Get("namespace") != "tenant":
			http.Error(w, "Permission denied", http.StatusForbidden)
		case r.Method == http.MethodGet && r.URL.Path == "/v1/volume/csi/data":
			_ = json.NewEncoder(w).Encode(nomadapi.CSIVolume{ID: "data", Namespace: "tenant", ExternalID: "v", PluginID: "cradle"})
		case r.Method == http.MethodGet && r.URL.Path == "/v1/volume/csi/foreign":
			_ = json.NewEncoder(w).Encode(nomadapi.CSIVolume{ID: "foreign", Namespace: "tenant", ExternalID: "v", PluginID: "another"})
		case r.Method == http.MethodGet && r.URL.Path == "/v1/client/fs/cat/0": // a file of a job
			_, _ = w.Write([]byte(`{"ID":"` + r.URL.Query().Get("path") + `","Namespace":"tenant","ExternalID":"v","PluginID":"cradle"}`))
		case r.Method == http.MethodPut && r.URL.Path == "/v1/volumes/snapshot":
			var asked nomadapi.CSISnapshotCreateRequest
			if err := json.NewDecoder(r.Body).Decode(&asked); err != nil || len(asked.Snapshots) > 0 {
				t.Errorf("Nomad is asked to take snapshots: %+v, %v", asked, err)
			}
			if token != "writer" {
				http.Error(w, "Permission denied", http.StatusForbidden)
				return
			}
			_, _ = w.Write([]byte("{}"))
		default:
			http.Error(w, "volume not found", http.StatusNotFound)
		}
	})
	s := httptest.NewServer(mux)
	t.Cleanup(s.Close)
	return s
}

// Nomad's users see and change the snapshots of volumes for which their tokens have the right in the volume's namespace, and of no other; what they have done, or were
// not let do, is told.
func TestUsers(t *testing.T) {
	state, pool := t.TempDir(), t.TempDir()
	b, err := dir.Open([]dir.Pool{{Name: "default", Path: pool}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.Close() })
	if _, err := b.Create(t.Context(), volume.Request{Name: "v", Parameters: volume.Parameters{Class: volume.NFS}}); err != nil {
		t.Fatal(err)
	}
	t.Setenv("NOMAD_TOKEN", "writer") // this process's is not the callers'
	n, err := openNomad(nomadFor(t).URL, "cradle")
	if err != nil {
		t.Fatal(err)
	}
	log := slog.New(slog.DiscardHandler)
	f := &filer{backend: b, dir: t.TempDir(), state: state, audit: newAudit(state, log), log: log, entered: map[string]*visit{}, comparing: make(chan struct{}, maxComparing), long: t.Context()}
	s := httptest.NewServer(f.usersHandler(n))
	t.Cleanup(s.Close)
	as := func(token, namespace string) api.Client {
		return api.Client{URL: s.URL + "/", Token: token, Namespace: namespace}
	}

	others := api.Grant{ID: "x", Volume: "w", Tenant: &api.Tenant{Namespace: "other", Name: "others", Volume: "data"}}
	if err := f.granted().write(others.ID, others); err != nil {
		t.Fatal(err)
	}
	if taken, err := as("writer", "tenant").Snapshot(t.Context(), "data", "s"); err != nil || taken.Name != "s" || taken.Automatic {
		t.Errorf("who may takes %+v, %v", taken, err)
	}
	if s, err := as("writer", "tenant").Reschedule(t.Context(), "data", "hourly=24,daily=7"); err != nil || s != (api.Schedule{Snapshots: "hourly=24,daily=7", Changed: true}) {
		t.Errorf("who may changes the schedule: %+v, %v", s, err)
	}
	if _, err := as("writer", "tenant").Reschedule(t.Context(), "data", "hourly=-1"); !errors.Is(err, volume.ErrInvalid) {
		t.Errorf("a schedule that is none: %v", err)
	}
	if s, err := as("reader", "tenant").Schedule(t.Context(), "data"); err != nil || s.Snapshots != "hourly=24,daily=7" {
		t.Errorf("who may read sees the schedule %+v, %v", s, err)
	}
	if all, err := as("reader", "tenant").Snapshots(t.Context(), "data"); err != nil || len(all) != 1 || all[0].Name != "s" {
		t.Errorf("who may read sees %+v, %v", all, err)
	}
	for name, c := range map[string]struct {
		token, namespace, volume string
		want                     error
		change                   bool
	}{
		"changes with the right to read": {"reader", "tenant", "data", api.ErrDenied, true},
		"another namespace":              {"writer", "default", "data", api.ErrDenied, false},
		"no token":                       {"", "tenant", "data", api.ErrDenied, false},
		"an unknown token":               {"guess", "tenant", "data", api.ErrDenied, true},
		"no such volume":                 {"writer", "tenant", "none", volume.ErrNotFound, true},
		"the volume's own name":          {"writer", "tenant", "v", volume.ErrNotFound, true},
		"another plugin's":               {"writer", "tenant", "foreign", volume.ErrNotFound, true},
		"a path":                         {"writer", "tenant", "../volumes", volume.ErrNotFound, true},
		"a file that says it is one":     {"writer", "tenant", "../../client/fs/cat/0?path=data", volume.ErrNotFound, true},
		"a parameter":                    {"writer", "tenant", "data?region=x", volume.ErrNotFound, true},
	} {
		client := as(c.token, c.namespace)
		_, list := client.Snapshots(t.Context(), c.volume)
		_, diff := client.Diff(t.Context(), c.volume, "s", "")
		_, plan := client.Schedule(t.Context(), c.volume)
		_, change := client.Reschedule(t.Context(), c.volume, "none")
		_, take := client.Snapshot(t.Context(), c.volume, "t")
		_, roll := client.Rollback(t.Context(), c.volume, api.Rollback{Snapshot: "s"})
		_, give := client.Grant(t.Context(), api.Grant{ID: "mine", Volume: c.volume})
		if err := client.Revoke(t.Context(), "others"); !errors.Is(err, volume.ErrNotFound) {
			t.Errorf("%s: revoke: %v", name, err)
		}
		if all, err := client.Grants(t.Context()); err != nil || len(all) > 0 {
			t.Errorf("%s: grants: %+v, %v", name, all, err)
		}
		for what, err := range map[string]error{"snapshot": take, "rollback": roll, "grant": give, "reschedule": change} {
			if !errors.Is(err, c.want) {
				t.Errorf("%s: %s: %v", name, what, err)
			}
		}
		for what, err := range map[string]error{"list": list, "diff": diff, "schedule": plan} {
			if c.token != "reader" && !errors.Is(err, c.want) {
				t.Errorf("%s: %s: %v", name, what, err)
			}
		}
	}
	if left, err := f.granted().all(); err != nil || len(left) != 1 {
		t.Errorf("there are the grants %+v, %v", left, err)
	}
	// Some volumes are compared at once; others wait.
	for range maxComparing {
		f.comparing <- struct{}{}
	}
	soon, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := f.diff(soon, "v", "absent", ""); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("one more is compared: %v", err)
	}
	<-f.comparing
	for range 2 * maxComparing {
		if _, err := f.diff(t.Context(), "v", "absent", ""); !errors.Is(err, volume.ErrNotFound) {
			t.Errorf("a snapshot that is not there: %v", err)
		}
	}
	all, err := b.Snapshots(t.Context(), "")
	if err != nil || len(all) != 1 {
		t.Errorf("there are the snapshots %v, %v", all, err)
	}
	for _, request := range []string{"GET /status", "GET /publications", "PUT /publications/x", "GET /volumes/data/stats"} {
		method, path, _ := strings.Cut(request, " ")
		req, err := http.NewRequestWithContext(t.Context(), method, s.URL+path+"?namespace=tenant", nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set(api.TokenHeader, "writer")
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != http.StatusNotFound {
			t.Errorf("users get an answer to %s: %s", request, resp.Status)
		}
	}

	// One namespace's requests do not take all connections, and each is counted until it has ended.
	limit, _ := n.limits.Load("tenant")
	var ends []func()
	for err == nil {
		var end func()
		if end, err = limit.(*gateway.Limit).Begin(t.Context()); err == nil {
			ends = append(ends, end)
		}
	}
	if _, err := as("reader", "tenant").Snapshots(t.Context(), "data"); !errors.Is(err, volume.ErrUnavailable) {
		t.Errorf("with as many at work as there may be: %v", err)
	}
	ends[0]()
	for range 2 {
		if _, err := as("reader", "tenant").Snapshots(t.Context(), "data"); err != nil {
			t.Errorf("with one less: %v", err)
		}
	}
	for _, end := range ends[1:] {
		end()
	}

	// What was not let do, by anybody who has tried, pushes nothing out of the log of what was done.
	lines := func(name string) []string {
		text, err := os.ReadFile(filepath.Join(state, name))
		if err != nil {
			t.Fatal(err)
		}
		return strings.Split(strings.TrimSpace(string(text)), "\n")
	}
	done, refused := lines("audit.log"), lines("refused.log")
	var first event
	if err := json.Unmarshal([]byte(done[0]), &first); err != nil || len(done) != 3 {
		t.Fatalf("audit.log has %d lines, the first %q, %v", len(done), done[0], err)
	}
	if first.What != "snapshot" || first.Who != "the writer 0-1" || first.Namespace != "tenant" || first.Volume != "data" || first.Snapshot != "s" || first.Error != "" {
		t.Errorf("audit.log tells %+v", first)
	}
	if !strings.Contains(done[1], `"what":"schedule","who":"the writer 0-1","namespace":"tenant","volume":"data","schedule":"hourly=24,daily=7"}`) || !strings.Contains(done[2], `"error":"schedule`) {
		t.Errorf("of the schedules audit.log tells %s, %s", done[1], done[2])
	}
	if len(refused) != 40 {
		t.Errorf("refused.log has %d lines", len(refused))
	}
	for _, line := range refused {
		if !strings.Contains(line, `"error":"volume `) {
			t.Errorf("refused.log tells of what was not let do: %s", line)
		}
	}
}

// Who has no right in a namespace has Nomad asked once by a request, however many grants are there; and one namespace whose Variables Nomad does not write keeps no
// other one waiting.
func TestTenantsApart(t *testing.T) {
	asked := 0
	nobody := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		asked++
		http.Error(w, "Permission denied", http.StatusForbidden)
	}))
	t.Cleanup(nobody.Close)
	n, err := openNomad(nobody.URL, "cradle")
	if err != nil {
		t.Fatal(err)
	}
	f := &filer{state: t.TempDir(), log: slog.New(slog.DiscardHandler), long: t.Context()}
	s := httptest.NewServer(f.usersHandler(n))
	t.Cleanup(s.Close)
	for i := range 9 {
		g := api.Grant{ID: fmt.Sprint("g", i), Volume: fmt.Sprint("v", i), Tenant: &api.Tenant{Namespace: "tenant", Name: fmt.Sprint("g", i), Volume: fmt.Sprint("data", i)}}
		if err := f.granted().write(g.ID, g); err != nil {
			t.Fatal(err)
		}
	}
	if all, err := (api.Client{URL: s.URL, Token: "guess", Namespace: "tenant"}).Grants(t.Context()); err != nil || len(all) > 0 || asked != 1 {
		t.Errorf("Nomad was asked %d times; shown are %v, %v", asked, all, err)
	}
	unlock, err := f.tenants.Lock(t.Context(), "slow")
	if err != nil {
		t.Fatal(err)
	}
	defer unlock()
	soon, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := f.revokeTenant(soon, variable{}, api.Tenant{Namespace: "other", Name: "g"}); err != nil {
		t.Errorf("another namespace: %v", err)
	}
	if err := f.revokeTenant(soon, variable{}, api.Tenant{Namespace: "slow", Name: "g"}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("the same one: %v", err)
	}
}

// crowded has more snapshots of each volume than there are.
type crowded struct {
	*dir.Backend
	more []volume.Snapshot
}

func (b crowded) Snapshots(context.Context, string) ([]volume.Snapshot, error) { return b.more, nil }

// Of a volume no more snapshots are taken than it can have beside those of its schedule, by rollbacks neither; and who asks again for one that is there has it.
func TestCrowded(t *testing.T) {
	own, err := dir.Open([]dir.Pool{{Name: "default", Path: t.TempDir()}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { own.Close() })
	if _, err := own.Create(t.Context(), volume.Request{Name: "v", Parameters: volume.Parameters{Class: volume.NFS}}); err != nil {
		t.Fatal(err)
	}
	b := &crowded{Backend: own}
	f := &filer{backend: b}
	add := func(name string, automatic bool) {
		b.more = append(b.more, volume.Snapshot{ID: volume.SnapshotID{Volume: "v", Name: name}, Automatic: automatic})
	}
	for i := range maxSnapshots {
		add(fmt.Sprintf("hourly-%d", i), true)
	}
	for i := range maxSnapshots / 2 {
		add(fmt.Sprintf("s%d", i), false)
		add(fmt.Sprintf("before-rollback-%d", i), true)
	}
	if _, err := f.snapshot(t.Context(), "v", "one-more"); !errors.Is(err, volume.ErrInvalid) || !strings.Contains(err.Error(), "nomad volume snapshot delete PLUGIN v@SNAPSHOT") {
		t.Errorf("one too many: %v", err)
	}
	if _, err := f.rollback(t.Context(), caller{volume: "v"}, "v", api.Rollback{Snapshot: "s1"}); !errors.Is(err, volume.ErrInvalid) || !strings.Contains(err.Error(), "before-rollback-") {
		t.Errorf("a rollback that would make it one too many: %v", err)
	}
	if s, err := f.snapshot(t.Context(), "v", "s1"); err != nil || s.Name != "s1" {
		t.Errorf("one that is there: %+v, %v", s, err)
	}
	b.more = b.more[:len(b.more)-1]
	if s, err := f.snapshot(t.Context(), "v", "one-more"); err != nil || s.Name != "one-more" {
		t.Errorf("when one was removed: %+v, %v", s, err)
	}
}

// Tokens are sent over a network only where nobody can read them, and users are asked for them only where Nomad can tell what they allow.
func TestUsersListen(t *testing.T) {
	for want, u := range map[string]usersAPI{
		"give its address with --nomad":      {address: "127.0.0.1:0"},
		"give a certificate with --api-cert": {address: "0.0.0.0:0", nomadAt: "http://127.0.0.1:4646"},
		"--api-cert: stat none.pem":          {address: "0.0.0.0:0", nomadAt: "http://127.0.0.1:4646", cert: "none.pem", key: "none.pem"},
	} {
		if l, err := u.listen(); l != nil || err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: %v, not %q", u, err, want)
		}
	}
	if l, err := (&usersAPI{}).listen(); l != nil || err != nil {
		t.Errorf("without --api: %v", err)
	}
	l, err := (&usersAPI{address: "127.0.0.1:0", nomadAt: "http://127.0.0.1:4646"}).listen()
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
}

// The audit log is put aside when it has become large; what can't be written there is told in the log.
func TestAudit(t *testing.T) {
	state := t.TempDir()
	var told strings.Builder
	a := newAudit(state, slog.New(slog.NewTextHandler(&told, nil)))
	if err := os.WriteFile(a.path, make([]byte, maxAudit+1), 0o600); err != nil {
		t.Fatal(err)
	}
	a.write(event{What: "snapshot", Who: "me", Volume: "v"}, errors.New("why"))
	text, err := os.ReadFile(a.path)
	if err != nil || strings.Count(string(text), "\n") != 1 || !strings.Contains(string(text), `"error":"why"`) {
		t.Errorf("audit.log has %d bytes, %.200q, %v", len(text), text, err)
	}
	if fi, err := os.Stat(a.path + ".old"); err != nil || fi.Size() != maxAudit+1 {
		t.Errorf("the former one: %v", err)
	}
	// Whatever a caller writes is in one line of a bounded length.
	a.write(event{What: "rollback", Who: "me", Namespace: "n\n{}", Volume: "v\x1b[2J", Path: strings.Repeat("\u00fc", 1<<20), Snapshot: "\xff\n"}, errors.New(strings.Repeat("e", 1<<20)))
	text, err = os.ReadFile(a.path)
	if err != nil || strings.Count(string(text), "\n") != 2 || len(text) > 4*maxTold || strings.ContainsRune(string(text), 0x1b) {
		t.Errorf("with a hostile line audit.log has %d bytes, %d lines, %v", len(text), strings.Count(string(text), "\n"), err)
	}
	a.path = filepath.Join(state, "none", "audit.log")
	a.write(event{What: "rollback", Who: "me", Volume: "v"}, nil)
	if !strings.Contains(told.String(), "rollback") {
		t.Errorf("what could not be written is told so: %s", &told)
	}
}

// Grants count together where the same people make them.
func TestOwner(t *testing.T) {
	tenant := func(namespace, volume string) string {
		return owner(api.Grant{ID: namespace + volume, Volume: volume, Tenant: &api.Tenant{Namespace: namespace}})
	}
	root := func(volume string) string { return owner(api.Grant{Volume: volume}) }
	if tenant("n", "v") != tenant("n", "w") || tenant("n", "v") == tenant("m", "v") || root("v") == root("w") || root("v") == tenant("v", "v") {
		t.Errorf("%q, %q, %q, %q", tenant("n", "v"), tenant("n", "w"), tenant("m", "v"), root("v"))
	}
}
