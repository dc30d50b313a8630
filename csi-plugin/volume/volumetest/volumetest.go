// Package volumetest is the suite that every volume.Backend has to pass, on real storage: what each method promises, that each can
// be repeated, that callers at the same time do no harm, and that a process which is killed in the middle leaves nothing that the
// next call does not complete or remove.
//
// The last is tested by running the operation in a process of its own and killing that at the n-th system call that changes
// something, for every n. The test binary is that process: its TestMain calls Suite.Main.
package volumetest

import (
	"testing"

	"github.com/cradlestack/cradlestack/csi-plugin/volume"
)

// A Suite says how a backend is tested.
type Suite struct {
	// New makes empty storage that is gone when the test has ended, and returns what Open takes.
	New func(t *testing.T) (storage string)

	// Open opens the backend.
	Open func(storage string) (volume.Backend, error)

	// Rest lists what is on the storage and belongs to no volume.
	Rest func(t *testing.T, storage string) []string

	Classes []string // that the backend has
	FS      []string // that its block volumes can have

	// Slow has what was killed be repeated after each step, and looked at, or removed without that, after each third one alone.
	Slow bool
}
