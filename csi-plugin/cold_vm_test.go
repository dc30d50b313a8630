//go:build vm

package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	mathrand "math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/csi-plugin/dir"
	"github.com/cradlestack/cradlestack/csi-plugin/mount"
	"github.com/cradlestack/cradlestack/csi-plugin/volume"
	"github.com/cradlestack/cradlestack/csi-plugin/zfs"
	"github.com/cradlestack/cradlestack/test/programs"
)

// A coldStore is cold storage beside pools that come and go: directories, or datasets below one.
type coldStore struct {
	t       *testing.T
	root    string
	dataset string // "" for directories

	snapshots volume.Retention // that volumes have besides
}

func newColdStore(t *testing.T) *coldStore {
	t.Helper()
	s := &coldStore{t: t, root: shortDir(t)}
	newKey(t, s.path("key"))
	return s
}

func (s *coldStore) path(name string) string { return filepath.Join(s.root, name) }

// backend are the flags of a pool.
func (s *coldStore) backend(pool string) []string {
	if s.dataset != "" {
		return []string{"--backend", "zfs", "--pool", s.dataset + "/" + pool}
	}
	return []string{"--pool", s.path(pool)}
}

// args are a command's, with where cold storage is.
func (s *coldStore) args(args ...string) []string {
	return append(args, "--cold", s.path("cold"), "--cold-key", s.path("key"))
}

// command runs "cradle-csi cold …".
func (s *coldStore) command(args ...string) (stdout, stderr string, code int) {
	s.t.Helper()
	var out, errs bytes.Buffer
	code = run(s.t.Context(), s.args(append([]string{"cold"}, args...)...), &out, &errs)
	return out.String(), errs.String(), code
}

func (s *coldStore) must(args ...string) string {
	s.t.Helper()
	out, errs, code := s.command(args...)
	if code != 0 {
		s.t.Fatalf("cold %s: %d\n%s%s", strings.Join(args, " "), code, out, errs)
	}
	return out
}

// copied says whether the volume is. Before the plugin has made the directory the command says that it is missing.
func (s *coldStore) copied() bool {
	out, _, _ := s.command("ls")
	return strings.Contains(out, "db@")
}

// with mounts a volume of a pool.
func (s *coldStore) with(pool, id string, do func(dir string)) {
	s.t.Helper()
	b := s.open(pool)
	defer b.Close()
	source, err := b.Stage(s.t.Context(), id, volume.Use{As: volume.AsFiles})
	if err != nil {
		s.t.Fatal(err)
	}
	at := s.t.TempDir()
	err = mount.Filesystem(source.Device, at, source.FSType, mount.Options{})
	if err != nil {
		s.t.Fatal(err)
	}
	do(at)
	if err := errors.Join(mount.Unmount(at), b.Unstage(s.t.Context(), id)); err != nil {
		s.t.Fatal(err)
	}
}

// A coldBackend is one whose volumes have snapshots.
type coldBackend interface {
	keeper
	volume.Snapshotter
}

func (s *coldStore) open(pool string) coldBackend {
	s.t.Helper()
	var b coldBackend
	var err error
	if s.dataset != "" {
		b, err = zfs.Open(s.t.Context(), []zfs.Pool{{Name: "default", Dataset: s.dataset + "/" + pool}}, zfs.Locks)
	} else {
		b, err = dir.Open([]dir.Pool{{Name: "default", Path: s.path(pool)}})
	}
	if err != nil {
		s.t.Fatal(err)
	}
	return b
}

// volume makes a volume with content in a pool, and takes a snapshot for cold storage as the schedule does.
func (s *coldStore) volume(pool string, content []byte) {
	s.t.Helper()
	b := s.open(pool)
	defer b.Close()
	defer s.snapshot(b, 0)
	r := volume.Request{Name: "db", Size: 64 << 20, Parameters: volume.Parameters{Class: volume.LV2, Cold: volume.Retention{Hourly: 24}, Snapshots: s.snapshots}}
	if _, err := b.Create(s.t.Context(), r); err != nil {
		s.t.Fatal(err)
	}
	s.with(pool, "db", func(at string) {
		if err := os.WriteFile(filepath.Join(at, "data"), content, 0o600); err != nil {
			s.t.Fatal(err)
		}
	})
}

// snapshot takes that of some hours ago.
func (s *coldStore) snapshot(b coldBackend, hours int) {
	s.t.Helper()
	name := "cold-" + time.Now().UTC().Truncate(time.Hour).Add(-time.Duration(hours)*time.Hour).Format("20060102T150405Z")
	_, err := b.Snapshot(s.t.Context(), volume.SnapshotRequest{ID: volume.SnapshotID{Volume: "db", Name: name}, Automatic: true})
	if err != nil {
		s.t.Fatal(err)
	}
}

// TestRootColdUnmounted has cold storage on another file system, which is not mounted when the plugin starts the next time: it says so, copies nothing to what is there instead, and
// goes on once it is mounted.
func TestRootColdUnmounted(t *testing.T) { testColdUnmounted(newColdStore(t)) }

func testColdUnmounted(s *coldStore) {
	t := s.t
	other := t.TempDir() // what is mounted there
	at := s.path("cold")
	bind := func() {
		t.Helper()
		if err := errors.Join(os.MkdirAll(at, 0o700), unix.Mount(other, at, "", unix.MS_BIND, "")); err != nil {
			t.Fatal(err)
		}
	}
	unbind := func() {
		t.Helper()
		if err := unix.Unmount(at, 0); err != nil {
			t.Fatal(err)
		}
	}
	bind()
	defer unbind()
	s.volume("pool", []byte("data"))
	s.monolith("pool", func(string) { s.until("a copy", s.copied) })
	newest := func() string { return regexp.MustCompile("db@[0-9TZ]+").FindString(s.must("ls")) }
	first := newest()
	unbind()
	func() {
		b := s.open("pool")
		defer b.Close()
		s.snapshot(b, -1) // later than what is copied
	}()
	s.monolith("pool", func(metrics string) {
		s.metric(metrics, `cradle_csi_cold_copies_total{result="failed"} [1-9]`)
		s.metric(metrics, `cradle_csi_cold_age_seconds{volume="db"} \d`)
		for _, args := range [][]string{{"ls"}, append([]string{"restore", "db"}, s.backend("other")...)} {
			if out, errs, code := s.command(args...); code == 0 || !strings.Contains(errs, at+": nothing was ever copied to it") {
				t.Errorf("%v: %d, %s%s", args, code, out, errs)
			}
		}
		if left, err := os.ReadDir(at); err != nil || len(left) != 0 {
			t.Errorf("on the wrong file system there are %v, %v", left, err)
		}
		bind()
		s.until("the next copy", func() bool { return newest() > first })
	})
	s.must("verify")
	s.remove("pool", "db")
}

// holds compares a volume's content.
func (s *coldStore) holds(pool, id string, content []byte) {
	s.t.Helper()
	s.with(pool, id, func(at string) {
		if got, err := os.ReadFile(filepath.Join(at, "data")); err != nil || !bytes.Equal(got, content) {
			s.t.Errorf("volume %s in %s is not what was copied: %v", id, pool, err)
		}
	})
}

// remove removes a pool's volumes.
func (s *coldStore) remove(pool string, ids ...string) {
	s.t.Helper()
	b := s.open(pool)
	defer b.Close()
	for _, id := range ids {
		if err := b.Delete(s.t.Context(), id); err != nil {
			s.t.Error(err)
		}
	}
}

// monolith runs the plugin with cold storage, and more flags, until do returns.
func (s *coldStore) monolith(pool string, do func(metrics string), more ...string) {
	s.t.Helper()
	// An address that is no other process's: a free port of 127.0.0.1 may be taken by somebody before the plugin has it.
	pid := os.Getpid()
	address := fmt.Sprintf("127.%d.%d.%d:9809", 64+pid>>16, pid>>8&255, pid&255)
	ctx, cancel := context.WithCancel(s.t.Context())
	var stderr bytes.Buffer
	done := make(chan int)
	args := slices.Concat(s.args("monolith", "--endpoint", "unix://"+s.path("csi.sock"), "--node-id", "host", "--metrics", address), s.backend(pool), more)
	go func() { done <- run(ctx, args, io.Discard, &stderr) }()
	defer func() {
		cancel()
		if code := <-done; code != 0 || s.t.Failed() {
			s.t.Errorf("cradle-csi: %d\n%s", code, stderr.String())
		}
	}()
	do("http://" + address + "/metrics")
}

// until waits for what comes within a minute, or not at all.
func (s *coldStore) until(what string, f func() bool) {
	s.t.Helper()
	for end := time.Now().Add(5 * time.Minute); !f(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(end) {
			s.t.Fatalf("%s: not within 5 minutes", what)
		}
	}
}

// metric waits for a line of the metrics.
func (s *coldStore) metric(metrics, line string) {
	s.t.Helper()
	want := regexp.MustCompile("(?m)^" + line)
	s.until("metric "+line, func() bool {
		resp, err := http.Get(metrics)
		if err != nil {
			return false // not yet
		}
		defer resp.Body.Close()
		text, err := io.ReadAll(resp.Body)
		return err == nil && want.Match(text)
	})
}

// TestRootColdUnreachable has a bucket whose server is not there: that is to be seen, and the plugin serves and takes snapshots all the same.
func TestRootColdUnreachable(t *testing.T) { testColdUnreachable(newColdStore(t), 1) }

// testColdUnreachable waits until a copy has failed so often.
func testColdUnreachable(s *coldStore, failures int) {
	s.snapshots.Hourly = 1
	s.volume("pool", []byte("data"))
	s.monolith("pool", func(metrics string) {
		s.metric(metrics, fmt.Sprintf(`cradle_csi_cold_copies_total{result="failed"} [%d-9]`, failures))
		s.metric(metrics, `cradle_csi_cold_age_seconds{volume="db"} \d`)
		s.metric(metrics, `cradle_csi_automatic_snapshots_total{result="taken"} [1-9]`)
		s.metric(metrics, `cradle_csi_ready 1`)
	}, "--cold", "s3://copies", "--cold-endpoint", "http://127.0.0.1:1")
	s.remove("pool", "db")
}

// TestRootCold copies a volume as the plugin does by itself, loses it, and has it back in another pool.
func TestRootCold(t *testing.T) { testCold(newColdStore(t)) }

func testCold(s *coldStore) {
	t := s.t
	content := make([]byte, 9<<20)
	_, _ = rand.Read(content)
	s.volume("pool", content)
	s.monolith("pool", func(metrics string) {
		s.until("a copy", s.copied)
		s.metric(metrics, `cradle_csi_cold_age_seconds{volume="db"} \d`)
	})
	if out := s.must("verify"); !strings.Contains(out, ": whole, ") {
		t.Errorf("verify: %s", out)
	}
	if _, errs, code := s.command(append([]string{"restore", "db"}, s.backend("pool")...)...); code == 0 || !strings.Contains(errs, "volume db exists, and is another: it was made of nothing, and copy db@") {
		t.Errorf("restored over the volume itself: %d, %s", code, errs)
	}
	s.remove("pool", "db")
	for range 2 { // the second time it is there
		if out := s.must(append([]string{"restore", "db"}, s.backend("other")...)...); !strings.HasPrefix(out, "volume db: 64MiB, restored from db@") {
			t.Errorf("restore: %s", out)
		}
	}
	s.holds("other", "db", content)
	s.remove("other", "db")
	// The drill of docs/operate.md: in a directory, whatever the backend of the volume.
	if out := s.must("restore", "db", "--as", "drill", "--pool", s.path("drills")); !strings.HasPrefix(out, "volume drill: 64MiB, restored from db@") {
		t.Errorf("restore: %s", out)
	}
	at := t.TempDir()
	if out, err := exec.Command("mount", "-o", "loop,ro,noload", s.path("drills/drill/image"), at).CombinedOutput(); err != nil {
		t.Fatalf("mount: %v\n%s", err, out)
	}
	got, err := os.ReadFile(filepath.Join(at, "data"))
	if err := errors.Join(err, mount.Unmount(at)); err != nil || !bytes.Equal(got, content) {
		t.Errorf("the drill's volume is not what was copied: %v", err)
	}
	if _, errs, code := s.command("restore", "web"); code == 0 || !strings.Contains(errs, `copy "web": not found; "cradle-csi cold ls" lists`) {
		t.Errorf("restored what was never copied: %d, %s", code, errs)
	}

	chunks, err := filepath.Glob(s.path("cold/chunks/db/*/*/*.age"))
	if err != nil || len(chunks) < 9 {
		t.Fatalf("%q, %v", chunks, err)
	}
	damaged, err := os.ReadFile(chunks[7])
	if err != nil {
		t.Fatal(err)
	}
	damaged[len(damaged)/2] ^= 1
	if err := os.WriteFile(chunks[7], damaged, 0o600); err != nil {
		t.Fatal(err)
	}
	name := strings.TrimPrefix(chunks[7], s.path("cold")+"/")
	if _, errs, code := s.command(append([]string{"restore", "db"}, s.backend("other")...)...); code == 0 || !strings.Contains(errs, name+": damaged") || !strings.Contains(errs, "Remove copies/db/") {
		t.Errorf("restored with a damaged chunk: %d, %s", code, errs)
	}
	if out, errs, code := s.command("verify"); code == 0 || !strings.Contains(out, name+": damaged") || !strings.Contains(errs, "damaged: 1 of ") {
		t.Errorf("verified with a damaged chunk: %d, %s, %s", code, out, errs)
	}
	b := s.open("other")
	defer b.Close()
	if all, err := b.List(t.Context()); err != nil || len(all) != 0 {
		t.Errorf("of a damaged copy there is %+v, %v", all, err)
	}
}

// TestRootColdKilled kills the restore at a random moment, again and again: it goes on, and in the end the volume is what was copied.
func TestRootColdKilled(t *testing.T) {
	program, err := programs.Path("cradle-csi")
	if err != nil {
		t.Fatal(err)
	}
	s := newColdStore(t)
	content := make([]byte, 24<<20)
	_, _ = rand.Read(content)
	s.volume("pool", content)
	kills := 0
	for ; !s.copied(); kills++ { // the plugin, as it copies, for longer each time: on a slow machine it has to come to that
		within := time.Duration(kills+2) * time.Second
		s.killed(exec.Command(program, s.args("monolith", "--pool", s.path("pool"), "--endpoint", "unix://"+s.path("csi.sock"), "--node-id", "host")...), within, s.copied)
	}
	t.Logf("copied, killed %d times", kills)
	s.remove("pool", "db")
	never := func() bool { return false }
	whole := 0
	for kills = 0; kills < 20 || whole == 0; {
		within := 300 * time.Millisecond
		if kills >= 20 {
			within = 24 * time.Hour // however slow the machine is, it comes to its end
		}
		if !s.killed(exec.Command(program, s.args("cold", "restore", "db", "--pool", s.path("other"))...), within, never) {
			kills++
			continue
		}
		whole++
		s.holds("other", "db", content)
		s.remove("other", "db")
	}
	t.Logf("restored %d times, killed %d times", whole, kills)
	s.must("verify")
	s.remove("other", "db") // or what the last kill left
	left, err := os.ReadDir(s.path("other"))
	if err != nil || len(left) != 1 {
		t.Errorf("left in the pool: %v, %v", left, err)
	}
}

// killed kills a program at a random moment within a time, or once enough. ended says that it came to its end before.
func (s *coldStore) killed(cmd *exec.Cmd, within time.Duration, enough func() bool) (ended bool) {
	s.t.Helper()
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	after := time.After(mathrand.N(within))
	for {
		select {
		case err := <-done:
			if err != nil {
				s.t.Fatalf("%v: %v\n%s", cmd.Args, err, out.String())
			}
			return true
		case <-after:
			if err := cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
				s.t.Fatal(err)
			}
			err := <-done
			return err == nil
		case <-time.After(20 * time.Millisecond):
			if enough() {
				after = time.After(0)
			}
		}
	}
}
