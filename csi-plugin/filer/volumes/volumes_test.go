package volumes

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cradlestack/cradlestack/csi-plugin/filer/api"
	"github.com/cradlestack/cradlestack/csi-plugin/volume"
)

// A call is repeated while no filer serves, for some time, and while it goes on, for as long as that takes; also where a host was lost before it has answered. What a filer
// has answered is the end of it.
func TestAsk(t *testing.T) {
	away, goesOn := fmt.Errorf("%w: nobody", api.ErrAway), fmt.Errorf("volume v: %w", api.ErrGoesOn)
	silent := errors.New("silent")
	for name, c := range map[string]struct {
		answers []error // the last one again and again
		limit   time.Duration
		want    error
		within  time.Duration
	}{
		"at once":                  {answers: []error{nil}},
		"not there":                {answers: []error{volume.ErrNotFound, nil}, want: volume.ErrNotFound},
		"storage is unavailable":   {answers: []error{volume.ErrUnavailable, nil}, want: volume.ErrUnavailable},
		"another serves soon":      {answers: []error{away, away, nil}, within: 2 * pause},
		"nobody serves":            {answers: []error{away}, want: volume.ErrUnavailable, within: patience + pause},
		"it takes long":            {answers: append(many(goesOn, 1000), nil), within: 1000 * pause},
		"nobody for long, at last": {answers: append(append(many(goesOn, 500), many(away, 400)...), nil), within: 900 * pause},
		"the host is lost":         {answers: []error{silent, away, nil}, within: attempt + 2*pause},
		"all hosts are":            {answers: []error{silent}, want: volume.ErrUnavailable, within: 3 * (attempt + pause)},
		"the caller has gone":      {answers: []error{away}, limit: time.Second, want: context.DeadlineExceeded, within: time.Second},
		"and it went on":           {answers: []error{goesOn}, limit: time.Second, want: volume.ErrUnavailable, within: time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx := t.Context()
				if c.limit > 0 {
					var cancel func()
					ctx, cancel = context.WithTimeout(ctx, c.limit)
					defer cancel()
				}
				began, calls := time.Now(), 0
				err := Open(api.Client{}).ask(ctx, func(ctx context.Context) error {
					err := c.answers[min(calls, len(c.answers)-1)]
					calls++
					if errors.Is(err, silent) {
						<-ctx.Done()
						return fmt.Errorf("filer: %w", ctx.Err())
					}
					return err
				})
				if !errors.Is(err, c.want) || time.Since(began) > c.within {
					t.Errorf("after %d calls in %v: %v", calls, time.Since(began), err)
				}
			})
		})
	}
}

func many(err error, n int) (all []error) {
	for range n {
		all = append(all, err)
	}
	return all
}
