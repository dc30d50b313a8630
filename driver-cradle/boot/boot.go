// Package boot reads and makes boot packages: one directory with a kernel, an initramfs, and a manifest that says how a machine
// has to look to boot them. Two packages made of the same inputs are equal byte for byte.
//
// boot imports neither Nomad nor a registry client; package vmm starts what boot describes.
package boot

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"

	"github.com/cradlestack/cradlestack/driver-cradle/hostfile"
)

// Files of a package.
const (
	KernelFile    = "vmlinux"
	InitramfsFile = "initramfs"
	ManifestFile  = "manifest.json"
)

// ManifestVersion is the version of the manifest that this package reads and writes.
const ManifestVersion = 1

const maxManifest = 1 << 20

// A Manifest says what a package holds and what it needs.
type Manifest struct {
	Version   int      `json:"version"` // ManifestVersion
	Variant   string   `json:"variant"` // default, stock
	Kernel    File     `json:"kernel"`  // ELF image with a PVH entry
	Initramfs File     `json:"initramfs"`
	Machine   Machine  `json:"machine"`
	Args      []string `json:"args"` // kernel arguments; those that depend on the host are added at start
	Modules   []string `json:"modules,omitempty"`
}

// A File of a package.
type File struct {
	SHA256 string `json:"sha256"` // hexadecimal
	Size   int64  `json:"size"`   // bytes
}

// A Machine is what QEMU has to emulate.
type Machine struct {
	Type    string   `json:"type"`              // microvm
	Options []string `json:"options,omitempty"` // of -M: acpi=off
	Globals []string `json:"globals,omitempty"` // of -global: virtio-mmio.force-legacy=false
}

// A Package is a boot package on disk.
type Package struct {
	Dir      string // absolute, symbolic links resolved
	Digest   string // sha256 of the manifest, hexadecimal: names the whole content
	Manifest Manifest
}

// Kernel is the path of the kernel.
func (p *Package) Kernel() string { return filepath.Join(p.Dir, KernelFile) }

// Initramfs is the path of the initramfs.
func (p *Package) Initramfs() string { return filepath.Join(p.Dir, InitramfsFile) }

// ErrNoPackage is what Open and Find return where there is no boot package at all.
var ErrNoPackage = errors.New("no boot package")

// Open reads the package in dir and checks that it is complete. It does not hash the files: Verify does.
func Open(dir string) (*Package, error) {
	asked := dir
	dir, err := filepath.EvalSymlinks(asked)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w at %s: make one with `make boot`, or name one with $CRADLE_BOOT", ErrNoPackage, asked)
	}
	if err != nil {
		return nil, fmt.Errorf("open boot package: %w", err)
	}
	if dir, err = filepath.Abs(dir); err != nil {
		return nil, fmt.Errorf("open boot package: %w", err)
	}
	data, err := hostfile.Read(filepath.Join(dir, ManifestFile), maxManifest)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w in %s (it has no %s): make one with `make boot`", ErrNoPackage, dir, ManifestFile)
	}
	if err != nil {
		return nil, fmt.Errorf("open boot package %s: %w", dir, err)
	}
	m, err := ParseManifest(data)
	if err != nil {
		return nil, fmt.Errorf("boot package %s: %w", dir, err)
	}
	sum := sha256.Sum256(data)
	p := &Package{Dir: dir, Digest: hex.EncodeToString(sum[:]), Manifest: m}
	for _, f := range []struct {
		path string
		want File
	}{{p.Kernel(), m.Kernel}, {p.Initramfs(), m.Initramfs}} {
		fi, err := os.Stat(f.path)
		if err != nil {
			return nil, fmt.Errorf("boot package %s is incomplete: %w", dir, err)
		}
		if fi.Size() != f.want.Size {
			return nil, fmt.Errorf("boot package %s: %s has %d bytes, the manifest says %d: make the package again", dir, filepath.Base(f.path), fi.Size(), f.want.Size)
		}
		if fi.Mode().Perm()&0o004 == 0 {
			return nil, fmt.Errorf("boot package: %s is not readable for the unprivileged user that QEMU runs as: chmod a+r it", f.path)
		}
	}
	return p, nil
}

// Verify hashes kernel and initramfs and compares them with the manifest.
func (p *Package) Verify() error {
	for _, f := range []struct {
		path string
		want File
	}{{p.Kernel(), p.Manifest.Kernel}, {p.Initramfs(), p.Manifest.Initramfs}} {
		got, err := digest(f.path)
		if err != nil {
			return fmt.Errorf("verify boot package: %w", err)
		}
		if got != f.want {
			return fmt.Errorf("boot package %s: %s is not what the manifest names (sha256 %s, want %s): make the package again", p.Dir, filepath.Base(f.path), got.SHA256, f.want.SHA256)
		}
	}
	return nil
}

// Find opens the first package of a variant: explicit (a directory, from a flag), $CRADLE_BOOT, boot/VARIANT beside the executable,
// /usr/lib/cradle/boot/VARIANT. What is named explicitly or by the environment has to be there.
func Find(explicit, variant string) (*Package, error) {
	if explicit == "" {
		explicit = os.Getenv("CRADLE_BOOT")
	}
	if explicit != "" {
		return Open(explicit)
	}
	var dirs []string
	if exe, err := os.Executable(); err == nil {
		if exe, err = filepath.EvalSymlinks(exe); err == nil {
			dirs = append(dirs, filepath.Join(filepath.Dir(exe), "boot", variant))
		}
	}
	dirs = append(dirs, filepath.Join("/usr/lib/cradle/boot", variant))
	for _, dir := range dirs {
		p, err := Open(dir)
		if !errors.Is(err, ErrNoPackage) {
			return p, err
		}
	}
	return nil, fmt.Errorf("%w %q in %q: make one with `make boot`, or name one with $CRADLE_BOOT", ErrNoPackage, variant, dirs)
}

var (
	hexDigest = regexp.MustCompile(`^[0-9a-f]{64}$`)
	option    = regexp.MustCompile(`^[A-Za-z0-9_.-]+=[A-Za-z0-9_.:-]*$`)
	machine   = regexp.MustCompile(`^[a-z0-9.-]+$`)
	kernelArg = regexp.MustCompile(`^[!-~]+$`)
	variantRE = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,31}$`)
)

// ParseManifest reads a manifest strictly: unknown fields and whatever could mean something else on QEMU's command line are errors.
func ParseManifest(data []byte) (Manifest, error) {
	var m Manifest
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	if err := d.Decode(&m); err != nil {
		return Manifest{}, fmt.Errorf("%s: %w", ManifestFile, err)
	}
	if _, err := d.Token(); err != io.EOF {
		return Manifest{}, fmt.Errorf("%s: data after the manifest", ManifestFile)
	}
	if m.Version != ManifestVersion {
		return Manifest{}, fmt.Errorf("%s: version %d, this program reads version %d: make the package again", ManifestFile, m.Version, ManifestVersion)
	}
	check := func(re *regexp.Regexp, field string, values ...string) error {
		for _, v := range values {
			if !re.MatchString(v) {
				return fmt.Errorf("%s: %s: %q is not allowed", ManifestFile, field, v)
			}
		}
		return nil
	}
	if err := errors.Join(
		check(variantRE, "variant", m.Variant),
		check(hexDigest, "sha256", m.Kernel.SHA256, m.Initramfs.SHA256),
		check(machine, "machine.type", m.Machine.Type),
		check(option, "machine.options", m.Machine.Options...),
		check(option, "machine.globals", m.Machine.Globals...),
		check(kernelArg, "args", m.Args...),
	); err != nil {
		return Manifest{}, err
	}
	return m, nil
}

func digest(path string) (File, error) {
	f, err := os.Open(path)
	if err != nil {
		return File{}, err
	}
	defer f.Close()
	h := sha256.New()
	n, err := io.Copy(h, f)
	if err != nil {
		return File{}, err
	}
	return File{SHA256: hex.EncodeToString(h.Sum(nil)), Size: n}, nil
}
