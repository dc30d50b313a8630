package snapshots

import (
	"errors"
	"io/fs"
	"os"
	"testing"
	"testing/synctest"
	"time"
)

// TestOpened: a snapshot is opened once for all who look at it, closed a minute after the last of them, and another one when it is taken anew.
func TestOpened(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		all := []Snapshot{{Name: "first", Taken: time.Unix(1, 0)}}
		opens := 0
		broken := errors.New("broken")
		var fail error
		o := Open(&Source{
			List: func() ([]Snapshot, error) { return all, nil },
			Open: func(string) (*os.Root, error) {
				if fail != nil {
					return nil, fail
				}
				opens++
				return os.OpenRoot(dir)
			},
		})
		enter := func() (*os.Root, func()) {
			t.Helper()
			root, leave, err := o.Enter("first")
			if err != nil {
				t.Fatal(err)
			}
			return root, leave
		}
		is := func(what string, root *os.Root, open bool) {
			t.Helper()
			synctest.Wait()
			if _, err := root.Stat("."); (err == nil) != open {
				t.Errorf("%s: %v", what, err)
			}
		}
		root, leave := enter()
		again, leaveAgain := enter()
		if again != root || opens != 1 {
			t.Errorf("it was opened %d times", opens)
		}
		leave()
		time.Sleep(2 * idleAfter)
		is("somebody looks at it", root, true)
		leaveAgain()
		time.Sleep(idleAfter / 2)
		_, leave = enter()
		time.Sleep(idleAfter)
		is("somebody looks at it again", root, true)
		leave()
		time.Sleep(idleAfter - time.Second)
		is("somebody has just looked at it", root, true)
		time.Sleep(2 * time.Second)
		is("nobody looks at it", root, false)

		former, leave := enter()
		all[0].Taken = time.Unix(2, 0)
		now, leaveNow := enter()
		if now == former {
			t.Error("taken anew it is the same")
		}
		is("the former one is looked at", former, true)
		leave()
		is("nobody looks at the former one", former, false)
		o.Close()
		is("it is closed while somebody looks", now, true)
		leaveNow()
		is("all are closed", now, false)

		fail = broken
		if _, _, err := o.Enter("first"); !errors.Is(err, broken) {
			t.Errorf("one that can't be opened: %v", err)
		}
		if _, _, err := o.Enter("../first"); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("one that is not there: %v", err)
		}
		(*Opened)(nil).Close()
	})
}
