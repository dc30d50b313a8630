package driver

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hashicorp/nomad/nomad/structs"
	"github.com/hashicorp/nomad/plugins/drivers"
)

// A disk is one task's at a time and one namespace's for good, and who may not have it learns nothing but that.
func TestDisks(t *testing.T) {
	dir := t.TempDir()
	half := filepath.Join(dir, "team", ".box.new")
	if err := os.MkdirAll(half, 0o700); err != nil {
		t.Fatal(err)
	}
	d, err := openDisks(dir)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(half); err == nil {
		t.Error("half a disk stays")
	}
	task := func(namespace string) *drivers.TaskConfig { return &drivers.TaskConfig{Namespace: namespace} }
	team, other := diskOf(task("team"), "box"), diskOf(task("other"), "box")
	if team == other || diskOf(task(""), "box") != diskOf(task("default"), "box") || diskOf(task("team"), "") != "" || strings.Contains(diskOf(task("../x"), "box"), "..") {
		t.Errorf("names: %q, %q", team, other)
	}
	have := func(name, pod string) {
		t.Helper()
		if err := os.Mkdir(d.path(name), 0o700); err != nil {
			t.Fatal(err)
		}
		for file, text := range map[string]string{"disk.json": `{"id": "` + pod + `", "size": "1GiB"}`, "scratch.img": "data"} {
			if err := os.WriteFile(filepath.Join(d.path(name), file), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	for name, user := range map[string]string{team: "one", other: "two"} {
		if err := d.take(name, user, nil); err != nil {
			t.Fatal(err)
		}
		have(name, user)
	}
	err = d.take(team, "three", nil)
	if err == nil || !strings.Contains(err.Error(), "disk box is in use by task one") || !structs.IsRecoverable(err) {
		t.Errorf("a second user: %v", err)
	}
	if err := d.remove(team, "three", nil); err == nil {
		t.Error("removed while it is used")
	}
	if err := d.take(team, "one", nil); err != nil {
		t.Errorf("the same user again: %v", err)
	}
	list, err := d.list("team")
	if err != nil || len(list) != 1 || list[0].ID != "box" || list[0].Pod != "one" || list[0].Task != "one" {
		t.Errorf("the list is %+v, %v", list, err)
	}
	d.release(team, "two") // not his
	if err := d.take(team, "three", nil); err == nil {
		t.Error("released by somebody else")
	}
	d.release(team, "one")
	for range 2 {
		if err := d.remove(team, "three", nil); err != nil {
			t.Error(err)
		}
	}
	if _, err := os.Stat(d.path(team)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("after the removal: %v", err)
	}
	for namespace, want := range map[string]int{"team": 0, "other": 1, "nobody": 0} {
		if list, err := d.list(namespace); err != nil || len(list) != want {
			t.Errorf("%s has %+v, %v", namespace, list, err)
		}
	}
}
