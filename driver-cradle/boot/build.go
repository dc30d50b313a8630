package boot

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"

	"github.com/u-root/u-root/pkg/cpio"
	"golang.org/x/sys/unix"
)

// Variants of boot packages.
const (
	VariantDefault = "default" // own kernel: everything built in, no ACPI
	VariantStock   = "stock"   // Debian's cloud kernel: ACPI, modules in the initramfs
)

// BuildOptions say what a package is made of.
type BuildOptions struct {
	Kernel  string   // vmlinux with a PVH entry; stock: Debian's vmlinuz will do
	Agent   string   // cradle-init, static
	Variant string   // VariantDefault, VariantStock
	Modules string   // stock: /lib/modules/VERSION of that kernel
	Out     string   // directory of the package; replaced when it is there
	Args    []string // more kernel arguments
}

// Build makes a package. What is at Out is replaced in one step, so that a running Open sees the old or the new one.
func Build(ctx context.Context, o BuildOptions) error {
	m := Manifest{Version: ManifestVersion, Variant: o.Variant}
	var files []moduleFile
	switch o.Variant {
	case VariantDefault:
		m.Machine, m.Args = microvm("acpi=off"), kernelArgs
	case VariantStock:
		m.Machine, m.Args = microvm("acpi=on"), kernelArgs
		var err error
		if files, err = stockModules(o.Modules); err != nil {
			return fmt.Errorf("build boot package %s: %w", o.Variant, err)
		}
		for _, f := range files {
			m.Modules = append(m.Modules, f.name)
		}
	default:
		return fmt.Errorf("build boot package: variant %q is neither %s nor %s", o.Variant, VariantDefault, VariantStock)
	}
	m.Args = append(slices.Clone(m.Args), o.Args...)
	out, err := filepath.Abs(o.Out)
	if err != nil {
		return fmt.Errorf("build boot package: %w", err)
	}
	if err := os.MkdirAll(filepath.Dir(out), 0o755); err != nil {
		return fmt.Errorf("build boot package: %w", err)
	}
	tmp, err := os.MkdirTemp(filepath.Dir(out), "."+filepath.Base(out)+"-")
	if err != nil {
		return fmt.Errorf("build boot package: %w", err)
	}
	defer os.RemoveAll(tmp)
	if err := build(ctx, o, m, files, tmp); err != nil {
		return fmt.Errorf("build boot package %s: %w", o.Variant, err)
	}
	if err := replaceDir(tmp, out); err != nil {
		return fmt.Errorf("build boot package: %w", err)
	}
	return nil
}

func microvm(acpi string) Machine {
	return Machine{
		Type:    "microvm",
		Options: []string{acpi, "x-option-roms=off"},
		Globals: []string{"virtio-mmio.force-legacy=false"},
	}
}

// kernelArgs are the same on every host. loglevel=0 would silence a panic, too. panic=-1 with reboot=t ends QEMU under -no-reboot; without no_timer_check and
// tsc=reliable (and tsc_early_khz, which the host adds) a guest on a busy host can hang for ever while it calibrates its timers. GODEBUG is for
// the agent: its goroutines give way often enough by themselves, and a signal costs an emulated machine a millisecond the first time. A container sees
// the interfaces that docker would give it, and no dummy0.
var kernelArgs = []string{
	"console=ttyS0", "quiet", "loglevel=1", "reboot=t", "panic=-1",
	"tsc=reliable", "no_timer_check", "cryptomgr.notests", "random.trust_cpu=on", "dummy.numdummies=0", "GODEBUG=asyncpreemptoff=1",
}

func build(ctx context.Context, o BuildOptions, m Manifest, modules []moduleFile, dir string) error {
	kernel, err := readKernel(o.Kernel)
	if err != nil {
		return err
	}
	agent, err := os.ReadFile(o.Agent)
	if err != nil {
		return err
	}
	if !bytes.HasPrefix(agent, []byte("\x7fELF")) {
		return fmt.Errorf("agent %s is no ELF executable", o.Agent)
	}
	if err := ctx.Err(); err != nil {
		return context.Cause(ctx)
	}
	var initramfs bytes.Buffer
	if err := writeInitramfs(&initramfs, agent, modules); err != nil {
		return fmt.Errorf("initramfs: %w", err)
	}
	if err := errors.Join(
		os.WriteFile(filepath.Join(dir, KernelFile), kernel, 0o644),
		os.WriteFile(filepath.Join(dir, InitramfsFile), initramfs.Bytes(), 0o644),
	); err != nil {
		return err
	}
	if m.Kernel, err = digest(filepath.Join(dir, KernelFile)); err != nil {
		return err
	}
	if m.Initramfs, err = digest(filepath.Join(dir, InitramfsFile)); err != nil {
		return err
	}
	data, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return err
	}
	if _, err := ParseManifest(data); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, ManifestFile), append(data, '\n'), 0o644); err != nil {
		return err
	}
	// MkdirTemp made the directory for its owner alone, WriteFile's modes went through the umask.
	for _, name := range []string{KernelFile, InitramfsFile, ManifestFile} {
		if err := os.Chmod(filepath.Join(dir, name), 0o644); err != nil {
			return err
		}
	}
	return os.Chmod(dir, 0o755)
}

// writeInitramfs writes an archive whose bytes depend on nothing but its content: fixed order, inode numbers, owner and time. It is
// not compressed: unpacking costs an emulated guest more than reading costs the host.
func writeInitramfs(w io.Writer, agent []byte, modules []moduleFile) error {
	records := []cpio.Record{
		cpio.Directory("dev", 0o755),
		cpio.CharDev("dev/console", 0o600, 5, 1), // the kernel opens it for /init
		cpio.Directory("proc", 0o555),
		cpio.Directory("run", 0o755),
		cpio.Directory("sys", 0o555),
		cpio.Directory("tmp", 0o1777),
		cpio.StaticFile("init", string(agent), 0o755),
	}
	if len(modules) > 0 {
		records = append(records, cpio.Directory("modules", 0o755))
		for _, m := range modules {
			records = append(records, cpio.StaticFile("modules/"+m.name, string(m.data), 0o644))
		}
	}
	rw := cpio.Newc.Writer(w)
	for i, r := range records {
		r.Ino, r.NLink, r.MTime, r.UID, r.GID, r.Major, r.Minor = uint64(i+1), 1, 0, 0, 0, 0, 0
		if r.Mode&unix.S_IFMT == unix.S_IFDIR {
			r.NLink = 2
		}
		if err := rw.WriteRecord(r); err != nil {
			return err
		}
	}
	return cpio.WriteTrailer(rw)
}

// replaceDir puts the directory from at to, exchanging it with what is there.
func replaceDir(from, to string) error {
	err := unix.Renameat2(unix.AT_FDCWD, from, unix.AT_FDCWD, to, unix.RENAME_EXCHANGE)
	if errors.Is(err, unix.ENOENT) {
		return os.Rename(from, to)
	}
	if err != nil {
		return fmt.Errorf("replace %s: %w", to, err)
	}
	return nil // the deferred RemoveAll takes the old one, which has the temporary name now
}
