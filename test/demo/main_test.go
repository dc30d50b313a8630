//go:build vm

package main

import (
	"bytes"
	"strings"
	"testing"
)

// TestVMDemo runs what make demo shows.
func TestVMDemo(t *testing.T) {
	var out bytes.Buffer
	if err := run(t.Context(), &out); err != nil {
		t.Fatalf("%v\n%s", err, &out)
	}
	for _, want := range []string{"cradle\t42", "PONG", "nginx", "in the pod", "volume\t42", "in a microVM", "chair, lamp"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("the demo does not show %q:\n%s", want, &out)
		}
	}
}
