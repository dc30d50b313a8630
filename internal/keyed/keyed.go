// Package keyed has a lock for each of any number of keys. It imports nothing of the product.
package keyed

import (
	"context"
	"sync"
)

// A Lock for each key. The zero value is ready.
type Lock struct {
	mu   sync.Mutex
	held map[string]*holder
}

type holder struct {
	token chan struct{} // holds one while nobody holds the lock
	users int           // who hold or wait for it
}

// Lock waits for the key until ctx ends.
func (k *Lock) Lock(ctx context.Context, key string) (unlock func(), err error) {
	k.mu.Lock()
	if k.held == nil {
		k.held = map[string]*holder{}
	}
	h := k.held[key]
	if h == nil {
		h = &holder{token: make(chan struct{}, 1)}
		h.token <- struct{}{}
		k.held[key] = h
	}
	h.users++
	k.mu.Unlock()

	leave := func() {
		k.mu.Lock()
		if h.users--; h.users == 0 {
			delete(k.held, key)
		}
		k.mu.Unlock()
	}
	select {
	case <-h.token:
		return func() { h.token <- struct{}{}; leave() }, nil
	case <-ctx.Done():
		leave()
		return nil, context.Cause(ctx)
	}
}
