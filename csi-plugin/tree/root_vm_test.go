//go:build vm

package tree

import (
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// Owners and capabilities are copied, of which a change of the owner takes the latter away: what was copied is never to be copied again.
func TestRootCapabilities(t *testing.T) {
	a, b := t.TempDir(), t.TempDir()
	fill(t, a)
	const capability = "security.capability"
	netRaw := "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00" // linux/capability.h, vfs_cap_data
	small := filepath.Join(a, "d/e/small")
	must(t, unix.Chown(small, 1234, 5678), unix.Setxattr(small, capability, []byte(netRaw), 0), unix.Setxattr(small, "user.note", []byte("kept"), 0), unix.Chmod(small, 0o4751))
	from, to := open(t, a), open(t, b)
	pass(t, from, to)
	if again := pass(t, from, to); again != (Changes{}) {
		t.Errorf("once more it took %+v", again)
	}
	value := make([]byte, 64)
	if n, err := unix.Getxattr(filepath.Join(b, "d/e/small"), capability, value); err != nil || string(value[:n]) != netRaw {
		t.Errorf("its capabilities are %q, %v", value[:max(n, 0)], err)
	}
}
