package keyed

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
)

// One holder of a key at a time, any number of different keys, and a waiter that gives up leaves nothing.
func TestLock(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var k Lock
		unlock, err := k.Lock(t.Context(), "v")
		if err != nil {
			t.Fatal(err)
		}
		other, err := k.Lock(t.Context(), "w")
		if err != nil {
			t.Fatal(err)
		}
		other()
		ctx, cancel := context.WithCancel(t.Context())
		gaveUp := make(chan error)
		go func() {
			_, err := k.Lock(ctx, "v")
			gaveUp <- err
		}()
		entered := false
		go func() {
			unlock, err := k.Lock(t.Context(), "v")
			if err != nil {
				t.Error(err)
				return
			}
			entered = true
			unlock()
		}()
		synctest.Wait()
		if entered {
			t.Error("two hold one key")
		}
		cancel()
		if err := <-gaveUp; !errors.Is(err, context.Canceled) {
			t.Errorf("gave up with %v", err)
		}
		unlock()
		synctest.Wait()
		if !entered || len(k.held) != 0 {
			t.Errorf("entered: %t; left: %v", entered, k.held)
		}
	})
}
