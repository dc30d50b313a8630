//go:build vm

package main

import (
	"context"
	"fmt"
	"maps"
	"os"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cradlestack/cradlestack/internal/nomadtest"
)

func TestMain(m *testing.M) {
	code := m.Run()
	if cluster.Cluster != nil {
		if err := cluster.Close(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	os.Exit(code)
}

// cluster is one Nomad for all tests, with pods and volumes.
var cluster struct {
	sync.Once
	*nomadtest.Cluster
	err error
}

// openNomad is the cluster with the volumes' plugin, for this test.
func openNomad(t *testing.T) *nomadtest.Cluster {
	t.Helper()
	cluster.Do(func() {
		o := nomadtest.Options{ACL: true}
		if cluster.err = o.Cradle(""); cluster.err != nil {
			return
		}
		o.Keep = append(o.Keep, "volumes", "nomad/client/csi", "/run/cradle")
		cluster.Cluster, cluster.err = nomadtest.Open(context.Background(), o)
	})
	if cluster.err != nil {
		t.Fatal(cluster.err)
	}
	c := cluster.Cluster
	c.Begin(t)
	c.RunVolumes(t)
	return c
}

func eventually(t *testing.T, c *nomadtest.Cluster, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(nomadtest.Patience); !f(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s: not within %v\n%s", what, nomadtest.Patience, c.Describe())
		}
	}
}

// apply makes a configuration the workspace's, and the cluster like it.
func (w *workspace) apply(hcl string) string {
	w.t.Helper()
	w.write(hcl)
	return w.run("apply", "-auto-approve", "-no-color")
}

// differs lists the attributes that differ, sorted.
func (c change) differs() (names []string) {
	for name, was := range c.Change.Before {
		_, unknown := c.Change.AfterUnknown[name]
		if is := c.Change.After[name]; unknown && c.Change.AfterUnknown[name] == true || fmt.Sprint(was) != fmt.Sprint(is) {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

// replaces lists the attributes for which a resource is replaced.
func (c change) replaces() (names []string) {
	for _, p := range c.Change.ReplacePaths {
		names = append(names, fmt.Sprint(p[0]))
	}
	slices.Sort(names)
	return names
}

// unchanged makes a plan that has to change nothing.
func (w *workspace) unchanged(args ...string) {
	w.t.Helper()
	if out, code := w.try(append([]string{"plan", "-no-color", "-detailed-exitcode"}, args...)...); code != 0 {
		w.t.Errorf("a plan changes something, exit code %d:\n%s", code, out)
	}
}

// imports takes resources out of the state, and plans to import them: all is as it was.
func (w *workspace) imports(hcl string, ids map[string]string) map[string]change {
	w.t.Helper()
	addresses := slices.Sorted(maps.Keys(ids))
	w.run(append([]string{"state", "rm"}, addresses...)...)
	for _, a := range addresses {
		hcl += fmt.Sprintf("import {\n  to = %s\n  id = %q\n}\n", a, ids[a])
	}
	w.write(hcl)
	all, said := w.plan()
	if want := fmt.Sprintf("%d to import", len(ids)); !strings.Contains(said, want) {
		w.t.Errorf("without %q:\n%s", want, said)
	}
	w.run("apply", "-auto-approve", "-no-color")
	return all
}

// output is one of the state's outputs.
func (w *workspace) output(name string) string {
	w.t.Helper()
	return strings.TrimSpace(w.run("output", "-raw", name))
}

// computed are attributes that a change of any other makes unknown.
var computed = []string{"status", "env_index", "instances", "capacity"}

// differences lists the paths at which two values of a plan differ: as the schema has them, without places in lists and names in maps of texts.
func differences(at string, was, is any) (paths []string) {
	switch w := was.(type) {
	case map[string]any:
		if i, ok := is.(map[string]any); ok {
			for _, name := range slices.Sorted(maps.Keys(merged(w, i))) {
				paths = append(paths, differences(strings.TrimPrefix(at+"."+name, "."), w[name], i[name])...)
			}
			return paths
		}
	case []any:
		if i, ok := is.([]any); ok && len(i) == len(w) {
			for n := range w {
				paths = append(paths, differences(at, w[n], i[n])...)
			}
			return paths
		}
	}
	if !reflect.DeepEqual(was, is) {
		paths = []string{at}
	}
	return paths
}

func merged(a, b map[string]any) map[string]any {
	all := maps.Clone(a)
	maps.Copy(all, b)
	return all
}

// onlyIn says that nothing but an attribute differs, and that it does.
func (c change) onlyIn(attribute string) error {
	was, is := maps.Clone(c.Change.Before), maps.Clone(c.Change.After)
	for _, name := range computed {
		delete(was, name)
		delete(is, name)
	}
	paths := differences("", was, is)
	if len(paths) == 0 {
		return fmt.Errorf("nothing differs: %s", c.actions())
	}
	for _, p := range paths {
		if p != attribute && !strings.HasPrefix(p, attribute+".") {
			return fmt.Errorf("%s differs", p)
		}
	}
	return nil
}
