//go:build vm

package mount

import (
	"os"
	"path/filepath"
	"testing"
)

// TestRootEachLoop: a loop device that is looked at is nobody else's before that is done, even if it is detached meanwhile.
func TestRootEachLoop(t *testing.T) {
	dir := t.TempDir()
	attach := func(name string) (image string, l Loop) {
		t.Helper()
		image = filepath.Join(dir, name)
		if err := os.WriteFile(image, make([]byte, blockSize), 0o600); err != nil {
			t.Fatal(err)
		}
		l, err := Attach(image, false)
		if err != nil {
			t.Fatal(err)
		}
		return image, l
	}
	one, first := attach("one")
	looked := 0
	err := EachLoop(one, func(l Loop) error {
		looked++
		if l != first {
			t.Errorf("it is %+v, not %+v", l, first)
		}
		if err := Release(l); err != nil {
			return err
		}
		two, second := attach("two")
		if second.Device == l.Device {
			t.Errorf("both images have %s", l.Device)
		}
		return ReleaseUnused(two)
	})
	if err != nil || looked != 1 {
		t.Errorf("%d loop devices, %v", looked, err)
	}
	again, err := Attach(one, false)
	if err != nil {
		t.Fatal(err)
	}
	if all, err := Loops(one); err != nil || len(all) != 1 || all[0] != again {
		t.Errorf("attached again there are %+v, %v, not %+v", all, err, again)
	}
	if err := Release(again); err != nil {
		t.Error(err)
	}
}
