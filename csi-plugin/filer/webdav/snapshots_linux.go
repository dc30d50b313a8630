package webdav

import (
	"cmp"
	"context"
	"io/fs"
	"net/http"
	"path"
	"slices"
	"strings"
	"time"

	"golang.org/x/net/webdav"

	"github.com/cradlestack/cradlestack/csi-plugin/filer/snapshots"
)

// A place is where what a request names is read: in the volume, or in a snapshot of it.
type place struct {
	*volume
	prefix string // of its URLs
	path   string // in it
}

// former says whether a path is that of the snapshots, or below it.
func (v *volume) former(name string) bool {
	return v.snapshots != nil && below(path.Clean("/"+name), "/"+snapshots.Dir)
}

// formerMethods are those that change nothing where they are used.
var formerMethods = []string{http.MethodOptions, http.MethodGet, http.MethodHead, "PROPFIND", "COPY"}

// enter has a request read in the snapshot that its path names, which stays open until leave is called. Of the directory of all there is no place.
func (q *request) enter() (leave func(), err error) {
	if !slices.Contains(formerMethods, q.r.Method) {
		return nil, refuse(http.StatusForbidden, "%s: snapshots stay as they are; copy out of them what is to be changed", q.path)
	}
	q.from = place{}
	name, inner, _ := strings.Cut(strings.TrimPrefix(q.path[1:], snapshots.Dir+"/"), "/")
	if q.path == "/"+snapshots.Dir || q.r.Method == http.MethodOptions {
		return func() {}, nil
	}
	root, leave, err := q.snapshots.Enter(name)
	if err != nil {
		return nil, err
	}
	q.from = place{&volume{root: root}, q.prefix() + "/" + snapshots.Dir + "/" + name, path.Clean("/" + inner)}
	return leave, nil
}

// listSnapshots lists the directory that all are in.
func (q *request) listSnapshots() error {
	all, err := q.snapshots.List()
	if err != nil {
		return err
	}
	return q.list(shelf(all), q.prefix()+"/"+snapshots.Dir, q.prefix()+"/"+snapshots.Dir+"/")
}

// A shelf is that directory as package webdav lists it, for which no snapshot is opened.
type shelf []snapshots.Snapshot

func (shelf) Mkdir(context.Context, string, fs.FileMode) error { return errNotHere }
func (shelf) RemoveAll(context.Context, string) error          { return errNotHere }
func (shelf) Rename(context.Context, string, string) error     { return errNotHere }

func (s shelf) Stat(_ context.Context, name string) (fs.FileInfo, error) {
	if name == "/" {
		newest := snapshots.Snapshot{Name: snapshots.Dir}
		for _, one := range s {
			if one.Taken.After(newest.Taken) {
				newest.Taken = one.Taken
			}
		}
		return label{newest}, nil
	}
	for _, one := range s {
		if "/"+one.Name == name {
			return label{one}, nil
		}
	}
	return nil, fs.ErrNotExist
}

func (s shelf) OpenFile(ctx context.Context, name string, _ int, _ fs.FileMode) (webdav.File, error) {
	fi, err := s.Stat(ctx, name)
	if err != nil {
		return nil, err
	}
	return shelved{info: fi, shelf: s}, nil
}

// A shelved directory is one of a shelf, or the shelf.
type shelved struct {
	webdav.File // has no content
	info        fs.FileInfo
	shelf       shelf
}

func (shelved) Close() error                 { return nil }
func (d shelved) Stat() (fs.FileInfo, error) { return d.info, nil }

func (d shelved) Readdir(int) (all []fs.FileInfo, err error) {
	for _, s := range slices.SortedFunc(slices.Values(d.shelf), func(a, b snapshots.Snapshot) int { return cmp.Compare(a.Name, b.Name) }) {
		all = append(all, label{s})
	}
	return all, nil
}

// A label is what is told of a snapshot that is not opened.
type label struct{ is snapshots.Snapshot }

func (l label) Name() string       { return l.is.Name }
func (l label) ModTime() time.Time { return l.is.Taken }
func (label) Size() int64          { return 0 }
func (label) Mode() fs.FileMode    { return fs.ModeDir | 0o555 }
func (label) IsDir() bool          { return true }
func (label) Sys() any             { return nil }
