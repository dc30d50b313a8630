package main

import (
	"os"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"bali": main})
}

// TestScript runs the manual: testdata/script holds one file per command.
func TestScript(t *testing.T) {
	testscript.Run(t, testscript.Params{Dir: "testdata/script", Setup: private})
}

// private keeps keys and trust of a script to itself.
func private(e *testscript.Env) error {
	e.Setenv("HOME", e.WorkDir)
	e.Setenv("XDG_CONFIG_HOME", e.WorkDir+"/config")
	e.Setenv("BALI_TRUST", e.WorkDir+"/trust")
	e.Setenv("SSH_AUTH_SOCK", "")
	e.Setenv("SOURCE_DATE_EPOCH", "")
	e.Setenv("PATH", os.Getenv("PATH"))
	return nil
}
