//go:build vm

package main

import (
	"bytes"
	"os"
	"strings"
	"testing"

	"github.com/cradlestack/cradlestack/internal/mountns"
)

// TestMain: nodes of other tests that run would keep volumes mounted that Terraform is to destroy.
func TestMain(m *testing.M) {
	mountns.Own()
	os.Exit(m.Run())
}

// TestVMDemo runs what make demo shows.
func TestVMDemo(t *testing.T) {
	var out bytes.Buffer
	if err := run(t.Context(), &out); err != nil {
		t.Fatalf("%v\n%s", err, &out)
	}
	for _, want := range []string{"cradle\t42", "PONG", "nginx", "in the pod", "hello from a microVM", "volume\t42", "in a microVM", "chair, lamp", "Dear bank", "Dear customer"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("the demo does not show %q:\n%s", want, &out)
		}
	}
}
