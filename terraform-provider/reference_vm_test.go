//go:build vm

package main

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cradlestack/cradlestack/internal/golden"
	"github.com/cradlestack/cradlestack/test/programs"
)

// schema is the provider's, as Terraform has it.
func (w *workspace) schema() json.RawMessage {
	w.t.Helper()
	w.write("")
	out := w.run("providers", "schema", "-json")
	var all struct {
		Schemas map[string]json.RawMessage `json:"provider_schemas"`
	}
	i := strings.Index(out, "{") // after warnings
	if i < 0 || json.Unmarshal([]byte(out[i:]), &all) != nil || len(all.Schemas["registry.terraform.io/cradlestack/cradle"]) == 0 {
		w.t.Fatalf("no schema:\n%s", out)
	}
	return all.Schemas["registry.terraform.io/cradlestack/cradle"]
}

// The pages for Terraform's registry, in docs beside this file, are what tfplugindocs makes of the built provider's schema.
func TestTerraformReference(t *testing.T) {
	tool, err := programs.Tool("tfplugindocs")
	if err != nil {
		t.Fatal(err)
	}
	schema := map[string]any{"format_version": "1.0", "provider_schemas": map[string]json.RawMessage{"cradle": openWorkspace(t, nil).schema()}} // as the tool looks for it
	data, err := json.Marshal(schema)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "schema.json"), data, 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(tool, "generate", "--provider-dir", dir, "--provider-name", "cradle", "--providers-schema", "schema.json")
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %v\n%s", cmd.Args, err, out)
	}
	pages := map[string]bool{}
	if err := filepath.WalkDir(filepath.Join(dir, "docs"), func(path string, e os.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		page, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		pages[page] = true
		golden.Compare(t, page, text)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"docs/index.md", "docs/resources/pod.md", "docs/resources/volume.md", "docs/resources/snapshot.md", "docs/data-sources/pods.md", "docs/functions/size.md"} {
		if !pages[want] {
			t.Errorf("there is no %s; there are %v", want, pages)
		}
	}
}
