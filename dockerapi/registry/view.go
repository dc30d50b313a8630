package registry

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/distribution/distribution/v3"
	storagedriver "github.com/distribution/distribution/v3/registry/storage/driver"
	"github.com/distribution/reference"
	lru "github.com/hashicorp/golang-lru/v2"
	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"
)

// Where distribution keeps what (registry/storage/paths.go): it has a format that it promises, but lists only all repositories of all namespaces.
const (
	repositoriesPath = "/docker/registry/v2/repositories"
	blobsPath        = "/docker/registry/v2/blobs"
)

// readers is how many small files are read at once: over S3 each takes a round trip.
const readers = 32

// Images are those of one namespace.
type Images struct {
	*Registry
	namespace string
	root      string
}

// Images returns a namespace's.
func (r *Registry) Images(namespace string) (*Images, error) {
	top, err := root(namespace)
	if err != nil {
		return nil, err
	}
	return &Images{r, namespace, top}, nil
}

// An Image is what docker shows as one: a configuration, with all that refers to it.
type Image struct {
	ID       digest.Digest           // of the configuration
	Tags     []reference.NamedTagged // that refer to it, sorted
	Digests  []reference.Canonical   // names with the digest of a manifest or index that refers to it, sorted
	Manifest ocispec.Descriptor      // of the platform
	Layers   []Layer                 // from the bottom up
	Config   dockerspec.DockerOCIImage
	Tagged   time.Time // when the newest tag was set; only from Inspect

	raw  []byte // the configuration, byte for byte
	repo string // that has the manifest and its blobs
}

// A Layer is one as the registry has it.
type Layer struct {
	ocispec.Descriptor
	DiffID digest.Digest // of the tar in it
}

// NodeReference is what a node pulls: the image and nothing that its name may mean later.
func (i *Image) NodeReference(host string) string {
	return host + "/" + i.repo + "@" + i.Manifest.Digest.String()
}

// WorkloadAudience is the audience that a task's workload identity must have for its node to pull the image.
func (i *Image) WorkloadAudience() string {
	_, below, _ := strings.Cut(i.repo, "/")
	return Service + "/" + below
}

// A manifest is what of one matters here. Of an index it has the entries.
type manifest struct {
	ocispec.Descriptor
	Config  ocispec.Descriptor
	Layers  []ocispec.Descriptor
	Entries []ocispec.Descriptor
}

func (m *manifest) isIndex() bool { return m.Entries != nil }

// A cache keeps what never changes, by digest. It holds nothing that another namespace could get at: it is asked only about digests that a repository
// is known to have.
type cache struct {
	manifests *lru.Cache[digest.Digest, *manifest]
	configs   *lru.Cache[digest.Digest, *config]
	facts     *lru.Cache[digest.Digest, fact]
}

type config struct {
	raw    []byte
	parsed dockerspec.DockerOCIImage
}

// maxCached is the size of what is kept; 2048 of them are enough for any list that people look at.
const maxCached = 64 << 10

func newCache() *cache {
	var c cache
	c.manifests, _ = lru.New[digest.Digest, *manifest](4096) // an error is a size of 0
	c.configs, _ = lru.New[digest.Digest, *config](2048)
	c.facts, _ = lru.New[digest.Digest, fact](1 << 16)
	return &c
}

// open is distribution's view of a repository.
func (r *Registry) open(ctx context.Context, repo string) (distribution.Repository, error) {
	name, err := reference.WithName(repo)
	if err != nil {
		return nil, errorf(ErrInvalid, "%v", err)
	}
	return r.store.Repository(ctx, name)
}

// isAbsent tells the errors by which storage says that something is not there.
func isAbsent(err error) bool {
	var path storagedriver.PathNotFoundError
	var revision distribution.ErrManifestUnknownRevision
	var tag distribution.ErrTagUnknown
	return errors.As(err, &path) || errors.As(err, &revision) || errors.As(err, &tag) || errors.Is(err, distribution.ErrBlobUnknown)
}

// manifest reads one that a repository has.
func (r *Registry) manifest(ctx context.Context, repo string, d digest.Digest) (*manifest, error) {
	opened, err := r.open(ctx, repo)
	if err != nil {
		return nil, err
	}
	manifests, err := opened.Manifests(ctx)
	if err != nil {
		return nil, err
	}
	if m, ok := r.cache.manifests.Get(d); ok {
		// What is cached may be another's: that this repository has it is asked each time.
		if ok, err := manifests.Exists(ctx, d); err != nil {
			return nil, err
		} else if !ok {
			return nil, distribution.ErrManifestUnknownRevision{Name: repo, Revision: d}
		}
		return m, nil
	}
	stored, err := manifests.Get(ctx, d)
	if err != nil {
		return nil, err
	}
	mediaType, data, err := stored.Payload()
	if err != nil {
		return nil, err
	}
	m, err := parseManifest(mediaType, data)
	if err != nil {
		return nil, fmt.Errorf("manifest %s: %w", d, err)
	}
	m.Digest = d
	if len(data) <= maxCached {
		r.cache.manifests.Add(d, m)
	}
	return m, nil
}

// parseManifest reads a manifest or an index. One that claims to be both is refused (CVE-2021-41190).
func parseManifest(mediaType string, data []byte) (*manifest, error) {
	var m struct {
		MediaType string               `json:"mediaType"`
		Config    *ocispec.Descriptor  `json:"config"`
		Layers    []ocispec.Descriptor `json:"layers"`
		Manifests []ocispec.Descriptor `json:"manifests"`
	}
	if err := json.Unmarshal(data, &m); err != nil {
		return nil, errorf(ErrInvalid, "it is no JSON of a manifest: %v", err)
	}
	switch {
	case (m.Config != nil || m.Layers != nil) && m.Manifests != nil:
		return nil, errorf(ErrInvalid, "it is both an index and a manifest")
	case m.Config == nil && m.Manifests == nil:
		return nil, errorf(ErrInvalid, "it names neither a configuration nor manifests")
	}
	result := &manifest{Descriptor: ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data))}, Layers: m.Layers, Entries: m.Manifests}
	if m.Config != nil {
		result.Config = *m.Config
	}
	for _, d := range slices.Concat([]ocispec.Descriptor{result.Config}, m.Layers, m.Manifests) {
		if d.Digest == "" && m.Config == nil {
			continue // an index has no configuration
		}
		if d.Digest.Validate() != nil || d.Digest.Algorithm() != digest.SHA256 || d.Size < 0 {
			return nil, errorf(ErrInvalid, "%.100q is no sha256 digest", d.Digest)
		}
	}
	return result, nil
}

// errNoImage is a manifest of something that no container runs.
var errNoImage = errors.New("no image")

// image reads what a manifest, or the platform's of an index, describes.
func (r *Registry) image(ctx context.Context, repo string, d digest.Digest) (*Image, error) {
	m, err := r.manifest(ctx, repo, d)
	if err != nil {
		return nil, err
	}
	if m.isIndex() {
		if m, err = r.entry(ctx, repo, m); err != nil {
			return nil, err
		}
	}
	switch m.Config.MediaType {
	case ocispec.MediaTypeImageConfig, mediaTypeDockerConfig:
	default:
		return nil, errNoImage
	}
	c, err := r.config(ctx, repo, m.Config.Digest)
	if err != nil {
		return nil, err
	}
	diffIDs := c.parsed.RootFS.DiffIDs
	if len(diffIDs) != len(m.Layers) {
		return nil, errNoImage
	}
	i := &Image{ID: m.Config.Digest, Manifest: m.Descriptor, Config: c.parsed, raw: c.raw, repo: repo}
	for n, l := range m.Layers {
		i.Layers = append(i.Layers, Layer{l, diffIDs[n]})
	}
	return i, nil
}

// entry is the manifest of an index that the nodes run; else the first that is there, as docker shows images of other platforms too.
func (r *Registry) entry(ctx context.Context, repo string, index *manifest) (*manifest, error) {
	var first *manifest
	for _, d := range index.Entries[:min(len(index.Entries), 64)] {
		m, err := r.manifest(ctx, repo, d.Digest)
		if isAbsent(err) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if m.isIndex() || d.Platform != nil && d.Platform.OS == "unknown" { // an attestation
			continue
		}
		if r.platform.matches(d.Platform) {
			return m, nil
		}
		if first == nil {
			first = m
		}
	}
	if first == nil {
		return nil, errNoImage
	}
	return first, nil
}

const maxConfig = 4 << 20 // distribution's own bound of a blob in memory

func (r *Registry) config(ctx context.Context, repo string, d digest.Digest) (*config, error) {
	if c, ok := r.cache.configs.Get(d); ok {
		return c, nil // its manifest is known to be the repository's
	}
	opened, err := r.open(ctx, repo)
	if err != nil {
		return nil, err
	}
	data, err := opened.Blobs(ctx).Get(ctx, d)
	if err != nil {
		return nil, fmt.Errorf("configuration %s: %w", d, err)
	}
	c := &config{raw: data}
	if err := json.Unmarshal(data, &c.parsed); err != nil {
		return nil, errNoImage
	}
	if len(data) <= maxCached {
		r.cache.configs.Add(d, c)
	}
	return c, nil
}

// A holding is a repository as it is at the moment.
type holding struct {
	repo      string
	name      reference.Named // nil for the images without a name
	tags      map[string]digest.Digest
	revisions []digest.Digest
	known     map[digest.Digest]bool // revisions that another registry has under the same name and digest
}

// knownMark is a file of ours in a revision's folder. Distribution removes it with the folder.
const knownMark = "known"

// markKnown notes that another registry has a manifest: its digest is shown then, as docker shows it after pull and push.
func (r *Registry) markKnown(ctx context.Context, repo string, d digest.Digest) error {
	return r.driver.PutContent(ctx, path.Join(repositoriesPath, repo, "_manifests/revisions/sha256", d.Encoded(), knownMark), []byte("1"))
}

// holdings lists the namespace's repositories.
func (s *Images) holdings(ctx context.Context) ([]*holding, error) {
	var mu sync.Mutex
	var found []*holding
	err := s.walk(ctx, s.root, func(ctx context.Context, repo string) error {
		h := &holding{repo: repo}
		below := strings.TrimPrefix(repo, s.root+"/")
		if below != dangling {
			var ok bool
			if h.name, ok = nameOf(s.root, below); !ok {
				return nil
			}
		}
		if err := s.read(ctx, h); err != nil {
			return err
		}
		mu.Lock()
		defer mu.Unlock()
		found = append(found, h)
		return nil
	})
	if err != nil {
		return nil, err
	}
	slices.SortFunc(found, func(a, b *holding) int { return cmp.Compare(a.repo, b.repo) })
	return found, nil
}

// walk calls visit for each repository at and below a path, several at once.
func (r *Registry) walk(ctx context.Context, top string, visit func(ctx context.Context, repo string) error) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(readers)
	// Another goroutine does it where there is room for one: none waits for itself.
	try := func(f func() error) error {
		if g.TryGo(f) {
			return nil
		}
		return f()
	}
	var enter func(p string) error
	enter = func(p string) error {
		children, err := r.driver.List(ctx, path.Join(repositoriesPath, p))
		if isAbsent(err) {
			return nil
		}
		if err != nil {
			return err
		}
		for _, c := range children {
			base := path.Base(c)
			switch {
			case base == "_manifests":
				err = try(func() error { return visit(ctx, p) })
			case !strings.HasPrefix(base, "_"):
				err = try(func() error { return enter(path.Join(p, base)) })
			}
			if err != nil {
				return err
			}
		}
		return nil
	}
	return errors.Join(enter(top), g.Wait())
}

// read fills in tags and revisions.
func (r *Registry) read(ctx context.Context, h *holding) error {
	folder := path.Join(repositoriesPath, h.repo, "_manifests")
	opened, err := r.open(ctx, h.repo)
	if err != nil {
		return err
	}
	names, err := r.list(ctx, path.Join(folder, "tags"))
	if err != nil {
		return err
	}
	h.tags = make(map[string]digest.Digest, len(names))
	for _, tag := range names {
		d, err := opened.Tags(ctx).Get(ctx, tag)
		if isAbsent(err) {
			continue // it is being set or removed
		}
		if err != nil {
			return err
		}
		h.tags[tag] = d.Digest
	}
	hexadecimal, err := r.list(ctx, path.Join(folder, "revisions", "sha256"))
	if err != nil {
		return err
	}
	h.known = map[digest.Digest]bool{}
	for _, x := range hexadecimal {
		files, err := r.list(ctx, path.Join(folder, "revisions", "sha256", x))
		if err != nil {
			return err
		}
		d := digest.NewDigestFromEncoded(digest.SHA256, x)
		// A removal that was interrupted leaves the folder without its link.
		if d.Validate() == nil && slices.Contains(files, "link") {
			h.revisions = append(h.revisions, d)
			h.known[d] = slices.Contains(files, knownMark)
		}
	}
	slices.Sort(h.revisions)
	return nil
}

// list is the names in a folder of storage, none where it does not exist.
func (r *Registry) list(ctx context.Context, folder string) ([]string, error) {
	paths, err := r.driver.List(ctx, folder)
	if isAbsent(err) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	for i, p := range paths {
		paths[i] = path.Base(p)
	}
	slices.Sort(paths)
	return paths, nil
}

// A view is all images of a namespace at one moment.
type view struct {
	images   map[digest.Digest]*Image
	holdings []*holding
	of       map[string]map[digest.Digest]digest.Digest // repository → manifest or index → image; without those that are only an index's entries
}

// view reads it. Manifests and configurations are cached: what remains is to look which there are.
func (s *Images) view(ctx context.Context) (*view, error) {
	holdings, err := s.holdings(ctx)
	if err != nil {
		return nil, err
	}
	v := &view{images: map[digest.Digest]*Image{}, holdings: holdings, of: map[string]map[digest.Digest]digest.Digest{}}
	var mu sync.Mutex
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(readers)
	for _, h := range holdings {
		of := map[digest.Digest]digest.Digest{}
		v.of[h.repo] = of
		g.Go(func() error {
			own, err := s.own(gctx, h)
			if err != nil {
				return err
			}
			for _, d := range own {
				i, err := s.image(gctx, h.repo, d)
				if isAbsent(err) || errors.Is(err, errNoImage) || errors.Is(err, ErrInvalid) {
					continue // removed meanwhile, or pushed by somebody who keeps other things in registries
				}
				if err != nil {
					return err
				}
				of[d] = i.ID
				mu.Lock()
				// Which of several manifests is taken does not depend on who comes first.
				if have := v.images[i.ID]; have == nil || preferred(i, have) {
					v.images[i.ID] = i
				}
				mu.Unlock()
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	for _, h := range holdings {
		for _, m := range h.mentions() {
			i := v.images[v.of[h.repo][m.manifest]]
			switch n := m.name.(type) {
			case reference.NamedTagged:
				if i != nil {
					i.Tags = append(i.Tags, n)
				}
			case reference.Canonical:
				if i != nil {
					i.Digests = append(i.Digests, n)
				}
			}
		}
	}
	return v, nil
}

// own are the revisions that are not there only because an index names them.
func (r *Registry) own(ctx context.Context, h *holding) ([]digest.Digest, error) {
	entries := map[digest.Digest]bool{}
	for _, d := range h.revisions {
		m, err := r.manifest(ctx, h.repo, d)
		if isAbsent(err) || errors.Is(err, ErrInvalid) {
			continue
		}
		if err != nil {
			return nil, err
		}
		for _, e := range m.Entries {
			entries[e.Digest] = true
		}
	}
	var own []digest.Digest
	for _, d := range h.revisions {
		if !entries[d] || h.known[d] || h.isTagged(d) {
			own = append(own, d)
		}
	}
	return own, nil
}

// A mention is a name that means a manifest or an index: one with a tag, or with a digest.
type mention struct {
	name     reference.Named
	manifest digest.Digest
}

// mentions are the holding's, sorted.
func (h *holding) mentions() []mention {
	if h.name == nil {
		return nil
	}
	var all []mention
	for _, tag := range sortedKeys(h.tags) {
		if n, err := reference.WithTag(h.name, tag); err == nil {
			all = append(all, mention{n, h.tags[tag]})
		}
	}
	for _, d := range h.revisions {
		if !h.known[d] {
			continue
		}
		if n, err := reference.WithDigest(h.name, d); err == nil {
			all = append(all, mention{n, d})
		}
	}
	return all
}

func (h *holding) isTagged(d digest.Digest) bool {
	for _, t := range h.tags {
		if t == d {
			return true
		}
	}
	return false
}

// preferred orders the places of one image: one with a name first.
func preferred(a, b *Image) bool {
	nameless := func(i *Image) bool { return strings.HasSuffix(i.repo, "/"+dangling) }
	if nameless(a) != nameless(b) {
		return nameless(b)
	}
	return cmp.Or(cmp.Compare(a.repo, b.repo), cmp.Compare(a.Manifest.Digest, b.Manifest.Digest)) < 0
}

// List returns all images, the newest first.
func (s *Images) List(ctx context.Context) ([]*Image, error) {
	v, err := s.view(ctx)
	if err != nil {
		return nil, err
	}
	return v.sorted(), nil
}

func (v *view) sorted() []*Image {
	all := make([]*Image, 0, len(v.images))
	for _, i := range v.images {
		all = append(all, i)
	}
	slices.SortFunc(all, func(a, b *Image) int {
		return cmp.Or(b.created().Compare(a.created()), cmp.Compare(a.ID, b.ID))
	})
	return all
}

func (i *Image) created() time.Time {
	if i.Config.Created == nil {
		return time.Time{}
	}
	return *i.Config.Created
}

// Resolve finds the image that a name, a name with a digest, an id or the beginning of one means. Of its names it has at least the one asked for. That a name
// means the image takes one look into storage: it is fast enough for each start of a container.
func (s *Images) Resolve(ctx context.Context, ref string) (*Image, error) {
	i, _, err := s.find(ctx, ref)
	return i, err
}

// find is Resolve that tells by which name the image was found; nil if by its id.
func (s *Images) find(ctx context.Context, ref string) (*Image, reference.Named, error) {
	hexadecimal, id := imageID(ref)
	if !strings.HasPrefix(ref, "sha256:") && len(hexadecimal) < 64 {
		name, err := ParseName(ref)
		if err != nil {
			return nil, nil, err
		}
		i, err := s.byName(ctx, name)
		if err == nil || !errors.Is(err, ErrNotFound) || !id {
			return i, name, err
		}
	}
	if !id {
		return nil, nil, errorf(ErrNotFound, "No such image: %.300s", ref)
	}
	v, err := s.view(ctx)
	if err != nil {
		return nil, nil, err
	}
	i, err := v.byID(ref, hexadecimal)
	return i, nil, err
}

func (v *view) byID(ref, hexadecimal string) (*Image, error) {
	var found *Image
	for _, i := range v.images {
		if !strings.HasPrefix(i.ID.Encoded(), hexadecimal) {
			continue
		}
		if found != nil {
			return nil, errorf(ErrInvalid, "image prefix %s is not unique: give more of the id", ref)
		}
		found = i
	}
	if found == nil {
		return nil, errorf(ErrNotFound, "No such image: %s", ref)
	}
	return found, nil
}

// byName finds what a name means.
func (s *Images) byName(ctx context.Context, name reference.Named) (*Image, error) {
	absent := errorf(ErrNotFound, "No such image: %s", reference.FamiliarString(name))
	repo, err := repository(s.root, name)
	if err != nil {
		return nil, err
	}
	var d digest.Digest
	if c, ok := name.(reference.Digested); ok {
		d = c.Digest()
	} else {
		opened, err := s.open(ctx, repo.Name())
		if err != nil {
			return nil, err
		}
		desc, err := opened.Tags(ctx).Get(ctx, name.(reference.Tagged).Tag())
		if isAbsent(err) {
			return nil, absent
		}
		if err != nil {
			return nil, err
		}
		d = desc.Digest
	}
	i, err := s.image(ctx, repo.Name(), d)
	if isAbsent(err) || errors.Is(err, errNoImage) {
		return nil, absent
	}
	if err != nil {
		return nil, err
	}
	switch name := name.(type) {
	case reference.Canonical:
		i.Digests = []reference.Canonical{name}
	case reference.NamedTagged:
		i.Tags = []reference.NamedTagged{name}
	}
	return i, nil
}

// Inspect is Resolve with everything that refers to the image.
func (s *Images) Inspect(ctx context.Context, ref string) (*Image, error) {
	found, err := s.Resolve(ctx, ref)
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
	for _, t := range i.Tags {
		repo, err := repository(s.root, t)
		if err != nil {
			continue
		}
		if fi, err := s.driver.Stat(ctx, path.Join(repositoriesPath, repo.Name(), "_manifests/tags", t.Tag(), "current/link")); err == nil && fi.ModTime().After(i.Tagged) {
			i.Tagged = fi.ModTime()
		}
	}
	return i, nil
}
