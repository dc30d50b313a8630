package mount

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

// A mount that does not answer is asked once, however often somebody wants to know, and again when it has.
func TestAnswered(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		silent := errors.New("silent")
		answer, asked := make(chan error), 0
		ask := func() error { asked++; return <-answer }
		for range 3 {
			if err := Answered("/there", time.Second, silent, ask); !errors.Is(err, silent) {
				t.Errorf("what does not answer: %v", err)
			}
		}
		if err := Answered("/elsewhere", time.Second, silent, func() error { return nil }); err != nil {
			t.Errorf("another path: %v", err)
		}
		if asked != 1 {
			t.Errorf("asked %d times", asked)
		}
		want := errors.New("no such file")
		go func() {
			time.Sleep(time.Second / 2)
			answer <- nil
			answer <- want
		}()
		if err := Answered("/there", time.Second, silent, ask); err != want {
			t.Errorf("when it answers again: %v", err)
		}
	})
}
