package driver

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/hashicorp/hcl"
	"github.com/hashicorp/hcl/hcl/ast"

	"github.com/cradlestack/cradlestack/driver-cradle/hostfile"
)

// A keyError is what is wrong with a key of the plugin's configuration, such as gc.image_delay or registry.docker.io.mirrors.
type keyError struct {
	path    []string
	message string
}

func (e *keyError) Error() string { return strings.Join(e.path, ".") + ": " + e.message }

// withPlaces puts file and line before each error about a key. Nomad hands its plugins a configuration without them: they are looked up where the
// agent has it from, and left out where that does not help.
func withPlaces(err error, files []string, plugin string) error {
	var all interface{ Unwrap() []error }
	if errors.As(err, &all) {
		var errs []error
		for _, e := range all.Unwrap() {
			errs = append(errs, withPlaces(e, files, plugin))
		}
		return errors.Join(errs...)
	}
	var key *keyError
	if !errors.As(err, &key) {
		return err
	}
	for _, file := range files {
		if data, rerr := hostfile.Read(file, 1<<20); rerr == nil {
			if line := lineOf(data, slices.Concat([]string{"plugin", plugin, "config"}, key.path)); line > 0 {
				return fmt.Errorf("%s:%d: %w", file, line, err)
			}
		}
	}
	return err
}

// lineOf is the line of a key in an agent's configuration, by the names of the blocks around it; 0: it is not there.
func lineOf(data []byte, path []string) int {
	root, err := hcl.ParseBytes(data)
	if err != nil {
		return 0
	}
	list, ok := root.Node.(*ast.ObjectList)
	if !ok {
		return 0
	}
	return lineIn(list, path)
}

func lineIn(list *ast.ObjectList, path []string) int {
	for _, item := range list.Items {
		rest := path
		for _, k := range item.Keys {
			name, ok := k.Token.Value().(string)
			if !ok || len(rest) == 0 || name != rest[0] {
				rest = nil
				break
			}
			rest = rest[1:]
		}
		switch {
		case rest == nil:
		case len(rest) == 0:
			return item.Keys[len(item.Keys)-1].Pos().Line
		default:
			if inner, ok := item.Val.(*ast.ObjectType); ok {
				if line := lineIn(inner.List, rest); line > 0 {
					return line
				}
			}
		}
	}
	return 0
}

// agentFiles are the configuration files of the agent that has started this process, in the order in which it reads them.
func agentFiles() []string {
	proc := fmt.Sprintf("/proc/%d/", os.Getppid())
	line, err := os.ReadFile(proc + "cmdline")
	if err != nil {
		return nil
	}
	var files []string
	args := strings.Split(string(bytes.TrimRight(line, "\x00")), "\x00")
	for i, arg := range args {
		path, given := strings.CutPrefix(strings.TrimLeft(arg, "-"), "config=")
		if !given && (arg == "-config" || arg == "--config") && i+1 < len(args) {
			path, given = args[i+1], true
		}
		if !given {
			continue
		}
		if !filepath.IsAbs(path) {
			cwd, err := os.Readlink(proc + "cwd")
			if err != nil {
				continue
			}
			path = filepath.Join(cwd, path)
		}
		below, err := os.ReadDir(path)
		if err != nil {
			files = append(files, path)
			continue
		}
		for _, e := range below {
			if ext := filepath.Ext(e.Name()); ext == ".hcl" || ext == ".json" {
				files = append(files, filepath.Join(path, e.Name()))
			}
		}
	}
	return files
}
