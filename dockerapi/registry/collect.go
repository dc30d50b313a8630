package registry

import (
	"context"
	"errors"
	"fmt"
	"path"
	"regexp"
	"strings"
	"sync"
	"time"

	"github.com/distribution/distribution/v3/registry/storage"
	storagedriver "github.com/distribution/distribution/v3/registry/storage/driver"
	"github.com/opencontainers/go-digest"
)

// A Collection is what Collect has done.
type Collection struct {
	Blobs int
	Bytes int64 // of the blobs
	Links int   // by which repositories had blobs that none of their images has
}

// collectPatience is how long Collect waits for a moment when nobody makes anything refer to blobs.
const collectPatience = 10 * time.Minute

// Collect frees the space of blobs that nothing refers to.
//
// What docker pull, load and push are about to refer to must not go. So everything is left alone that is younger than Grace: a blob, the link by which a repository
// has it, an upload. And what makes something refer to old blobs, pushes of manifests and links from other images, waits while Collect marks and sweeps. That holds for
// this process; of several servers of one storage, one collects, and Grace covers the others but for a push that refers, at the very moment, to a blob of its own that
// no image has had for as long: it is told that the blob is not there, and sends it again.
func (r *Registry) Collect(ctx context.Context) (c Collection, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	limit := time.Now().Add(collectPatience)
	for !r.gate.TryLock() { // Lock would hold up all others behind a slow one
		if time.Now().After(limit) {
			return c, errorf(ErrUnavailable, "collect garbage: pushes have been under way all the time; try again")
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
			return c, context.Cause(ctx)
		}
	}
	defer r.gate.Unlock()
	defer func() {
		if err != nil {
			err = fmt.Errorf("collect garbage: %w", err)
		}
	}()
	if _, err := r.driver.Stat(ctx, repositoriesPath); isAbsent(err) {
		return c, nil
	}
	old := time.Now().Add(-r.Grace)
	// A layer may be on its way for long, and an interrupted pull goes on with what it has.
	abandoned := time.Now().Add(-uploadGraces * r.Grace)
	if _, errs := storage.PurgeUploads(ctx, r.driver, abandoned, true); len(errs) > 0 {
		return c, errors.Join(errs...)
	}
	if err := r.sweepMarks(ctx, abandoned); err != nil {
		return c, err
	}
	marked, err := r.mark(ctx)
	if err != nil {
		return c, err
	}
	linked, err := r.sweepLinks(ctx, marked, old, &c)
	if err != nil {
		return c, err
	}
	return c, r.sweepBlobs(ctx, linked, old, &c)
}

// uploadGraces is how many times Grace an upload may take.
const uploadGraces = 7

// sweepMarks forgets which uploads have the beginnings of layers, as the uploads are gone.
func (r *Registry) sweepMarks(ctx context.Context, old time.Time) error {
	var gone []string
	err := r.driver.Walk(ctx, pullsPath, func(f storagedriver.FileInfo) error {
		if !f.IsDir() && f.ModTime().Before(old) {
			gone = append(gone, f.Path())
		}
		return nil
	})
	if err != nil && !isAbsent(err) {
		return err
	}
	return r.remove(ctx, gone)
}

// A marks is what the repositories' manifests refer to: repository → blob.
type marks map[string]map[digest.Digest]bool

func (r *Registry) mark(ctx context.Context) (marks, error) {
	all := marks{}
	var mu sync.Mutex
	var repos []string
	err := r.walk(ctx, "", func(_ context.Context, repo string) error {
		mu.Lock()
		defer mu.Unlock()
		repos = append(repos, repo)
		return nil
	})
	if err != nil {
		return nil, err
	}
	for _, repo := range repos {
		h := &holding{repo: repo}
		if err := r.read(ctx, h); err != nil {
			return nil, err
		}
		blobs := map[digest.Digest]bool{}
		all[repo] = blobs
		for _, d := range h.revisions {
			blobs[d] = true
			m, err := r.manifest(ctx, repo, d)
			if isAbsent(err) { // removed by another server just now
				continue
			}
			if err != nil { // what can't be understood is somebody's: nothing is removed on a guess
				return nil, fmt.Errorf("repository %s: %w", repo, err)
			}
			if m.Config.Digest != "" {
				blobs[m.Config.Digest] = true
			}
			for _, l := range m.Layers {
				blobs[l.Digest] = true
			}
		}
	}
	return all, nil
}

// sweepLinks removes the old links to blobs that the repository's manifests don't refer to, and returns all blobs that are still referred to or linked.
func (r *Registry) sweepLinks(ctx context.Context, marked marks, old time.Time, c *Collection) (map[digest.Digest]bool, error) {
	linked := map[digest.Digest]bool{}
	for _, blobs := range marked {
		for d := range blobs {
			linked[d] = true
		}
	}
	var gone, left []string
	err := r.driver.Walk(ctx, repositoriesPath, func(f storagedriver.FileInfo) error {
		p := strings.TrimPrefix(f.Path(), repositoriesPath+"/")
		repo, below, ok := strings.Cut(p, "/_layers/")
		if f.IsDir() {
			if path.Base(f.Path()) == "_uploads" {
				return storagedriver.ErrSkipDir
			}
			return nil
		}
		if isLeftover(f, old) {
			left = append(left, f.Path())
			return nil
		}
		if !ok {
			return nil
		}
		parts := strings.Split(below, "/")
		if len(parts) != 3 || parts[2] != "link" {
			return nil
		}
		d := digest.NewDigestFromEncoded(digest.Algorithm(parts[0]), parts[1])
		if marked[repo][d] {
			return nil
		}
		if f.ModTime().After(old) {
			linked[d] = true
			return nil
		}
		gone = append(gone, path.Dir(f.Path()))
		return nil
	})
	if err != nil && !isAbsent(err) {
		return nil, err
	}
	for _, p := range gone {
		if err := r.driver.Delete(ctx, p); err != nil && !isAbsent(err) {
			return nil, err
		}
		c.Links++
	}
	return linked, r.remove(ctx, left)
}

// leftover is what distribution's driver writes before it renames it: a process that is killed leaves it.
var leftover = regexp.MustCompile(`\.[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\.tmp$`)

func isLeftover(f storagedriver.FileInfo, old time.Time) bool {
	return f.ModTime().Before(old) && leftover.MatchString(f.Path())
}

// remove removes files, some of which may be gone.
func (r *Registry) remove(ctx context.Context, paths []string) error {
	for _, p := range paths {
		if err := r.driver.Delete(ctx, p); err != nil && !isAbsent(err) {
			return err
		}
	}
	return nil
}

func (r *Registry) sweepBlobs(ctx context.Context, linked map[digest.Digest]bool, old time.Time, c *Collection) error {
	type blob struct {
		digest digest.Digest
		size   int64
	}
	var gone []blob
	var left []string
	err := r.driver.Walk(ctx, blobsPath, func(f storagedriver.FileInfo) error {
		if !f.IsDir() && isLeftover(f, old) {
			left = append(left, f.Path())
		}
		if f.IsDir() || path.Base(f.Path()) != "data" {
			return nil
		}
		folder := path.Dir(f.Path())
		d := digest.NewDigestFromEncoded(digest.Algorithm(path.Base(path.Dir(path.Dir(folder)))), path.Base(folder))
		if !linked[d] && f.ModTime().Before(old) && d.Validate() == nil {
			gone = append(gone, blob{d, f.Size()})
		}
		return nil
	})
	if err != nil && !isAbsent(err) {
		return err
	}
	vacuum := storage.NewVacuum(ctx, r.driver)
	for _, b := range gone {
		if err := vacuum.RemoveBlob(b.digest.String()); err != nil && !isAbsent(err) {
			return err
		}
		r.cache.facts.Remove(b.digest)
		if b.digest.Algorithm() == digest.SHA256 {
			if err := r.driver.Delete(ctx, factPath(b.digest)); err != nil && !isAbsent(err) {
				return err
			}
		}
		c.Blobs++
		c.Bytes += b.size
	}
	return r.remove(ctx, left)
}
