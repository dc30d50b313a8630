//go:build vm

package vmm

import (
	"path/filepath"
	"testing"

	"github.com/cradlestack/cradlestack/driver-cradle/boot"
	"github.com/cradlestack/cradlestack/driver-cradle/boot/boottest"
)

// The distribution's kernel needs other machine options and brings its drivers as modules; to this package it is just another package.
func TestVMStockKernel(t *testing.T) {
	t.Parallel() // beside those that wait
	stockKernel(t, Cold)
}

func stockKernel(t *testing.T, how string) {
	t.Helper()
	pkg, err := boottest.Build(filepath.Join(t.TempDir(), "boot"), "./testdata/agent", boot.VariantStock)
	if err != nil {
		t.Fatal(err)
	}
	c := config(t)
	c.Package = pkg
	c.Start = how
	c.Disks = []Disk{{Key: "a", Path: image(t, "first", 1<<20)}}
	m := start(t, c)
	var got string
	if ask(t, m, "read", map[string][]string{"lun": {"0"}}, &got); got != "first" {
		t.Errorf("disk reads %q", got)
	}
}
