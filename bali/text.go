package main

import (
	"cmp"
	"maps"
	"os"
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

// newestFirst sorts files by their time stamps.
func newestFirst(paths []string) {
	age := func(p string) int64 {
		fi, err := os.Stat(p)
		if err != nil {
			return 0
		}
		return fi.ModTime().UnixNano()
	}
	slices.SortFunc(paths, func(a, b string) int { return cmp.Compare(age(b), age(a)) })
}
