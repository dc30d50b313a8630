// Package stalled ends HTTP transfers of which nothing comes any more.
package stalled

import (
	"context"
	"errors"
	"io"
	"sync"
	"time"
)

// Body is an answer's body that ends when nothing has come for so long: its request is canceled with cause, which Read then returns. A reader that is slow
// itself is not the other side's fault. ctx is the request's, and cancel what ends it; Close calls that.
func Body(ctx context.Context, cancel context.CancelCauseFunc, body io.ReadCloser, patience time.Duration, cause error) io.ReadCloser {
	b := &idleBody{ReadCloser: body, ctx: ctx, cancel: cancel, patience: patience, cause: cause}
	b.timer = time.AfterFunc(patience, func() { cancel(cause) })
	b.timer.Stop()
	return b
}

type idleBody struct {
	io.ReadCloser
	ctx      context.Context // of the request that the body belongs to
	cancel   context.CancelCauseFunc
	patience time.Duration
	cause    error
	timer    *time.Timer
	once     sync.Once
}

func (b *idleBody) Read(p []byte) (int, error) {
	b.timer.Reset(b.patience)
	n, err := b.ReadCloser.Read(p)
	b.timer.Stop()
	if err != nil && err != io.EOF && errors.Is(context.Cause(b.ctx), b.cause) {
		err = b.cause
	}
	return n, err
}

func (b *idleBody) Close() error {
	b.once.Do(func() {
		b.timer.Stop()
		b.cancel(nil)
	})
	return b.ReadCloser.Close()
}
