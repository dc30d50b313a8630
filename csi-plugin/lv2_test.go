package main

import (
	"bytes"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"filippo.io/age"

	"github.com/cradlestack/cradlestack/csi-plugin/cold"
	"github.com/cradlestack/cradlestack/csi-plugin/volume"
)

// What a restore has left is made anew of a newer copy of the former volume. One that was staged, or has copies of its own, was used: it stays, also where Nomad does not know any more that it was restored.
func TestReceiveAgain(t *testing.T) {
	t.Run("copied", func(t *testing.T) { testReceiveAgain(t, false) })
	t.Run("staged", func(t *testing.T) { testReceiveAgain(t, true) })
}

// testReceiveAgain has the restored volume copied, or staged and not copied yet.
func testReceiveAgain(t *testing.T, staged bool) {
	nomad := httptest.NewServer(http.NotFoundHandler()) // it has no Variable of the volume
	defer nomad.Close()
	dir := t.TempDir()
	x, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	key := filepath.Join(dir, "key")
	if err := os.WriteFile(key, []byte(x.String()+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	c := &cli{stdout: &out, stderr: io.Discard, backend: "dir", pools: []string{filepath.Join(dir, "pool")}, nomad: nomad.URL, cold: coldFlags{where: filepath.Join(dir, "cold"), key: key}}
	vault, err := c.cold.open()
	if err = errors.Join(err, os.Mkdir(c.cold.where, 0o700)); err != nil {
		t.Fatal(err)
	}
	const size = 8 << 20
	save := func(of volume.Volume, taken time.Time) {
		t.Helper()
		s := volume.Snapshot{ID: volume.SnapshotID{Volume: "db", Name: "cold"}, Created: taken}
		blocks := &volume.Blocks{ReaderAt: strings.NewReader(strings.Repeat("x", size)), Size: size, Data: []volume.Range{{End: size}}, Whole: true}
		if _, _, err := vault.Save(t.Context(), of, s, cold.Order{Taken: taken}, blocks, cold.Copy{}); err != nil {
			t.Fatal(err)
		}
	}
	receive := func() volume.Volume {
		t.Helper()
		if err := c.lv2Receive(t.Context(), "db", "", 1); err != nil {
			t.Fatal(err)
		}
		b, _, err := c.open(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer b.Close()
		v, err := b.Get(t.Context(), "db")
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	born := time.Now().Add(-time.Hour).UTC()
	former := volume.Volume{ID: "db", Created: born, Size: size, Parameters: volume.Parameters{Class: volume.LV2, Direct: true}}
	save(former, born.Add(time.Minute))
	first := receive()
	if again := receive(); again != first {
		t.Errorf("of the same copy it was made again: %+v, and before %+v", again, first)
	}
	save(former, born.Add(2*time.Minute))
	second := receive()
	if second == first {
		t.Errorf("it is not of the former volume's newest copy: %+v", second)
	}
	if staged {
		b, _, err := c.open(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer b.Close()
		if _, err := b.Stage(t.Context(), "db", volume.Use{As: volume.AsGuest}); err != nil {
			t.Fatal(err)
		}
		second.Used = true
		save(former, born.Add(3*time.Minute))
	} else {
		save(second, time.Now())
	}
	if now := receive(); now != second {
		t.Errorf("what was used is removed for a copy: %+v, and before %+v", now, second)
	}
}
