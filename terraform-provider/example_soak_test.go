//go:build vm && soak

package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cradlestack/cradlestack/test/programs"
)

// The example does what it says: a page, another page, and nothing is left in the end.
func TestSoakTerraformExample(t *testing.T) {
	c := openNomad(t)
	w := openWorkspace(t, c)
	for _, name := range []string{"nginx", "busybox", "mariadb"} {
		if _, err := programs.Image(name); err != nil {
			t.Fatal(err)
		}
	}
	root, err := programs.Root()
	if err != nil {
		t.Fatal(err)
	}
	hcl, err := os.ReadFile(filepath.Join(root, "examples/terraform/stack/main.tf"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(w.dir, "main.tf"), hcl, 0o600); err != nil {
		t.Fatal(err)
	}
	image, err := programs.Image("busybox")
	if err != nil {
		t.Fatal(err)
	}
	images := "-var=images=oci:" + filepath.Dir(image)
	w.run("apply", "-auto-approve", "-no-color", images)
	database := c.UntilRunning(t, "shop-database").ID
	page := func(want string) {
		t.Helper()
		address := strings.Trim(strings.TrimPrefix(w.output("page"), "http://"), "/")
		eventually(t, c, "the page "+want, func() bool { return get(t, c, address) == want })
	}
	page("hello from a microVM")
	w.unchanged(images)
	c.CLI(t, "alloc", "exec", "-job", "shop-database", "mariadb", "-psecret", "shop", "-e", "CREATE TABLE goods (name TEXT); INSERT INTO goods VALUES ('cradle')")
	w.run("apply", "-auto-approve", "-no-color", images, "-var=greeting=good day")
	page("good day")
	if again := c.UntilRunning(t, "shop-database").ID; again != database {
		t.Errorf("another greeting has started the database anew: %s, %s", database, again)
	}
	if out := c.CLI(t, "alloc", "exec", "-job", "shop-database", "mariadb", "-psecret", "shop", "-e", "SELECT name FROM goods"); !strings.Contains(out, "cradle") {
		t.Errorf("the database has\n%s", out)
	}
	w.run("destroy", "-auto-approve", "-no-color", images)
	if left, _, err := c.API.CSIVolumes().List(nil); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}

// Two hundred resources are made twenty at a time, and a plan over them changes nothing.
func TestSoakTerraformMany(t *testing.T) {
	c := openNomad(t)
	w := openWorkspace(t, c)
	w.apply(many(100))
	for range 3 {
		begin := time.Now()
		w.unchanged("-parallelism=20")
		t.Logf("a plan over 200 resources takes %v", time.Since(begin).Round(time.Millisecond))
	}
	w.run("destroy", "-auto-approve", "-no-color", "-parallelism=20")
	if left, _, err := c.API.CSIVolumes().List(nil); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}
