package image

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
)

// Pull returns the image that ref names, with all its layers in the cache:
//
//	debian:12, host:5000/team/app@sha256:…   a registry's image
//	docker-daemon:NAME[:TAG]                 an image of the docker daemon
//	docker-archive:FILE[:NAME]               a file of `docker save`, compressed or not
//	oci:PATH[:TAG]                           an OCI image layout, a directory or a tar
//
// A registry reference that is cached is returned without asking anyone, unless Force is set or it has an owner; the other sources are local
// and asked each time. A layer that is in the cache is never fetched again, wherever it comes from, but by who does not own it yet.
func (s *Store) Pull(ctx context.Context, ref string, o PullOptions) (*Image, error) {
	o, err := o.withDefaults()
	if err != nil {
		return nil, err
	}
	r, err := parseReference(ref, o.Insecure)
	if err != nil {
		return nil, err
	}
	if r.kind == "" && !o.Force {
		if img, err := s.cached(ctx, r.String(), o.Platform); err == nil && !img.Private {
			return img, nil
		}
	}
	img, err := s.pull(ctx, r, o)
	if err != nil {
		return nil, fmt.Errorf("pull %s: %w", ref, err)
	}
	return img, nil
}

func (s *Store) pull(ctx context.Context, ref reference, o PullOptions) (img *Image, err error) {
	x, err := s.begin(ctx)
	if err != nil {
		return nil, spaceError(err, s.root)
	}
	defer func() { err = errors.Join(err, x.end()) }()

	src, err := s.source(ctx, ref, o, x)
	if err != nil {
		return nil, err
	}
	if d, ok := src.(*daemonSource); ok {
		id, err := d.id(ctx)
		if err != nil {
			return nil, err
		}
		if img, err := s.cached(ctx, ref.String(), o.Platform); err == nil && (img.ID == id || img.Digest == id) && !o.Force {
			return img, nil
		}
	}
	res, err := src.resolve(ctx, o.Platform)
	if err != nil {
		return nil, err
	}
	config, err := res.parse(o.Platform)
	if err != nil {
		return nil, err
	}

	rec := imageRecord{
		Version: recordVersion, Reference: ref.String(), Platform: o.Platform,
		Digest: res.digest, ID: res.id, Config: res.config, Pulled: time.Now().UTC().Truncate(time.Second), Private: o.Owner != "",
	}
	for _, d := range config.RootFS.DiffIDs {
		rec.Layers = append(rec.Layers, d.String())
	}
	// From here on GC leaves these layers alone, those that are there and those that come.
	lock, err := s.shared(ctx)
	if err != nil {
		return nil, err
	}
	err = writeJSON(x.dir, filepath.Join(x.dir, sessionLayers), rec.Layers)
	lock.release()
	if err != nil {
		return nil, spaceError(err, s.root)
	}
	if err := s.layers(ctx, res.blobs, o, x); err != nil {
		return nil, err
	}
	if err := writeJSON(x.dir, s.imagePath(rec.Reference, rec.Platform), rec); err != nil {
		return nil, spaceError(err, s.root)
	}
	return s.image(&rec, time.Now())
}

func (s *Store) source(ctx context.Context, ref reference, o PullOptions, x *session) (source, error) {
	switch ref.kind {
	case "":
		return registrySource{ref.repo, o, x}, nil
	case "docker-daemon":
		return newDaemonSource(ref.name, x, o.MaxImageSize)
	}
	fi, err := os.Stat(ref.file)
	if err != nil {
		if isNotExist(err) {
			return nil, fmt.Errorf("%w: %s does not exist", ErrNotFound, ref.file)
		}
		return nil, err
	}
	if fi.IsDir() {
		if ref.kind != "oci" {
			return nil, fmt.Errorf("%s is a directory: an OCI layout is named oci:%s", ref.file, ref.file)
		}
		root, err := os.OpenRoot(ref.file)
		if err != nil {
			return nil, err
		}
		x.closers = append(x.closers, root)
		return layoutSource{root.FS(), ref.name}, nil
	}
	a, err := openArchive(ctx, ref.file, x, o.MaxImageSize)
	if err != nil {
		return nil, err
	}
	if ref.kind == "oci" {
		return layoutSource{a, ref.name}, nil
	}
	return archiveSource{a, ref.name}, nil
}

// layers brings all blobs into the cache, several at once, each only once.
func (s *Store) layers(ctx context.Context, blobs []blob, o PullOptions, x *session) error {
	var budget atomic.Int64
	budget.Store(o.MaxImageSize)
	report := reporter{fn: o.Progress, count: len(blobs)}
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(o.Jobs)
	seen := make(map[string]bool)
	for i, b := range blobs {
		if seen[b.diffID] {
			continue
		}
		seen[b.diffID] = true
		j := &job{
			store: s, session: x, blob: b, owner: o.Owner, maxLayer: o.MaxLayerSize, budget: &budget,
			progress: report.layer(i, b.diffID),
		}
		g.Go(func() error {
			if _, err := j.ensure(ctx); err != nil {
				name := b.digest
				if name == "" {
					name = b.diffID
				}
				return fmt.Errorf("layer %d of %d (%s): %w", i+1, len(blobs), short(name), err)
			}
			return nil
		})
	}
	return g.Wait()
}

// A reporter passes progress on, one call at a time and not more often than anyone can see.
type reporter struct {
	fn    func(Progress)
	count int
	mu    sync.Mutex
}

const reportEvery = 50 * time.Millisecond

func (r *reporter) layer(index int, diffID string) func(Phase, int64, int64) {
	if r.fn == nil {
		return func(Phase, int64, int64) {}
	}
	var last Phase
	var when time.Time
	return func(phase Phase, done, total int64) {
		now := time.Now()
		if phase == last && now.Sub(when) < reportEvery {
			return
		}
		last, when = phase, now
		r.mu.Lock()
		defer r.mu.Unlock()
		r.fn(Progress{Layer: diffID, Index: index, Count: r.count, Phase: phase, Done: done, Total: total})
	}
}
