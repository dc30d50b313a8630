package registry

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"path"
	"slices"
	"time"

	"github.com/distribution/distribution/v3/registry/storage"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
)

func sortedKeys[K cmp.Ordered, V any](m map[K]V) []K { return slices.Sorted(maps.Keys(m)) }

// Tag gives an image a name. What the name meant stays, without it.
func (s *Images) Tag(ctx context.Context, i *Image, n reference.NamedTagged) error {
	repo, err := repository(s.root, n)
	if err != nil {
		return err
	}
	stored, err := s.stored(ctx, i)
	if err != nil {
		return err
	}
	for _, l := range i.Layers {
		if err := s.link(ctx, i.repo, repo.Name(), l.Digest); err != nil {
			return err
		}
	}
	if err := s.link(ctx, i.repo, repo.Name(), i.ID); err != nil {
		return err
	}
	return s.putManifest(ctx, repo.Name(), i.Manifest.MediaType, stored.manifest, n.Tag())
}

func (v *view) holding(repo string) *holding {
	for _, h := range v.holdings {
		if h.repo == repo {
			return h
		}
	}
	return nil
}

// A Use is a container that is made from an image.
type Use struct {
	Image     digest.Digest
	Container string // its id
	Running   bool
}

// A Removed is a line of docker rmi: one of them is set.
type Removed struct{ Untagged, Deleted string }

// Remove takes a name from an image, and removes it where that was the last one, or where its id was given. It refuses what docker does: an id of an image with
// several names, unless force, and an image of a container. Forced, an image of containers loses its names, but stays until they are removed, as another node may
// have to fetch it to start them; by the id of one that runs nothing of it goes.
func (s *Images) Remove(ctx context.Context, ref string, force bool, uses []Use) ([]Removed, error) {
	found, n, err := s.find(ctx, ref)
	if err != nil {
		return nil, err
	}
	v, err := s.view(ctx)
	if err != nil {
		return nil, err
	}
	i := v.images[found.ID]
	if i == nil { // removed in between
		return nil, errorf(ErrNotFound, "No such image: %s", ref)
	}
	use := using(uses, i.ID)
	if n == nil {
		if use != nil && (use.Running || !force) {
			return nil, conflict(i, use)
		}
		if len(i.Tags) > 1 || !i.isSingle() {
			if !force {
				return nil, errorf(ErrConflict, "conflict: unable to delete %s (must be forced) - image is referenced in multiple repositories", short(i.ID))
			}
		}
		return s.drop(ctx, v, i, i.names(), use != nil)
	}
	if c, ok := n.(reference.Canonical); ok && !slices.ContainsFunc(i.Digests, func(d reference.Canonical) bool { return d.String() == c.String() }) {
		return nil, errorf(ErrNotFound, "No such image: %s", reference.FamiliarString(n))
	}
	names := []reference.Named{n}
	if _, ok := n.(reference.Tagged); ok && !slices.ContainsFunc(i.Tags, func(t reference.NamedTagged) bool { return t.Name() == n.Name() && t.String() != n.String() }) {
		// The digests of a name go with its last tag.
		for _, d := range i.Digests {
			if d.Name() == n.Name() {
				names = append(names, d)
			}
		}
	}
	last := len(names) >= len(i.Tags)+len(i.Digests)
	if last && use != nil && !force {
		return nil, errorf(ErrConflict, "conflict: unable to remove repository reference %q (must force) - container %s is using its referenced image %s",
			ref, shortID(use.Container), short(i.ID))
	}
	return s.drop(ctx, v, i, names, use != nil || !last)
}

func conflict(i *Image, u *Use) error {
	if u.Running {
		return errorf(ErrConflict, "conflict: unable to delete %s (cannot be forced) - image is being used by running container %s", short(i.ID), shortID(u.Container))
	}
	return errorf(ErrConflict, "conflict: unable to delete %s (must be forced) - image is being used by stopped container %s", short(i.ID), shortID(u.Container))
}

// names are all that refers to the image.
func (i *Image) names() []reference.Named {
	var all []reference.Named
	for _, t := range i.Tags {
		all = append(all, t)
	}
	for _, d := range i.Digests {
		all = append(all, d)
	}
	return all
}

// isSingle tells whether all names are of one repository.
func (i *Image) isSingle() bool {
	all := i.names()
	return !slices.ContainsFunc(all, func(n reference.Named) bool { return n.Name() != all[0].Name() })
}

func shortID(s string) string { return s[:min(12, len(s))] }

// using is a container that is made from the image, a running one first.
func using(uses []Use, id digest.Digest) *Use {
	var found *Use
	for _, u := range uses {
		if u.Image == id && (found == nil || u.Running) {
			found = &u
		}
	}
	return found
}

// drop takes names from an image, and unless it is kept, removes it.
func (s *Images) drop(ctx context.Context, v *view, i *Image, names []reference.Named, keep bool) ([]Removed, error) {
	if keep && len(names) == 0 {
		return nil, errorf(ErrConflict, "conflict: unable to delete %s (cannot be forced) - remove the containers that are made from it first", short(i.ID))
	}
	var removed []Removed
	for _, n := range names {
		if err := s.unname(ctx, n); err != nil {
			return removed, err
		}
		removed = append(removed, Removed{Untagged: reference.FamiliarString(n)})
	}
	if keep {
		return removed, nil
	}
	gone := v.onlyHere(i)
	for _, h := range v.holdings {
		for d, id := range v.of[h.repo] {
			if id != i.ID {
				continue
			}
			if err := s.forget(ctx, v, h, d); err != nil {
				return removed, err
			}
		}
	}
	removed = append(removed, Removed{Deleted: i.ID.String()})
	for _, c := range gone {
		removed = append(removed, Removed{Deleted: c.String()})
	}
	return removed, nil
}

// onlyHere are the chain ids, from the top down, of the layers that no other image of the namespace has: what docker calls deleted.
func (v *view) onlyHere(i *Image) []digest.Digest {
	others := map[digest.Digest]bool{}
	for _, o := range v.images {
		if o.ID != i.ID {
			for _, c := range o.chain() {
				others[c] = true
			}
		}
	}
	chain := slices.DeleteFunc(i.chain(), func(c digest.Digest) bool { return others[c] })
	slices.Reverse(chain)
	return chain
}

// chain are the chain ids of the layers (image-spec config.md), from the bottom up.
func (i *Image) chain() []digest.Digest {
	ids := make([]digest.Digest, len(i.Layers))
	for n, l := range i.Layers {
		ids[n] = l.DiffID
	}
	return identity.ChainIDs(ids)
}

// unname removes a name. The manifest that it means stays.
func (s *Images) unname(ctx context.Context, n reference.Named) error {
	repo, err := repository(s.root, n)
	if err != nil {
		return err
	}
	folder := path.Join(repositoriesPath, repo.Name(), "_manifests")
	switch n := n.(type) {
	case reference.Canonical:
		folder = path.Join(folder, "revisions/sha256", n.Digest().Encoded(), knownMark)
	case reference.NamedTagged:
		folder = path.Join(folder, "tags", n.Tag())
	}
	s.gate.RLock()
	defer s.gate.RUnlock()
	if err := s.driver.Delete(ctx, folder); err != nil && !isAbsent(err) {
		return fmt.Errorf("remove %s: %w", reference.FamiliarString(n), err)
	}
	return nil
}

// forget removes a manifest from a repository, and with an index the manifests that are there only because of it.
func (s *Images) forget(ctx context.Context, v *view, h *holding, d digest.Digest) error {
	gone := []digest.Digest{d}
	if m, err := s.manifest(ctx, h.repo, d); err == nil && m.isIndex() {
		kept := map[digest.Digest]bool{}
		for other := range v.of[h.repo] {
			kept[other] = true
			if o, err := s.manifest(ctx, h.repo, other); err == nil && other != d {
				for _, e := range o.Entries {
					kept[e.Digest] = true
				}
			}
		}
		for _, e := range m.Entries {
			if !kept[e.Digest] {
				gone = append(gone, e.Digest)
			}
		}
	}
	s.gate.RLock()
	defer s.gate.RUnlock()
	vacuum := storage.NewVacuum(ctx, s.driver)
	for _, d := range gone {
		if err := vacuum.RemoveManifest(h.repo, d, nil); err != nil && !isAbsent(err) {
			return fmt.Errorf("remove manifest %s: %w", d, err)
		}
	}
	return nil
}

// A PruneFilter says which images Prune removes.
type PruneFilter struct {
	All   bool              // those with names too
	Until time.Time         // created before; zero is any time
	Match func(*Image) bool // nil is any
}

// A Pruned is what Prune has removed.
type Pruned struct {
	Removed []Removed
	Space   int64 // of the layers that no image of the namespace has any more, unpacked
}

// Prune removes images that no container is made from.
func (s *Images) Prune(ctx context.Context, f PruneFilter, uses []Use) (Pruned, error) {
	var p Pruned
	v, err := s.view(ctx)
	if err != nil {
		return p, err
	}
	before := v.layers()
	for _, i := range v.sorted() {
		if !f.All && len(i.Tags) > 0 || using(uses, i.ID) != nil || !f.Until.IsZero() && !i.created().Before(f.Until) || f.Match != nil && !f.Match(i) {
			continue
		}
		removed, err := s.drop(ctx, v, i, i.names(), false)
		p.Removed = append(p.Removed, removed...)
		if err != nil {
			return p, err
		}
		delete(v.images, i.ID)
	}
	after := v.layers()
	for d, l := range before {
		if _, ok := after[d]; !ok {
			if n, err := s.unpackedSize(ctx, l.repo, l.layer); err == nil {
				p.Space += n
			}
		}
	}
	return p, nil
}

// A place is a layer and a repository that has it.
type place struct {
	layer Layer
	repo  string
}

// layers are all of the namespace's, each once.
func (v *view) layers() map[digest.Digest]place {
	all := map[digest.Digest]place{}
	for _, i := range v.images {
		for _, l := range i.Layers {
			all[l.Digest] = place{l, i.repo}
		}
	}
	return all
}

// History is what docker history shows, the newest step first. Only the image's own step has an id, as the others are no images here.
type History struct {
	ID        string
	Created   time.Time
	CreatedBy string
	Comment   string
	Tags      []string
	Size      int64
}

// History reads an image's.
func (s *Images) History(ctx context.Context, i *Image) ([]History, error) {
	var all []History
	layers := i.Layers
	for _, h := range i.Config.History {
		item := History{ID: "<missing>", CreatedBy: h.CreatedBy, Comment: h.Comment}
		if h.Created != nil {
			item.Created = *h.Created
		}
		if !h.EmptyLayer {
			if len(layers) == 0 {
				return nil, errorf(ErrInvalid, "the history of image %s names more layers than it has", short(i.ID))
			}
			var err error
			if item.Size, err = s.unpackedSize(ctx, i.repo, layers[0]); err != nil {
				return nil, err
			}
			layers = layers[1:]
		}
		all = append(all, item)
	}
	slices.Reverse(all)
	if len(all) > 0 {
		all[0].ID = i.ID.String()
		for _, t := range i.Tags {
			all[0].Tags = append(all[0].Tags, reference.FamiliarString(t))
		}
	}
	return all, nil
}

// Usage is what docker system df shows of images.
type Usage struct {
	Layers int64 // bytes of all layers, each once
	Shared map[digest.Digest]int64
}

// Usage adds up the layers of images: what each shares with others, and what all take together.
func (s *Images) Usage(ctx context.Context, images []*Image) (Usage, error) {
	u := Usage{Shared: map[digest.Digest]int64{}}
	count := map[digest.Digest]int{}
	for _, i := range images {
		seen := map[digest.Digest]bool{}
		for _, l := range i.Layers {
			if !seen[l.Digest] {
				seen[l.Digest] = true
				count[l.Digest]++
			}
		}
	}
	counted := map[digest.Digest]bool{}
	for _, i := range images {
		for _, l := range i.Layers {
			n, err := s.unpackedSize(ctx, i.repo, l)
			if err != nil {
				return u, err
			}
			if count[l.Digest] > 1 {
				u.Shared[i.ID] += n
			}
			if !counted[l.Digest] {
				counted[l.Digest] = true
				u.Layers += n
			}
		}
	}
	return u, nil
}
