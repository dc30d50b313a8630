// Package snapshots is how the filer's protocols come to the snapshots of what they serve. It knows directories, not volumes, and imports nothing of the filer.
package snapshots

import (
	"fmt"
	"io/fs"
	"os"
	"slices"
	"sync"
	"time"
)

// Dir is where clients see the snapshots: a directory in the root of what is served, which no listing of that has.
const Dir = ".snapshots"

// A Snapshot has a name, by which clients see it. One that is taken at another time is another one.
type Snapshot struct {
	Name  string
	Taken time.Time
}

// A Source has former states of what is served. They may be other ones at any time.
type Source struct {
	List func() ([]Snapshot, error)

	// Open opens the root directory of one, through a mount of its own that nothing can be written through and nothing above which can be reached. fs.ErrNotExist
	// is one that is not there.
	Open func(name string) (*os.Root, error)

	// Mount mounts one so at a path, until it is unmounted there.
	Mount func(name, path string) error
}

// idleAfter is when a snapshot that nobody looks at any more is closed: one that is deleted takes room until then.
const idleAfter = time.Minute

// Opened are a source's snapshots as far as somebody looks at them, or has just done so.
type Opened struct {
	*Source

	mu  sync.Mutex
	all map[string]*opened
}

type opened struct {
	Snapshot
	root  *os.Root
	users int
	idle  *time.Timer // nil before it is idle
}

// Open opens a source's snapshots.
func Open(s *Source) *Opened { return &Opened{Source: s, all: map[string]*opened{}} }

// Enter opens the root of one, which stays open until leave is called. fs.ErrNotExist is one that is not there.
func (o *Opened) Enter(name string) (root *os.Root, leave func(), err error) {
	all, err := o.List()
	if err != nil {
		return nil, nil, err
	}
	i := slices.IndexFunc(all, func(s Snapshot) bool { return s.Name == name })
	if i < 0 {
		return nil, nil, &fs.PathError{Op: "open", Path: Dir + "/" + name, Err: fs.ErrNotExist}
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	is := o.all[name]
	if is != nil && !is.Taken.Equal(all[i].Taken) { // it has been deleted, and taken anew
		delete(o.all, name)
		is.closeUnused()
		is = nil
	}
	if is == nil {
		is = &opened{Snapshot: all[i]}
		if is.root, err = o.Source.Open(name); err != nil {
			return nil, nil, fmt.Errorf("snapshot %s: %w", name, err)
		}
		o.all[name] = is
	}
	is.users++
	return is.root, func() { o.leave(is) }, nil
}

func (o *Opened) leave(is *opened) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if is.users--; is.users > 0 {
		return
	}
	if o.all[is.Name] != is {
		is.closeUnused()
		return
	}
	if is.idle != nil {
		is.idle.Stop()
	}
	is.idle = time.AfterFunc(idleAfter, func() {
		o.mu.Lock()
		defer o.mu.Unlock()
		if o.all[is.Name] == is && is.users == 0 {
			delete(o.all, is.Name)
			is.closeUnused()
		}
	})
}

// closeUnused closes what nobody looks at. Its Opened is locked.
func (is *opened) closeUnused() {
	if is.idle != nil {
		is.idle.Stop()
	}
	if is.users == 0 {
		is.root.Close()
	}
}

// Close closes all that nobody looks at now, and the others when that ends. Nothing is entered any more.
func (o *Opened) Close() {
	if o == nil {
		return
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	for name, is := range o.all {
		delete(o.all, name)
		is.closeUnused()
	}
}
