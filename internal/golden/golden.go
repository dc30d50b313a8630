// Package golden compares what a test makes with a file that a person reads: a golden file, or a page of docs/ that is written from
// the code. With the flag -update the file is written instead. Only tests import it.
package golden

import (
	"bytes"
	"flag"
	"os"
	"slices"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write golden files anew")

// Compare fails the test where got is not what the file holds.
func Compare(t testing.TB, file string, got []byte) {
	t.Helper()
	if *update {
		if err := os.WriteFile(file, got, 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatalf("%v (-update writes it)", err)
	}
	if bytes.Equal(got, want) {
		return
	}
	have, should := slices.Collect(strings.Lines(string(got))), slices.Collect(strings.Lines(string(want)))
	line := 0
	for line < min(len(have), len(should)) && have[line] == should[line] {
		line++
	}
	t.Errorf("%s:%d differs (-update writes it anew): have\n%s\nwant\n%s", file, line+1, around(have, line), around(should, line))
}

// around is a line with its neighbours.
func around(lines []string, line int) string {
	return strings.Join(lines[max(0, line-3):min(len(lines), line+8)], "")
}
