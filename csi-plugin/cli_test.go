package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"filippo.io/age"

	"github.com/cradlestack/cradlestack/csi-plugin/cold"
	"github.com/cradlestack/cradlestack/csi-plugin/volume"
)

// newKey writes a key of cold storage to a file.
func newKey(t testing.TB, file string) {
	t.Helper()
	x, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte("# a comment\n"+x.String()+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
}

// What a command line can't mean is refused, and nothing is made of it.
func TestMistakes(t *testing.T) {
	t.Chdir(t.TempDir())
	newKey(t, "key")
	for line, want := range map[string]string{
		"doctor --look --pool missing":                               "missing: no such file or directory; write the plugin's own --backend and --pool",
		"doctor --pool . --filer files:2051":                         "name its file with --filer-key",
		"monolith --endpoint e --pool p --filer files:2051":          "name its file with --filer-key",
		"monolith --endpoint e --pool a=p --pool a=q":                "--pool a=p is called a as well",
		"monolith --endpoint e --pool p --node-id a/b":               `--node-id "a/b": letters`,
		"monolith --endpoint e --pool p --backend s3":                "--backend s3: there is none of that name",
		"cold ls --cold-key key --cold s3:/copies":                   "--cold s3:/copies: write s3://BUCKET/PREFIX with the server's address as --cold-endpoint",
		"cold ls --cold-key key --cold https://s3.example.org/store": "--cold https://s3.example.org/store: write s3://BUCKET/PREFIX with the server's address as --cold-endpoint",
	} {
		var out, errs bytes.Buffer
		if code := run(t.Context(), strings.Fields(line), &out, &errs); code != 1 || !strings.Contains(errs.String(), want) {
			t.Errorf("%s: exit code %d, %s%s; want %s", line, code, out.String(), errs.String(), want)
		}
	}
	if entries, err := os.ReadDir("."); err != nil || len(entries) != 1 {
		t.Errorf("there is now %v, %v", entries, err)
	}
}

// A copy is no way around what the plugin refuses: here, copies to cold storage that nobody would make.
func TestCopyKeeps(t *testing.T) {
	c := &cli{backend: "dir", pools: []string{filepath.Join(t.TempDir(), "pool")}}
	b, _, err := c.open(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	err = c.copyList(t.Context(), b, "new", creation{Of: "old", Size: 64 << 20, Parameters: map[string]string{"class": "lv2", "cold": "hourly=24"}})
	if !errors.Is(err, volume.ErrInvalid) || !strings.Contains(err.Error(), "this plugin has no cold storage") {
		t.Errorf("%v", err)
	}
	if _, err := os.Stat(filepath.Join(c.pools[0], "new")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("it was made: %v", err)
	}
}

// A volume is copied to one of another backend without the parameters that this does not have, and Nomad is told what there is.
func TestCopyElsewhere(t *testing.T) {
	var out bytes.Buffer
	c := &cli{stdout: &out, backend: "dir", pools: []string{filepath.Join(t.TempDir(), "pool")}}
	b, _, err := c.open(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	n := creation{Of: "old", Parameters: map[string]string{"class": "nfs", "compression": "zstd", "snapshots": "daily=7"}}
	if err := c.copyList(t.Context(), b, "new", n); err != nil {
		t.Fatal(err)
	}
	out.Reset()
	var at located
	if err := errors.Join(c.copyWhole(t.Context(), b, "new", "old", nil), json.Unmarshal(out.Bytes(), &at)); err != nil {
		t.Fatal(err)
	}
	parameters, context := n.has(at.Parameters)
	if want := map[string]string{"class": "nfs", "snapshots": "daily=7"}; !maps.Equal(parameters, want) {
		t.Errorf("its parameters: %v, not %v", parameters, want)
	}
	if want := map[string]string{"class": "nfs", "snapshots": "daily=7", "pool": "default"}; !maps.Equal(context, want) {
		t.Errorf("it has %v, not %v", context, want)
	}
	all := volume.Parameters{FS: "xfs", Compression: "zstd", BlockSize: 8192}
	for _, c := range []struct {
		storage, class string
		size           int64
		want           volume.Parameters
	}{
		{"dir", volume.LV2, 1 << 30, volume.Parameters{FS: "xfs"}},
		{"dir", volume.NFS, 1 << 30, volume.Parameters{FS: "xfs"}},
		{"dir", volume.NFS, 0, volume.Parameters{}},
		{"zfs", volume.LV2, 1 << 30, all},
		{"zfs", volume.NFS, 1 << 30, volume.Parameters{Compression: "zstd"}},
		{"ceph", volume.GFS, 1 << 30, volume.Parameters{}},
	} {
		r := volume.Request{Size: c.size, Parameters: all}
		r.Class, c.want.Class = c.class, c.class
		if suit(c.storage, &r); r.Parameters != c.want {
			t.Errorf("%s, %s, %d bytes: %+v, not %+v", c.storage, c.class, c.size, r.Parameters, c.want)
		}
	}
}

// TestUsualSnapshots: where a snapshot costs nothing file volumes have automatic ones, unless the operator says otherwise.
func TestUsualSnapshots(t *testing.T) {
	all := volume.Retention{Hourly: 24, Daily: 7, Weekly: 4, Monthly: 6}
	for _, c := range []struct {
		backend, flag string
		want          volume.Retention
	}{{"zfs", "", all}, {"zfs", "none", volume.Retention{}}, {"zfs", "daily=2", volume.Retention{Daily: 2}}, {"dir", "", volume.Retention{}}, {"ceph", "", volume.Retention{}}, {"dir", usualSnapshots, all}} {
		usual, err := (&cli{backend: c.backend, snapshots: c.flag}).usual(nil)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := usual(t.Context()); err != nil || got != c.want {
			t.Errorf("--backend %s --snapshots %q: %v, %v", c.backend, c.flag, got, err)
		}
	}
	if _, err := (&cli{snapshots: "yearly=1"}).usual(nil); err == nil {
		t.Error("yearly=1 is a schedule")
	}
}

// TestFilerBackend: with --backend filer the filer is named and no pool is, and its volumes are in the zone where other hosts reach it. What is for volumes of this host says so.
func TestFilerBackend(t *testing.T) {
	for want, c := range map[string]*cli{
		"name the filer that has the volumes with --filer": {backend: onFiler},
		"name its file with --filer-key":                   {backend: onFiler, filer: filerFlags{where: "files.example:2051"}},
		"the pools are those of the filer":                 {backend: onFiler, filer: filerFlags{where: "/run/filer.sock"}, pools: []string{"tank/cradle"}},
	} {
		if _, _, err := c.open(t.Context()); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: %v", c.filer, err)
		}
	}
	for where, wantLocal := range map[string]bool{"/run/filer.sock": true, "files.example:2051": false} {
		b, local, err := (&cli{backend: onFiler, filer: filerFlags{where: where, key: "key"}}).open(t.Context())
		if err != nil || local != wantLocal {
			t.Fatalf("%s: local: %t, %v", where, local, err)
		}
		if _, copies := b.(cold.Source); copies {
			t.Error("its volumes are copied to cold storage")
		}
	}
	var stdout, stderr strings.Builder
	if code := run(t.Context(), []string{"host-volume", "create", "--backend", onFiler}, &stdout, &stderr); code == 0 || !strings.Contains(stderr.String(), "for volumes that are on this host") {
		t.Errorf("a host volume: %d, %s", code, stderr.String())
	}
}

// A command that looks into cold storage makes none where it is not, and does not say of a directory on which nothing is mounted that there are no copies.
func TestColdMissing(t *testing.T) {
	missing, empty := filepath.Join(t.TempDir(), "cold"), t.TempDir()
	key := filepath.Join(t.TempDir(), "key")
	newKey(t, key)
	for _, args := range [][]string{{"ls"}, {"verify"}, {"restore", "db", "--pool", filepath.Join(t.TempDir(), "pool")}} {
		for _, where := range []string{missing, empty} {
			var stdout, stderr bytes.Buffer
			args := slices.Concat([]string{"cold"}, args, []string{"--cold", where, "--cold-key", key})
			if code := run(t.Context(), args, &stdout, &stderr); code == 0 || !strings.Contains(stderr.String(), where) || !strings.Contains(stderr.String(), "write the directory that the plugin has, and mount it") {
				t.Errorf("%v: %d, %s%s", args, code, stdout.String(), stderr.String())
			}
		}
		if _, err := os.Stat(missing); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%v has made %s: %v", args, missing, err)
		}
		if left, err := os.ReadDir(empty); err != nil || len(left) != 0 {
			t.Errorf("%v has made %v, %v", args, left, err)
		}
	}
}

// A copy that is removed while all are verified, as it is each hour, is no failure, and no end.
func TestVerifyRemoved(t *testing.T) {
	dir := t.TempDir()
	o := coldFlags{where: filepath.Join(dir, "cold"), key: filepath.Join(dir, "key")}
	newKey(t, o.key)
	vault, err := o.open()
	if err = errors.Join(err, os.Mkdir(o.where, 0o700)); err != nil {
		t.Fatal(err)
	}
	of := volume.Volume{ID: "db", Created: time.Now().Add(-9 * time.Hour), Parameters: volume.Parameters{Class: volume.LV2}}
	for n := range 3 {
		taken := of.Created.Add(time.Duration(n+1) * time.Hour)
		blocks := &volume.Blocks{ReaderAt: strings.NewReader(strings.Repeat("x", 1<<20)), Size: 1 << 20, Data: []volume.Range{{End: 1 << 20}}, Whole: true}
		if _, _, err := vault.Save(t.Context(), of, volume.Snapshot{Created: taken}, cold.Order{Taken: taken}, blocks, cold.Copy{}); err != nil {
			t.Fatal(err)
		}
	}
	all, err := vault.Copies(t.Context(), "")
	if err != nil || len(all) != 3 {
		t.Fatal(all, err)
	}
	var out strings.Builder
	c := &cli{stderr: io.Discard, stdout: onWrite(func(p []byte) (int, error) {
		if out.Len() == 0 { // the first one is verified, all are listed
			if err := os.Remove(filepath.Join(o.where, all[1].Object())); err != nil {
				t.Error(err)
			}
		}
		return out.Write(p)
	})}
	if err := c.coldVerify(t.Context(), &o, nil); err != nil || !strings.Contains(out.String(), all[1].String()+": removed meanwhile") || !strings.Contains(out.String(), all[2].String()+": whole") {
		t.Errorf("%v\n%s", err, out.String())
	}
	if err := c.coldVerify(t.Context(), &o, []string{all[1].String()}); !errors.Is(err, volume.ErrNotFound) {
		t.Errorf("one that is named, and is not there: %v", err)
	}
}

type onWrite func([]byte) (int, error)

func (w onWrite) Write(p []byte) (int, error) { return w(p) }
