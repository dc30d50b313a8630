package main

import (
	"fmt"
	"os"
	"strings"
	"testing"
)

// A program that has become small goes on, with less of its file in memory.
func TestSlim(t *testing.T) {
	before := residentFile(t)
	slim()
	if after := residentFile(t); after > before/2 {
		t.Errorf("%d KiB of the program's file are in memory, before it were %d", after, before)
	}
}

// residentFile is how much of the files that this process maps is in memory, in KiB.
func residentFile(t *testing.T) (kib int) {
	data, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	_, value, ok := strings.Cut(string(data), "RssFile:")
	if !ok {
		t.Fatal("/proc/self/status says nothing about files")
	}
	if _, err := fmt.Sscan(value, &kib); err != nil {
		t.Fatal(err)
	}
	return kib
}
