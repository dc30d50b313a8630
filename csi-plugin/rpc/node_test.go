package rpc

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"

	"github.com/cradlestack/cradlestack/csi-plugin/volume"
)

// What waits for a disk that does not answer holds no call, but the volume.
func TestWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		answers := make(chan error, 1)
		locked := true
		hangs := func(ctx context.Context) error {
			err := <-answers
			return errors.Join(err, ctx.Err()) // whose call has ended
		}
		ctx, cancel := context.WithCancel(t.Context())
		if err := waits(ctx, "v", func() { locked = false }, hangs); !errors.Is(err, volume.ErrUnavailable) || !locked {
			t.Errorf("no answer: %v, locked: %t", err, locked)
		}
		cancel()
		answers <- nil
		synctest.Wait()
		if locked {
			t.Error("it has answered, and the volume is still locked")
		}
		cancel()
		if err := waits(ctx, "v", func() {}, hangs); !errors.Is(err, volume.ErrUnavailable) {
			t.Errorf("the caller has gone: %v", err)
		}
		answers <- nil
		answers <- volume.ErrInUse
		if err := waits(t.Context(), "v", func() {}, hangs); !errors.Is(err, volume.ErrInUse) {
			t.Errorf("its error: %v", err)
		}
	})
}
