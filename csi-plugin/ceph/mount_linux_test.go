package ceph

import (
	"os"
	"testing"
)

// A copy that has not begun is ended without a trace: who is killed while it looks has noted nothing in the cluster by which that would be found.
func TestAwayMakesNothing(t *testing.T) {
	b := &Backend{config: Config{Dir: t.TempDir()}}
	if err := b.mounting(copying + "clone").away(t.Context()); err != nil {
		t.Fatal(err)
	}
	if made, err := os.ReadDir(b.config.Dir); err != nil || len(made) > 0 {
		t.Errorf("made: %v, %v", made, err)
	}
}
