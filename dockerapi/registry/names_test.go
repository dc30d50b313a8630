package registry

import (
	"errors"
	"strings"
	"testing"

	"github.com/distribution/reference"
)

func TestRepositories(t *testing.T) {
	for _, test := range []struct{ namespace, name, want string }{
		{"default", "busybox", "default/docker.io/library/busybox"},
		{"team-a", "localhost:5000/app", "team-a/localhost_5000/app"},
		{"team-a", "registry.example.org/team/app", "team-a/registry.example.org/team/app"},
		{"t--1", "x/y", "t--1/docker.io/x/y"},
		{"Team", "x/y", "x.5985039f106df054b43c3529139613bf7c237293/docker.io/x/y"},
		{"-", "x/y", "x.3973e022e93220f9212c18d0d0c543ae7c309e46/docker.io/x/y"},
		{"a", "EXAMPLE.org/x", "a/x__4558414d504c452e6f7267/x"},
		{"a", "[::1]:5000/x", "a/x__5b3a3a315d3a35303030/x"},
	} {
		top, err := root(test.namespace)
		if err != nil {
			t.Fatal(err)
		}
		n, err := reference.ParseNormalizedNamed(test.name)
		if err != nil {
			t.Fatal(err)
		}
		repo, err := repository(top, n)
		if err != nil || repo.Name() != test.want {
			t.Errorf("%s of %s is %v, %v; want %s", test.name, test.namespace, repo, err, test.want)
			continue
		}
		back, ok := nameOf(top, strings.TrimPrefix(repo.Name(), top+"/"))
		if !ok || back.Name() != n.Name() {
			t.Errorf("%s is read as %v", repo, back)
		}
	}
	for _, namespace := range []string{"", "a/b", "..", "a.b", "ä", strings.Repeat("a", 129)} {
		if top, err := root(namespace); !errors.Is(err, ErrInvalid) {
			t.Errorf("namespace %q: %s, %v", namespace, top, err)
		}
	}
	n, err := reference.ParseNormalizedNamed("example.org/" + strings.Repeat("a/", 110) + "a")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := repository("a-namespace-with-a-name-of-its-own", n); !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), "too long") {
		t.Errorf("a long name: %v", err)
	}
}

// Whatever names are: two of them never share a repository, none leaves its namespace, and what is written can be read.
func FuzzNames(f *testing.F) {
	f.Add("default", "busybox", "Default", "docker.io/library/busybox")
	f.Add("a", "localhost:5000/app", "a", "localhost_5000/app")
	f.Add("a", "[::1]:5000/x", "x.0", "x__41/x")
	f.Add("a", "none", "a", "EXAMPLE.org/x")
	f.Fuzz(func(t *testing.T, ns1, name1, ns2, name2 string) {
		one, ok1 := place1(t, ns1, name1)
		two, ok2 := place1(t, ns2, name2)
		if !ok1 || !ok2 {
			return
		}
		if one.repo == two.repo && (ns1 != ns2 || one.name != two.name) {
			t.Errorf("%q of %q and %q of %q share %s", name1, ns1, name2, ns2, one.repo)
		}
	})
}

type placed struct{ repo, name string }

func place1(t *testing.T, ns, s string) (placed, bool) {
	top, err := root(ns)
	if err != nil {
		return placed{}, false
	}
	n, err := ParseName(s)
	if err != nil {
		return placed{}, false
	}
	repo, err := repository(top, n)
	if err != nil {
		return placed{}, false
	}
	below, ok := strings.CutPrefix(repo.Name(), top+"/")
	if !ok || below == dangling || strings.Contains(repo.Name(), "..") || len(repo.Name()) > 255 {
		t.Errorf("%q of %q is %s", s, ns, repo)
	}
	back, ok := nameOf(top, below)
	if !ok || back.Name() != n.Name() {
		t.Errorf("%s is read as %v, not %s", repo, back, n.Name())
	}
	return placed{repo.Name(), n.Name()}, true
}
