package mount

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// Who copies a volume lets go of it when it is reclaimed, in the state of opening and in that of reading. The next copy waits for the end of this one, and nobody waits for who waits for that.
func TestLease(t *testing.T) {
	locks := Locks(filepath.Join(t.TempDir(), "lock"))
	gone, late := errors.New("gone"), errors.New("late")
	open := func() *os.File {
		t.Helper()
		f, err := locks.Open()
		if err != nil {
			t.Fatal(err)
		}
		return f
	}
	lend := func() *Lease {
		t.Helper()
		l, err := Lend(t.Context(), open(), "v", gone)
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	reclaim := func(ctx context.Context) (unlock func(), err error) {
		f := open()
		return func() { f.Close() }, Reclaim(ctx, f, "v", nil)
	}
	shortly := func() context.Context {
		ctx, cancel := context.WithTimeoutCause(t.Context(), 300*time.Millisecond, late)
		t.Cleanup(cancel)
		return ctx
	}

	l := lend()
	unlock, err := reclaim(shortly()) // who opens is at work
	if !errors.Is(err, late) {
		t.Errorf("reclaimed from who opens it: %v", err)
	}
	unlock()
	<-l.Context().Done()
	if err := context.Cause(l.Context()); !errors.Is(err, gone) {
		t.Errorf("it is reclaimed, and there is %v", err)
	}
	released := 0
	disk := func() *os.File {
		t.Helper()
		f, err := os.Create(filepath.Join(t.TempDir(), "disk"))
		if err == nil {
			_, err = f.WriteString("text")
		}
		if err != nil {
			t.Fatal(err)
		}
		return f
	}
	if err := l.Read(disk(), func() error { released++; return nil }); !errors.Is(err, gone) || released != 1 {
		t.Errorf("read what is reclaimed: %v, released %d times", err, released)
	}
	if err := l.Close(); err != nil || released != 1 {
		t.Errorf("%v, released %d times", err, released)
	}

	l = lend()
	if err := l.Read(disk(), func() error { released++; return nil }); err != nil {
		t.Fatal(err)
	}
	if _, err := l.ReadAt(make([]byte, 4), 0); err != nil {
		t.Error(err)
	}
	next := make(chan *Lease)
	go func() {
		l, err := Lend(t.Context(), open(), "v", gone)
		if err != nil {
			t.Error(err)
		}
		next <- l
	}()
	unlock, err = reclaim(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := l.ReadAt(make([]byte, 4), 0); !errors.Is(err, gone) || released != 2 {
		t.Errorf("it is reclaimed, and read: %v, released %d times", err, released)
	}
	unlock()
	unlock, err = reclaim(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	select {
	case <-next:
		t.Error("two make a copy")
	default:
	}
	unlock()
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	l = <-next
	if err := l.Close(); err != nil || released != 2 {
		t.Errorf("%v, released %d times", err, released)
	}
}
