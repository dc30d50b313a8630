package boot

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/u-root/u-root/pkg/cpio"
)

func testPackage(t *testing.T) (dir string, o BuildOptions) {
	t.Helper()
	src := t.TempDir()
	o = BuildOptions{
		Kernel:  filepath.Join(src, "vmlinux"),
		Agent:   filepath.Join(src, "cradle-init"),
		Variant: VariantDefault,
		Out:     filepath.Join(t.TempDir(), "boot", "default"),
	}
	write(t, o.Kernel, "\x7fELF kernel")
	write(t, o.Agent, "\x7fELF agent")
	if err := Build(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	return o.Out, o
}

func write(t *testing.T, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

func read(t *testing.T, path string) []byte {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func TestBuildIsReproducible(t *testing.T) {
	dir, o := testPackage(t)
	before := map[string][]byte{}
	for _, f := range []string{KernelFile, InitramfsFile, ManifestFile} {
		before[f] = read(t, filepath.Join(dir, f))
	}
	// Another time, another umask, another place of the inputs.
	moved := filepath.Join(t.TempDir(), "elsewhere")
	if err := os.Rename(o.Agent, moved); err != nil {
		t.Fatal(err)
	}
	o.Agent = moved
	if err := Build(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	for f, want := range before {
		if !bytes.Equal(read(t, filepath.Join(dir, f)), want) {
			t.Errorf("%s differs between two builds of the same inputs", f)
		}
	}
	if entries, _ := os.ReadDir(filepath.Dir(dir)); len(entries) != 1 {
		t.Errorf("a second build left %v", entries)
	}
}

func TestInitramfsContent(t *testing.T) {
	var b bytes.Buffer
	if err := writeInitramfs(&b, []byte("agent"), []moduleFile{{"000-a.ko", []byte("module")}}); err != nil {
		t.Fatal(err)
	}
	records, err := cpio.ReadAllRecords(cpio.Newc.Reader(bytes.NewReader(b.Bytes())))
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, r := range records {
		names = append(names, r.Name)
		if r.Name == "dev/console" && (r.Rmajor != 5 || r.Rminor != 1) {
			t.Errorf("dev/console is device %d:%d", r.Rmajor, r.Rminor)
		}
	}
	want := "dev dev/console proc run sys tmp init modules modules/000-a.ko"
	if got := strings.Join(names, " "); got != want {
		t.Errorf("initramfs holds %s, want %s", got, want)
	}
}

func TestOpenChecksThePackage(t *testing.T) {
	for name, c := range map[string]struct {
		damage func(t *testing.T, dir string)
		want   string
	}{
		"no manifest":       {func(t *testing.T, dir string) { os.Remove(filepath.Join(dir, ManifestFile)) }, "make boot"},
		"no kernel":         {func(t *testing.T, dir string) { os.Remove(filepath.Join(dir, KernelFile)) }, "incomplete"},
		"truncated":         {func(t *testing.T, dir string) { os.Truncate(filepath.Join(dir, InitramfsFile), 5) }, "make the package again"},
		"unreadable kernel": {func(t *testing.T, dir string) { os.Chmod(filepath.Join(dir, KernelFile), 0o600) }, "chmod a+r"},
		"other version":     {edit(func(m *Manifest) { m.Version = 9 }), "version 9"},
		"option injection":  {edit(func(m *Manifest) { m.Machine.Options = []string{"acpi=off,firmware=/etc/shadow"} }), "not allowed"},
		"argument with a space": {
			edit(func(m *Manifest) { m.Args = []string{"quiet init=/bin/sh"} }), "not allowed",
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir, _ := testPackage(t)
			c.damage(t, dir)
			_, err := Open(dir)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("Open: %v, want an error with %q", err, c.want)
			}
		})
	}
}

func edit(f func(*Manifest)) func(*testing.T, string) {
	return func(t *testing.T, dir string) {
		var m Manifest
		path := filepath.Join(dir, ManifestFile)
		if err := json.Unmarshal(read(t, path), &m); err != nil {
			t.Fatal(err)
		}
		f(&m)
		data, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		write(t, path, string(data))
	}
}

func TestVerifyFindsAChangedByte(t *testing.T) {
	dir, _ := testPackage(t)
	p, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Verify(); err != nil {
		t.Fatal(err)
	}
	kernel := read(t, p.Kernel())
	kernel[5] ^= 1
	write(t, p.Kernel(), string(kernel))
	if err := p.Verify(); err == nil || !strings.Contains(err.Error(), KernelFile) {
		t.Errorf("Verify after a flipped bit: %v", err)
	}
}

func TestFind(t *testing.T) {
	dir, _ := testPackage(t)
	t.Setenv("CRADLE_BOOT", dir)
	p, err := Find("", VariantDefault)
	if err != nil || p.Dir != dir {
		t.Errorf("Find by $CRADLE_BOOT: %v, %v", p, err)
	}
	if _, err := Find(filepath.Join(dir, "none"), VariantDefault); !errors.Is(err, ErrNoPackage) {
		t.Errorf("a named package that is missing: %v, want ErrNoPackage", err)
	}
	t.Setenv("CRADLE_BOOT", "")
	if _, err := Find("", "none"); !errors.Is(err, ErrNoPackage) {
		t.Errorf("no package anywhere: %v, want ErrNoPackage", err)
	}
}

func FuzzParseManifest(f *testing.F) {
	f.Add([]byte(`{"version":1,"variant":"default","machine":{"type":"microvm","options":["acpi=off"]},"args":["quiet"]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		m, err := ParseManifest(data)
		if err != nil {
			return
		}
		for _, o := range append(m.Machine.Options, m.Machine.Globals...) {
			if strings.ContainsAny(o, ", \x00\n") {
				t.Errorf("option %q got through", o)
			}
		}
	})
}
