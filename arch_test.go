// Package cradlestack holds no code: this folder's test executes the rules that hold for the repository as a whole,
// which package may import which, that each has a doc comment, and that main functions only wire things up.
package cradlestack

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"io/fs"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
)

const module = "github.com/cradlestack/cradlestack/"

// mayImport is the architecture: for each folder with everything below it, the folders of ours that its code may
// import (with everything below them; "." after a folder's name means that package alone). A package is judged by its
// longest matching row and may always import what lies in the same row. A package
// without a row fails: a new one gets its row here first.
var mayImport = map[string][]string{
	".":    {},
	"spec": {},

	"driver-cradle":                   {"driver-cradle/driver", "driver-cradle/vmm"}, // main.go: vmm.Confine, plugins.Serve and nothing else
	"driver-cradle/driver":            {"spec", "driver-cradle/hostfile", "driver-cradle/wire", "driver-cradle/vmm", "driver-cradle/boot", "driver-cradle/image", "driver-cradle/network", "driver-cradle/pod"},
	"driver-cradle/kcradle":           {"spec", "driver-cradle/wire", "driver-cradle/vmm", "driver-cradle/boot", "driver-cradle/image", "driver-cradle/network", "driver-cradle/pod"},
	"driver-cradle/pod":               {"spec", "driver-cradle/hostfile", "driver-cradle/wire", "driver-cradle/vmm", "driver-cradle/boot", "driver-cradle/image", "driver-cradle/network", "internal/durable"},
	"driver-cradle/vmm":               {"spec", "driver-cradle/hostfile", "driver-cradle/wire", "driver-cradle/boot"},
	"driver-cradle/boot":              {"spec", "driver-cradle/hostfile", "driver-cradle/wire"},
	"driver-cradle/image":             {"spec", "driver-cradle/wire", "internal/stalled", "internal/durable"},
	"driver-cradle/network":           {"spec", "driver-cradle/wire"},
	"driver-cradle/hostfile":          {"spec"},
	"driver-cradle/wire":              {"spec"},
	"driver-cradle/guest":             {"spec", "driver-cradle/wire", "driver-cradle/guest/stdio"},
	"driver-cradle/guest/stdio":       {"spec"},
	"driver-cradle/guest/vdocker":     {"spec", "internal/dockerhttp", "driver-cradle/wire", "driver-cradle/guest.", "driver-cradle/guest/stdio"},
	"driver-cradle/guest/cradle-init": {"spec", "driver-cradle/wire", "driver-cradle/guest"},

	"csi-plugin":      {"spec", "csi-plugin", "internal/command"}, // its commands; the backend is chosen by a switch
	"csi-plugin/rpc":  {"spec", "csi-plugin/volume", "csi-plugin/mount", "csi-plugin/filer/api", "internal/jsonhttp", "internal/keyed", "internal/turns"},
	"csi-plugin/dir":  {"spec", "csi-plugin/volume", "csi-plugin/mount", "csi-plugin/tree"},
	"csi-plugin/zfs":  {"spec", "csi-plugin/volume", "csi-plugin/mount"},
	"csi-plugin/ceph": {"spec", "csi-plugin/volume", "csi-plugin/mount", "csi-plugin/tree"},
	"csi-plugin/cold": {"csi-plugin/volume", "internal/turns"},

	"csi-plugin/filer":         {"spec", "csi-plugin/dir", "csi-plugin/mount", "csi-plugin/tree", "csi-plugin/volume", "csi-plugin/zfs", "csi-plugin/filer", "internal/command", "internal/durable", "internal/keyed"}, // its commands; it is no part of cradle-csi
	"csi-plugin/filer/api":     {"spec", "csi-plugin/tree", "csi-plugin/volume", "internal/jsonhttp"},                                                                                                                  // of cradle-csi as well, which calls the filer
	"csi-plugin/filer/volumes": {"spec", "csi-plugin/mount", "csi-plugin/volume", "csi-plugin/filer/api", "internal/durable"},                                                                                          // of cradle-csi, where the storage is the filer's
	"csi-plugin/filer/nfs":     {"csi-plugin/filer/crowd", "csi-plugin/filer/lease", "csi-plugin/filer/snapshots"},                                                                                                     // exports, not volumes

	"csi-plugin/filer/ganesha": {"csi-plugin/filer/crowd", "csi-plugin/filer/lease", "csi-plugin/filer/nfs", "csi-plugin/filer/snapshots", "internal/durable"}, // likewise

	"csi-plugin/filer/crowd":     {},
	"csi-plugin/filer/lease":     {},
	"csi-plugin/filer/snapshots": {},
	"csi-plugin/filer/gateway":   {"csi-plugin/filer/lease"},
	"csi-plugin/filer/webdav":    {"csi-plugin/filer/gateway", "csi-plugin/filer/lease", "csi-plugin/filer/snapshots", "csi-plugin/tree", "internal/durable"}, // directories, not volumes
	"csi-plugin/filer/s3":        {"csi-plugin/filer/gateway", "csi-plugin/filer/lease", "csi-plugin/filer/snapshots"},                                        // so is this

	"csi-plugin/mount":  {"spec"},
	"csi-plugin/tree":   {},
	"csi-plugin/volume": {"spec"},

	"csi-plugin/volume/volumetest": {"spec", "csi-plugin/volume", "csi-plugin/mount", "internal/mountns"},

	"bali": {}, // stands alone: it brings up hosts before anything else exists

	"dockerapi":           {"dockerapi/server.", "dockerapi/registry", "internal/command"}, // main.go and its commands
	"dockerapi/server":    {"spec", "internal/nomadjob", "internal/dockerhttp", "internal/tunnel", "dockerapi/translate", "dockerapi/registry"},
	"dockerapi/registry":  {"internal/stalled"},
	"dockerapi/translate": {"spec", "internal/dockerhttp"}, // pure: docker's JSON ⇄ spec

	"terraform-provider":          {"terraform-provider/provider"},
	"terraform-provider/provider": {"spec", "internal/nomadjob", "internal/tunnel", "csi-plugin/volume", "csi-plugin/filer/api"}, // the plugin's own reading of its parameters, the filer's of rollbacks

	"internal/dockerhttp": {}, // of the guest's API as well: docker's types and nothing else
	"internal/nomadjob":   {"spec"},
	"internal/stalled":    {},

	"internal/agents":    {},
	"internal/cephtest":  {"internal/netnstest"},
	"internal/cgroup":    {},
	"internal/command":   {},
	"internal/durable":   {},
	"internal/filertest": {"internal/locked", "test/programs"},
	"internal/golden":    {},
	"internal/locked":    {},
	"internal/mountns":   {},
	"internal/nomadtest": {"internal/agents", "internal/cgroup", "test/programs"},
	"internal/netnstest": {},
	"internal/nfstest":   {"internal/locked", "internal/netnstest"},
	"internal/stack":     {"internal/agents", "internal/cgroup", "test/programs"},
	"internal/tunnel":    {"spec"},
	"internal/jsonhttp":  {},
	"internal/keyed":     {},
	"internal/turns":     {},

	"docs":            {},
	"examples/images": {},
	"examples/stack":  {"internal/stack"},
	"test":            {"spec", "driver-cradle/wire", "internal/cephtest", "internal/cgroup", "internal/mountns", "internal/nomadtest", "internal/nfstest", "internal/filertest", "internal/locked", "internal/netnstest", "internal/stack"}, // end to end: through the programs, not around them
}

// testsMayImport is what tests may import beyond that: the agent's run it in a real machine.
var testsMayImport = map[string][]string{
	"driver-cradle/guest":         {"driver-cradle/vmm", "driver-cradle/boot", "driver-cradle/image", "internal/cephtest", "internal/locked", "internal/nfstest"},
	"driver-cradle/guest/stdio":   {"internal/locked"},
	"driver-cradle/guest/vdocker": {"driver-cradle/vmm", "driver-cradle/boot", "driver-cradle/image"},
	"driver-cradle/driver":        {"driver-cradle/boot/boottest", "internal/golden", "internal/nfstest", "internal/nomadtest", "internal/nomadjob", "test/programs", "test/dockerd"},
	"driver-cradle/image":         {"test/dockerd"},
	"driver-cradle/kcradle":       {"internal/golden", "internal/locked"},
	"driver-cradle/pod":           {"internal/golden"},
	"driver-cradle/vmm":           {"internal/golden", "internal/locked"},
	"internal/nomadjob":           {"internal/golden"},
	"internal/tunnel":             {"internal/nomadtest", "test/programs"},
	"dockerapi/server":            {"test/dockerd", "test/programs", "internal/nomadtest"},
	"dockerapi/registry":          {"test/s3server"},
	"dockerapi/translate":         {"internal/golden"},
	"bali":                        {"internal/nomadtest", "test/s3server"},
	"dockerapi":                   {"internal/golden", "internal/locked", "internal/nomadjob", "internal/nomadtest", "test/dockerd", "test/programs"},
	"csi-plugin":                  {"internal/cephtest", "internal/filertest", "internal/golden", "internal/mountns", "internal/nomadtest", "test/dockerd", "test/programs"},
	"terraform-provider":          {"internal/golden", "internal/locked", "internal/nomadjob", "internal/nomadtest", "test/programs"},
	"csi-plugin/cold":             {"test/s3server"},
	"csi-plugin/ceph":             {"csi-plugin/volume/volumetest", "internal/cephtest"},
	"csi-plugin/dir":              {"csi-plugin/volume/volumetest"},
	"csi-plugin/zfs":              {"csi-plugin/volume/volumetest", "test/programs"},
	"csi-plugin/filer":            {"internal/filertest", "internal/golden", "internal/locked", "internal/mountns", "test/programs"},
	"csi-plugin/filer/volumes":    {"csi-plugin/dir", "csi-plugin/volume/volumetest", "internal/filertest"},
	"csi-plugin/filer/nfs":        {"internal/locked", "internal/mountns"},
	"csi-plugin/filer/ganesha":    {"internal/mountns", "internal/netnstest"},
	"csi-plugin/filer/s3":         {"test/programs"},
	"csi-plugin/filer/webdav":     {"internal/mountns"},
	"test":                        {"internal/locked"},
}

// onlyImporter names the folders that alone may import a foreign module (by prefix of the import path).
var onlyImporter = map[string][]string{
	// BUSL-1.1 since 1.7; the client module nomad/api (MPL-2.0) is another module and free to use.
	"github.com/hashicorp/nomad/plugins":     {"driver-cradle/driver", "driver-cradle"},
	"github.com/hashicorp/nomad/client":      {"driver-cradle/driver"},
	"github.com/hashicorp/nomad/helper":      {"driver-cradle/driver"},
	"github.com/hashicorp/nomad/nomad":       {"driver-cradle/driver"},
	"github.com/hashicorp/nomad/drivers":     {"driver-cradle/driver"},
	"github.com/hashicorp/nomad/jobspec2":    {"driver-cradle/driver"},
	"github.com/google/go-containerregistry": {"bali", "bali/source", "dockerapi.", "dockerapi/registry", "dockerapi/server", "driver-cradle/driver", "driver-cradle/image", "examples/images", "driver-cradle/kcradle", "driver-cradle/pod", "test"},
	"github.com/Microsoft/hcsshim":           {"driver-cradle/image"},
	"github.com/u-root/u-root":               {"driver-cradle/boot"},
	"github.com/moby/moby/client":            {"dockerapi/server", "driver-cradle/image", "driver-cradle/guest/vdocker", "driver-cradle/kcradle", "driver-cradle/pod", "internal/tunnel", "test"},
	"github.com/spf13/cobra":                 {"driver-cradle/kcradle", "bali", "csi-plugin.", "csi-plugin/filer.", "dockerapi.", "internal/command", "internal/golden"},
	// csi-plugin itself and the filer: their tests call the plugin.
	"github.com/container-storage-interface": {"csi-plugin/rpc", "csi-plugin.", "csi-plugin/filer.", "test/bench"},
	"google.golang.org/grpc":                 {"csi-plugin/rpc", "csi-plugin.", "csi-plugin/filer.", "test/bench"},

	"github.com/hashicorp/terraform-plugin-framework": {"terraform-provider"},
	"github.com/hashicorp/terraform-plugin-go":        {"terraform-provider"},
}

// A listed package, as `go list -json` prints it.
type listed struct {
	ImportPath, Dir, Name, Doc         string
	GoFiles, TestGoFiles, XTestGoFiles []string
	Imports, TestImports, XTestImports []string
	Deps                               []string
}

// folder is the package's path in the repository, "." for the root.
func (p listed) folder() string { return folderOf(p.ImportPath) }

func folderOf(importPath string) string {
	if importPath+"/" == module {
		return "."
	}
	return strings.TrimPrefix(importPath, module)
}

// packages lists every package of the module, with the files behind all build tags of the repository.
func packages(t *testing.T) []listed {
	t.Helper()
	all, err := goList()
	if err != nil {
		t.Fatal(err)
	}
	return all
}

var goList = sync.OnceValues(func() ([]listed, error) {
	var stderr bytes.Buffer
	cmd := exec.Command("go", "list", "-tags=vm,soak", "-json=ImportPath,Dir,Name,Doc,GoFiles,TestGoFiles,XTestGoFiles,Imports,TestImports,XTestImports,Deps", "./...")
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("go list: %w\n%s", err, stderr.String())
	}
	var all []listed
	for dec := json.NewDecoder(bytes.NewReader(out)); ; {
		var p listed
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return nil, fmt.Errorf("go list: %w", err)
		}
		all = append(all, p)
	}
	if len(all) < 3 {
		return nil, fmt.Errorf("go list shows %d packages; this test must run at the repository's root", len(all))
	}
	return all, nil
})

// under says whether folder is root or lies below it; a root that ends in "." stands for itself alone.
func under(folder, root string) bool {
	if alone, ok := strings.CutSuffix(root, "."); ok && alone != "" {
		return folder == alone
	}
	return folder == root || strings.HasPrefix(folder, root+"/")
}

// rowOf is the longest key of mayImport that covers the folder.
func rowOf(folder string) (row string, ok bool) {
	for key := range mayImport {
		if (key == folder || key != "." && under(folder, key)) && (!ok || len(key) > len(row)) {
			row, ok = key, true
		}
	}
	return row, ok
}

func TestImports(t *testing.T) {
	for _, p := range packages(t) {
		row, ok := rowOf(p.folder())
		if !ok {
			t.Errorf("%s has no row in mayImport: say there what it may import", p.folder())
			continue
		}
		for _, imported := range p.Imports {
			checkImport(t, p.folder(), row, mayImport[row], imported)
		}
		for _, imported := range slices.Concat(p.TestImports, p.XTestImports) {
			checkImport(t, p.folder(), row, slices.Concat(mayImport[row], testsMayImport[row]), imported)
		}
	}
}

func checkImport(t *testing.T, folder, row string, allowed []string, imported string) {
	t.Helper()
	if ours := folderOf(imported); ours != imported {
		target, _ := rowOf(ours)
		if target != row && !slices.ContainsFunc(allowed, func(root string) bool { return under(ours, root) }) {
			t.Errorf("%s imports %s; %s may import %v", folder, ours, row, allowed)
		}
		return
	}
	for prefix, importers := range onlyImporter {
		if under(imported, prefix) && !slices.ContainsFunc(importers, func(root string) bool { return under(folder, root) }) {
			t.Errorf("%s imports %s; only %v may", folder, imported, importers)
		}
	}
}

// The guest's agent is the one binary of the initramfs and is measured by it: it links no registry client, no CLI
// library and nothing of Nomad, not even through something else.
func TestGuestStaysSmall(t *testing.T) {
	for _, p := range packages(t) {
		if !under(p.folder(), "driver-cradle/guest") {
			continue
		}
		for _, dep := range p.Deps {
			for _, banned := range []string{"github.com/hashicorp/nomad", "github.com/google/go-containerregistry", "github.com/spf13/cobra", "github.com/moby/moby/client", "github.com/sirupsen/logrus"} {
				if under(dep, banned) {
					t.Errorf("%s links %s", p.folder(), dep)
				}
			}
		}
	}
}

// spec is compiled into the guest as well as into the Terraform provider: the standard library is all that it needs.
func TestSpecHasNoDependencies(t *testing.T) {
	for _, p := range packages(t) {
		if p.folder() != "spec" {
			continue
		}
		for _, dep := range p.Deps {
			if first, _, _ := strings.Cut(dep, "/"); strings.Contains(first, ".") {
				t.Errorf("spec depends on %s", dep)
			}
		}
	}
}

// minDoc is what a package comment must have to say: what the package is for, not only its name.
const minDoc = 60

func TestPackageDocs(t *testing.T) {
	for _, p := range packages(t) {
		doc := p.Doc
		if len(p.GoFiles) == 0 { // only tests: go list does not show their comment
			doc = testDoc(t, p)
		}
		want := "Package " + p.Name + " "
		if p.Name == "main" {
			want = "" // a command's comment begins with the command's name
		}
		switch {
		case doc == "":
			t.Errorf("%s has no package comment", p.folder())
		case !strings.HasPrefix(doc, want):
			t.Errorf("%s: the package comment begins %q; it should begin %q", p.folder(), first(doc, 30), want)
		case len(p.GoFiles) > 0 && len(doc) < minDoc && !strings.HasSuffix(doc, "."):
			t.Errorf("%s: the package comment %q says too little", p.folder(), doc)
		}
	}
}

func testDoc(t *testing.T, p listed) string {
	t.Helper()
	for _, name := range slices.Concat(p.TestGoFiles, p.XTestGoFiles) {
		f, err := parser.ParseFile(token.NewFileSet(), filepath.Join(p.Dir, name), nil, parser.PackageClauseOnly|parser.ParseComments)
		if err != nil {
			t.Fatal(err)
		}
		if f.Doc != nil {
			return f.Doc.Text()
		}
	}
	return ""
}

func first(s string, n int) string { return s[:min(n, len(s))] }

// maxMain is the length of a main function: run(ctx, args, …) error does the work, so that a test can call it.
const maxMain = 20

func TestMainsAreShort(t *testing.T) {
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			if name := d.Name(); path != "." && (strings.HasPrefix(name, ".") || name == "testdata" || name == "bin") {
				return filepath.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return nil
		}
		fset := token.NewFileSet()
		f, err := parser.ParseFile(fset, path, nil, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		for _, decl := range f.Decls {
			fn, ok := decl.(*ast.FuncDecl)
			if !ok || fn.Name.Name != "main" || fn.Recv != nil || f.Name.Name != "main" {
				continue
			}
			if lines := fset.Position(fn.End()).Line - fset.Position(fn.Pos()).Line + 1; lines >= maxMain {
				t.Errorf("%s: main has %d lines; under %d, let run(ctx, args, …) error do the work", path, lines, maxMain)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}
