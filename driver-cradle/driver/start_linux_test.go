package driver

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

// Of machines that are started a few are at a time; one whose start takes long, whatever it waits for, keeps nobody from his.
func TestStartsTakeTurns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := &Driver{starts: make(chan struct{}, 1)}
		first, err := d.awaitTurn(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		gone := errors.New("called off")
		ctx, cancel := context.WithCancelCause(t.Context())
		time.AfterFunc(time.Second, func() { cancel(gone) })
		if _, err := d.awaitTurn(ctx); !errors.Is(err, gone) {
			t.Errorf("two at a time: %v", err)
		}
		time.AfterFunc(time.Second, first)
		begin := time.Now()
		if _, err := d.awaitTurn(t.Context()); err != nil || time.Since(begin) != time.Second { // and never says that it is done
			t.Errorf("the second one: %v, after %v", err, time.Since(begin))
		}
		begin = time.Now()
		third, err := d.awaitTurn(t.Context())
		if err != nil || time.Since(begin) != longStart {
			t.Errorf("the third one: %v, after %v", err, time.Since(begin))
		}
		third()
		third()
		first()
		if n := len(d.starts); n != 0 {
			t.Errorf("%d places are taken", n)
		}
	})
}
