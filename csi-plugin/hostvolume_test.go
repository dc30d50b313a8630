package main

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/cradlestack/cradlestack/csi-plugin/volume"
)

// callHostVolume does what Nomad does, but for the environment.
func callHostVolume(t *testing.T, operation, pool string) (answer map[string]any, code int) {
	t.Helper()
	var out, errs bytes.Buffer
	code = run(t.Context(), []string{"host-volume", operation, "--pool", pool}, &out, &errs)
	if err := json.Unmarshal(out.Bytes(), &answer); err != nil {
		t.Errorf("%s: %v: %s", operation, err, out.String())
	}
	return answer, code
}

// Nomad has each volume made again whenever it starts. Where the pool's disk is not mounted by then, that makes no empty one in its place.
func TestHostVolumePoolAway(t *testing.T) {
	pool, mounts := t.TempDir(), t.TempDir()
	t.Setenv("DHV_VOLUME_ID", "81f57d4b")
	t.Setenv("DHV_VOLUMES_DIR", mounts)
	if err := os.Mkdir(filepath.Join(mounts, "81f57d4b"), 0o750); err != nil {
		t.Fatal(err)
	}
	answer, code := callHostVolume(t, "create", pool)
	if text, _ := answer["error"].(string); code == 0 || !strings.Contains(text, "is in no pool now; is the pool's disk mounted?") {
		t.Errorf("create: exit code %d, %v", code, answer)
	}
	if entries, err := os.ReadDir(pool); err != nil || len(entries) > 0 {
		t.Errorf("in the pool: %v, %v", entries, err)
	}
	if answer, code := callHostVolume(t, "delete", pool); code != 0 {
		t.Errorf("delete: exit code %d, %v", code, answer)
	}
	if left, err := os.ReadDir(mounts); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}

// What Nomad asks for and can't have is told in its protocol's words, and makes nothing. It is no matter for a deletion.
func TestHostVolumeMistakes(t *testing.T) {
	for i, c := range []struct{ name, value, want string }{
		{"DHV_VOLUME_ID", "../etc", `DHV_VOLUME_ID: "../etc" is no name`},
		{"DHV_VOLUME_ID", "", `DHV_VOLUME_ID: "" is no name`},
		{"DHV_VOLUMES_DIR", "mounts", `DHV_VOLUMES_DIR: "mounts" is no absolute path`},
		{"DHV_CAPACITY_MIN_BYTES", "1GiB", `DHV_CAPACITY_MIN_BYTES: "1GiB" is no number`},
		{"DHV_PARAMETERS", `[]`, `DHV_PARAMETERS: json`},
		{"DHV_PARAMETERS", `{"class": "gp"}`, `parameter class: "gp" is none of`},
		{"DHV_PARAMETERS", `{"pool": "red"}`, `parameter pool: there is no pool "red"; known are default`},
		{"DHV_PARAMETERS", `{"attach": "direct"}`, `parameter attach: a host volume is attached by the host`},
		{"DHV_PARAMETERS", `{"snapshots": "hourly=24"}`, `parameter snapshots: nobody takes snapshots of a host volume`},
		{"DHV_PARAMETERS", `{"class": "lv2", "cold": "hourly=24"}`, `parameter cold: nobody takes snapshots of a host volume`},
	} {
		t.Run(strconv.Itoa(i), func(t *testing.T) {
			pool := filepath.Join(t.TempDir(), "pool")
			for name, value := range map[string]string{
				"DHV_VOLUME_ID": "81f57d4b", "DHV_VOLUMES_DIR": t.TempDir(), "DHV_CAPACITY_MIN_BYTES": "67108864", "DHV_CAPACITY_MAX_BYTES": "", "DHV_PARAMETERS": "", c.name: c.value,
			} {
				t.Setenv(name, value)
			}
			answer, code := callHostVolume(t, "create", pool)
			if text, _ := answer["error"].(string); code == 0 || !strings.Contains(text, c.want) {
				t.Errorf("create: exit code %d, %v; want %s", code, answer, c.want)
			}
			if entries, err := os.ReadDir(pool); err != nil || len(entries) > 1 { // .lock
				t.Errorf("in the pool: %v, %v", entries, err)
			}
			if answer, code := callHostVolume(t, "delete", pool); code != 0 && (c.name == "DHV_PARAMETERS" || c.name == "DHV_CAPACITY_MIN_BYTES") {
				t.Errorf("delete: exit code %d, %v", code, answer)
			}
		})
	}
}

// Nomad forgets a volume whose creation fails. One that is made and can't be mounted is not left in the pool; one that was there stays.
func TestHostVolumeUnmountable(t *testing.T) {
	pool := t.TempDir()
	mounts := filepath.Join(t.TempDir(), "mounts")
	if err := os.WriteFile(mounts, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("DHV_VOLUME_ID", "81f57d4b")
	t.Setenv("DHV_VOLUMES_DIR", mounts)
	there := func() bool {
		_, err := os.Stat(filepath.Join(pool, "81f57d4b"))
		return err == nil
	}
	if answer, code := callHostVolume(t, "create", pool); code == 0 || answer["error"] == nil || there() {
		t.Errorf("create: exit code %d, %v; it is there: %t", code, answer, there())
	}
	c := &cli{backend: "dir", pools: []string{pool}}
	b, _, err := c.open(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	if _, err := b.Create(t.Context(), volume.Request{Name: "81f57d4b", Parameters: volume.Parameters{Class: volume.NFS}}); err != nil {
		t.Fatal(err)
	}
	if answer, code := callHostVolume(t, "create", pool); code == 0 || answer["error"] == nil || !there() {
		t.Errorf("create again: exit code %d, %v; it is there: %t", code, answer, there())
	}
}
