package gateway

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cradlestack/cradlestack/csi-plugin/filer/lease"
)

// TestGate: while it is held nobody enters, who is inside is waited for and then broken off, and who waits may give up.
func TestGate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := &Gate{}
		_, leave, err := g.Enter(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		held, release := make(chan struct{}), make(chan struct{})
		hold := func() chan error {
			done := make(chan error, 1)
			go func() {
				done <- g.Hold(t.Context(), func() error {
					close(held)
					<-release
					return errors.New("done")
				})
			}()
			return done
		}
		done := hold()
		synctest.Wait()
		select {
		case <-held:
			t.Fatal("it is held while somebody is inside")
		default:
		}
		given, cancel := context.WithCancel(t.Context())
		gave := make(chan error, 1)
		go func() {
			_, _, err := g.Enter(given)
			gave <- err
		}()
		entered := make(chan error, 1)
		go func() {
			_, leave, err := g.Enter(t.Context())
			if err == nil {
				leave()
			}
			entered <- err
		}()
		synctest.Wait()
		cancel()
		if err := <-gave; !errors.Is(err, context.Canceled) {
			t.Errorf("who gives up: %v", err)
		}
		leave()
		<-held
		synctest.Wait()
		select {
		case <-entered:
			t.Error("one enters while it is held")
		default:
		}
		if err := g.Hold(t.Context(), func() error { return nil }); err == nil {
			t.Error("it is held twice")
		}
		close(release)
		if err := <-done; err == nil || err.Error() != "done" {
			t.Error(err)
		}
		if err := <-entered; err != nil {
			t.Error(err)
		}

		// Who takes too long is broken off, and waited for.
		held, release = make(chan struct{}), make(chan struct{})
		close(release)
		ctx, leave, err := g.Enter(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		done = hold()
		<-ctx.Done()
		if !errors.Is(context.Cause(ctx), ErrHeld) || time.Since(began) != gatePatience {
			t.Errorf("after %v: %v", time.Since(began), context.Cause(ctx))
		}
		synctest.Wait()
		select {
		case <-held:
			t.Error("it is held while one that was broken off is inside")
		default:
		}
		leave()
		<-done

		// One that the storage keeps ends it all for who wants to hold the gate, and nobody else.
		_, leave, err = g.Enter(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if err := g.Hold(t.Context(), func() error { t.Error("it is held while one that has no end is inside"); return nil }); !errors.Is(err, ErrStuck) {
			t.Errorf("held while the storage keeps a change: %v", err)
		}
		if _, leave, err := g.Enter(t.Context()); err != nil {
			t.Errorf("who enters then: %v", err)
		} else {
			leave()
		}
		leave()

		// Who wants to hold it gives up.
		_, leave, err = g.Enter(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		given, cancel = context.WithCancel(t.Context())
		cancel()
		if err := g.Hold(given, func() error { return nil }); !errors.Is(err, context.Canceled) {
			t.Errorf("who gives up holds it: %v", err)
		}
		leave()
		_, leave, err = g.Enter(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		leave()
		// What is done elsewhere lets nobody in here any more, neither who has waited nor who comes.
		held, release = make(chan struct{}), make(chan struct{})
		go func() {
			done <- g.Hold(t.Context(), func() error { close(held); <-release; return fmt.Errorf("a rollback: %w", lease.ErrEnded) })
		}()
		<-held
		go func() {
			_, _, err := g.Enter(t.Context())
			entered <- err
		}()
		synctest.Wait()
		close(release)
		if err := <-done; !errors.Is(err, lease.ErrEnded) {
			t.Error(err)
		}
		if err := <-entered; !errors.Is(err, ErrHeld) {
			t.Errorf("who has waited for what is done elsewhere: %v", err)
		}
		if _, _, err := g.Enter(t.Context()); !errors.Is(err, ErrHeld) {
			t.Errorf("who comes then: %v", err)
		}
		_, leave, err = (*Gate)(nil).Enter(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		leave()
	})
}
