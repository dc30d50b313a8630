//go:build vm

package main

import (
	"flag"
	"os"
	"path/filepath"
	"testing"
)

// recorded is the state of today's schema; the next schema that reads another one gets a file beside it.
const recorded = "testdata/state/2026-11-27.tfstate"

// States that earlier versions of the provider have written are read: a plan changes nothing, and an apply and a destruction go on from there. With -update
// one that is not there yet is written; one that is there stays, since that is what it is for.
func TestTerraformFormerStates(t *testing.T) {
	hcl, err := os.ReadFile("testdata/state/main.tf")
	if err != nil {
		t.Fatal(err)
	}
	c := openNomad(t)
	w := openWorkspace(t, c)
	state := filepath.Join(w.dir, "terraform.tfstate")
	if err := os.WriteFile(filepath.Join(w.dir, "main.tf"), hcl, 0o600); err != nil {
		t.Fatal(err)
	}
	apply := []string{"apply", "-auto-approve", "-no-color"}
	w.run(apply...)
	if _, err := os.Stat(recorded); err != nil && flag.Lookup("update").Value.String() == "true" { // golden's
		text, err := os.ReadFile(state)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(recorded, text, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	all, err := filepath.Glob("testdata/state/*.tfstate")
	if err != nil || len(all) == 0 {
		t.Fatalf("no state: %v, %v (-update writes one)", all, err)
	}
	for _, file := range all {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		// The lineage is another one than that of the state which it takes the place of.
		if err := os.WriteFile(state, text, 0o600); err != nil {
			t.Fatal(err)
		}
		t.Logf("%s is read", file)
		w.unchanged()
		w.run(apply...)
		w.unchanged()
	}
	w.run("destroy", "-auto-approve", "-no-color")
	if left, _, err := c.API.CSIVolumes().List(nil); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}
