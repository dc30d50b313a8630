package main

import (
	"maps"
	"slices"
	"strconv"
	"strings"
)

// printable keeps a file name from moving the terminal's cursor.
func printable(s string) string {
	q := strconv.Quote(s)
	if q[1:len(q)-1] == s && !strings.ContainsAny(s, " ") {
		return s
	}
	return q
}

func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }
