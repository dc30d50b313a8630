package turns

import (
	"context"
	"testing"
	"testing/synctest"
	"time"
)

// Turns that are stuck count apart, up to a number; what goes on does not; and each place is free again in the end.
func TestTurns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		turns := &Turns{AtOnce: 2, Apart: 3, Patience: time.Minute}
		stuck := make(chan struct{})
		hang := func(func()) { <-stuck }
		began := time.Now()
		begin := func(do func(func()), want time.Duration) {
			t.Helper()
			if !turns.Go(t.Context(), do) || time.Since(began) != want {
				t.Fatalf("begun after %v, not %v", time.Since(began), want)
			}
			synctest.Wait()
		}
		begin(hang, 0)
		begin(func(goesOn func()) { // for 10 minutes
			for range 20 {
				time.Sleep(30 * time.Second)
				goesOn()
			}
		}, 0)
		begin(hang, time.Minute)
		begin(hang, 2*time.Minute)
		begin(hang, 3*time.Minute) // the fourth that is stuck: for a fifth there is no room
		begin(hang, 10*time.Minute)
		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		if turns.Go(ctx, hang) {
			t.Error("begun where all are stuck")
		}
		close(stuck)
		turns.Wait()
		for range 2 {
			began = time.Now()
			begin(func(func()) { time.Sleep(30 * time.Second) }, 0)
			begin(func(func()) { time.Sleep(30 * time.Second) }, 0)
			begin(func(func()) {}, 30*time.Second)
			turns.Wait()
		}
		if turns.Go(ctx, hang) {
			t.Error("begun when it was over")
		}
	})
}
