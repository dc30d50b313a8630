//go:build vm

package vmm

import (
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cradlestack/cradlestack/driver-cradle/boot"
)

// The distribution's kernel needs other machine options and brings its drivers as modules; to this package it is just another package.
func TestVMStockKernel(t *testing.T) { stockKernel(t, Cold) }

func stockKernel(t *testing.T, how string) {
	t.Helper()
	out, err := exec.Command("../../tools/kernel/stock.sh").Output()
	if err != nil {
		t.Fatalf("tools/kernel/stock.sh: %v", err)
	}
	stock, dir := strings.TrimSpace(string(out)), filepath.Join(t.TempDir(), "boot")
	if err := boot.Build(t.Context(), boot.BuildOptions{
		Kernel: filepath.Join(stock, "vmlinuz"), Modules: filepath.Join(stock, "modules"),
		Agent: filepath.Join(shared.dir, "agent"), Variant: boot.VariantStock, Out: dir,
	}); err != nil {
		t.Fatal(err)
	}
	c := config(t)
	if c.Package, err = boot.Open(dir); err != nil {
		t.Fatal(err)
	}
	c.Start = how
	c.Disks = []Disk{{Key: "a", Path: image(t, "first", 1<<20)}}
	m := start(t, c)
	var got string
	if ask(t, m, "read", map[string][]string{"lun": {"0"}}, &got); got != "first" {
		t.Errorf("disk reads %q", got)
	}
}
