package main

import (
	"regexp"
	"strings"
	"testing"
)

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
