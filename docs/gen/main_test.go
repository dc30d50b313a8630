package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestLaunchSpecIsCurrent(t *testing.T) {
	root := filepath.Join("..", "..")
	want, err := launchSpec(root)
	if err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(filepath.Join(root, output))
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s is not what spec/ says: run go run ./docs/gen", output)
	}
}

// Every field of the format says what it is for, or has a name and a type that do.
func TestEveryTypeIsDocumented(t *testing.T) {
	types, err := structs(filepath.Join("..", "..", "spec"))
	if err != nil {
		t.Fatal(err)
	}
	for name, st := range types {
		if strings.TrimSpace(st.doc) == "" {
			t.Errorf("spec.%s has no comment", name)
		}
	}
}
