package gateway

import (
	"container/list"
	"context"
	"net"
	"net/http"
	"sync"
)

// A door lets so many connections in. When there are more, the one goes that has been here longest without a request which has shown that it may be: who shows
// nothing, or takes his time, keeps nobody out.
type door struct {
	net.Listener
	max int

	mu      sync.Mutex
	all     int
	waiting list.List // of *visitor, the longest first
	closing sync.WaitGroup
}

// A visitor is a connection.
type visitor struct {
	net.Conn
	door *door

	place *list.Element // among those that wait; nil of one whose request is admitted, or that has gone
	gone  bool
}

// Accept is net.Listener's.
func (d *door) Accept() (net.Conn, error) {
	for {
		conn, err := d.Listener.Accept()
		if err != nil {
			return nil, err
		}
		v := &visitor{Conn: conn, door: d}
		if d.enter(v) {
			return v, nil
		}
		_ = conn.Close()
	}
}

func (d *door) enter(v *visitor) bool {
	d.mu.Lock()
	if d.all >= d.max {
		longest := d.waiting.Front()
		if longest == nil {
			d.mu.Unlock()
			return false
		}
		is := longest.Value.(*visitor)
		is.leave()
		d.closing.Go(func() { is.Conn.Close() }) // over TLS it says goodbye, which takes up to five seconds
	}
	d.all++
	v.place = d.waiting.PushBack(v)
	d.mu.Unlock()
	return true
}

// leave takes it out of the count. The door is locked.
func (v *visitor) leave() {
	if v.gone {
		return
	}
	v.gone = true
	v.door.all--
	v.work()
}

// work has it wait no longer. The door is locked.
func (v *visitor) work() {
	if v.place != nil {
		v.door.waiting.Remove(v.place)
		v.place = nil
	}
}

// Close is net.Conn's.
func (v *visitor) Close() error {
	v.door.mu.Lock()
	v.leave()
	v.door.mu.Unlock()
	return v.Conn.Close()
}

func (v *visitor) admitted() {
	v.door.mu.Lock()
	defer v.door.mu.Unlock()
	v.work()
}

// rests waits for the next request.
func (v *visitor) rests() {
	v.door.mu.Lock()
	defer v.door.mu.Unlock()
	if v.place == nil && !v.gone {
		v.place = v.door.waiting.PushBack(v)
	}
}

type visitorKey struct{}

func remember(ctx context.Context, conn net.Conn) context.Context {
	return context.WithValue(ctx, visitorKey{}, conn)
}

// Admitted says that a request has shown that it may be here.
func Admitted(r *http.Request) {
	if v, ok := r.Context().Value(visitorKey{}).(*visitor); ok {
		v.admitted()
	}
}

// visit lets a connection wait again after a request.
func visit(handler http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if v, ok := r.Context().Value(visitorKey{}).(*visitor); ok {
			defer v.rests()
		}
		handler.ServeHTTP(w, r)
	})
}
