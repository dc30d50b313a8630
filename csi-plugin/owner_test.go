package main

import (
	"regexp"
	"strings"
	"testing"

	"github.com/hashicorp/nomad/api"

	"github.com/cradlestack/cradlestack/csi-plugin/rpc"
)

// No two nodes' restores make a volume of one generation, and what is in use is never former.
func TestOwnerBegin(t *testing.T) {
	var o owner
	var now *api.CSIVolume
	step := func(node string, want int, before bool) {
		t.Helper()
		g, written := o.begin(node, now)
		if g != want || written != before {
			t.Errorf("restored on %s: generation %d, known %t; want %d, %t", node, g, written, want, before)
		}
	}
	end := func(node string, generation int) { o.Owner = rpc.Owner{Generation: generation, Node: node} }
	former := func(want string) {
		t.Helper()
		got := ""
		for g := range 8 {
			if o.former(g) {
				got += string(rune('0' + g))
			}
		}
		if got != want {
			t.Errorf("%+v: former are %q, not %q", o, got, want)
		}
	}
	former("")
	step("two", 1, false)
	former("1") // whoever has made it may give it up
	step("two", 1, true)
	step("three", 2, false)
	end("three", 2)
	former("01")
	step("three", 2, true)
	step("two", 3, false)
	end("two", 3)
	step("three", 4, false)
	step("four", 5, false)
	former("01245")
	end("four", 5)
	former("01234")
	step("four", 5, true)

	// Interrupted after what it wrote last, it goes on. What was registered since was made anew, and has the generation 5 as well: whoever brings it back takes another.
	o.index, now = 70, &api.CSIVolume{CreateIndex: 60}
	step("four", 5, true)
	now.CreateIndex = 80
	step("four", 6, false)
	o.index = 81
	if !o.replaced("four") || o.replaced("two") {
		t.Errorf("%+v: what is on four is of before", o)
	}
	step("four", 6, true)
	now.CreateIndex = 90 // it was given up, and another one was made
	step("four", 6, true)
	end("four", 6)
	o.index = 91
	step("four", 6, true)
	if former("012345"); o.replaced("four") {
		t.Errorf("%+v: what is on four is in use", o)
	}
	now.CreateIndex = 100
	step("two", 7, false)
	now = nil // a restore took it from one plugin, and was interrupted
	step("two", 7, true)
	step("four", 6, true)
}

// Every volume has a Variable of its own, whose path Nomad takes (nomad/structs/variables.go).
func TestOwnerPath(t *testing.T) {
	valid := regexp.MustCompile("^[a-zA-Z0-9-_~/]{1,128}$")
	seen := map[string]string{}
	for _, id := range []string{"db", "db.1", "db_1", "db-1", "prod.db.1", strings.Repeat("n", 100), strings.Repeat("n", 101), strings.Repeat("n", 128), strings.Repeat("n", 127) + "."} {
		path := ownerPath(id)
		if !valid.MatchString(path) || seen[path] != "" {
			t.Errorf("%s has %s, as %s", id, path, seen[path])
		}
		seen[path] = id
	}
}
