package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"sync"

	"github.com/distribution/reference"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/partial"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/opencontainers/go-digest"
)

// A Pushed is an image that another registry has now.
type Pushed struct {
	Tag    string
	Digest string
	Size   int64 // of the manifest
}

// Push sends an image to the registry that its name says: what that has already does not travel. The name means the manifest that was sent then, which is what
// others know it by.
func (s *Images) Push(ctx context.Context, n reference.NamedTagged, t Transfer) (*Pushed, error) {
	to, err := s.remoteName(n)
	if err != nil {
		return nil, err
	}
	report := t.reporter()
	report(Progress{Status: fmt.Sprintf("The push refers to repository [%s]", n.Name())})
	i, err := s.byName(ctx, n)
	if errors.Is(err, ErrNotFound) {
		return nil, errorf(ErrNotFound, "An image does not exist locally with the tag: %s", reference.FamiliarName(n))
	}
	if err != nil {
		return nil, err
	}
	img, err := s.stored(ctx, i)
	if err != nil {
		return nil, err
	}
	for _, l := range i.Layers {
		report(Progress{ID: short(l.DiffID), Status: "Preparing"})
	}
	img.report = func(l Layer, done int64) {
		report(Progress{ID: short(l.DiffID), Status: "Pushing", Current: done, Total: l.Descriptor.Size})
	}
	whole, err := partial.CompressedToImage(img)
	if err != nil {
		return nil, err
	}
	err = remote.Write(to, whole, remote.WithContext(ctx), remote.WithTransport(s.upstream), remote.WithAuth(authenticator(t.Auth)), remote.WithJobs(transfers))
	if err != nil {
		return nil, explain(n, true, err)
	}
	for _, l := range i.Layers {
		status := "Layer already exists"
		if img.wasOpened(l.Digest) {
			status = "Pushed"
		}
		report(Progress{ID: short(l.DiffID), Status: status})
	}
	if err := s.putManifest(ctx, i.repo, i.Manifest.MediaType, img.manifest, n.Tag()); err != nil {
		return nil, err
	}
	if err := s.markKnown(ctx, i.repo, i.Manifest.Digest); err != nil {
		return nil, err
	}
	p := &Pushed{n.Tag(), i.Manifest.Digest.String(), i.Manifest.Size}
	report(Progress{Status: p.Tag + ": digest: " + p.Digest + " size: " + strconv.FormatInt(p.Size, 10)})
	return p, nil
}

// Tags returns the tags of a name.
func (s *Images) Tags(ctx context.Context, n reference.Named) ([]reference.NamedTagged, error) {
	repo, err := repository(s.root, n)
	if err != nil {
		return nil, err
	}
	h := &holding{repo: repo.Name()}
	if err := s.read(ctx, h); err != nil {
		return nil, err
	}
	var all []reference.NamedTagged
	for _, tag := range sortedKeys(h.tags) {
		tagged, err := reference.WithTag(reference.TrimNamed(n), tag)
		if err != nil {
			return nil, err
		}
		all = append(all, tagged)
	}
	if all == nil {
		return nil, errorf(ErrNotFound, "An image does not exist locally with the tag: %s", reference.FamiliarName(n))
	}
	return all, nil
}

// A storedImage is one of the store's as go-containerregistry has them.
type storedImage struct {
	ctx      context.Context // of the one operation that it is for
	images   *Images
	image    *Image
	manifest []byte
	report   func(l Layer, done int64) // nil: nobody looks

	mu   sync.Mutex
	read map[digest.Digest]bool
}

func (s *Images) stored(ctx context.Context, i *Image) (*storedImage, error) {
	opened, err := s.open(ctx, i.repo)
	if err != nil {
		return nil, err
	}
	manifests, err := opened.Manifests(ctx)
	if err != nil {
		return nil, err
	}
	m, err := manifests.Get(ctx, i.Manifest.Digest)
	if err != nil {
		return nil, err
	}
	_, data, err := m.Payload()
	if err != nil {
		return nil, err
	}
	return &storedImage{ctx: ctx, images: s, image: i, manifest: data, read: map[digest.Digest]bool{}}, nil
}

func (i *storedImage) RawConfigFile() ([]byte, error) { return i.image.raw, nil }
func (i *storedImage) RawManifest() ([]byte, error)   { return i.manifest, nil }
func (i *storedImage) MediaType() (types.MediaType, error) {
	return types.MediaType(i.image.Manifest.MediaType), nil
}

func (i *storedImage) LayerByDigest(h v1.Hash) (partial.CompressedLayer, error) {
	for _, l := range i.image.Layers {
		if l.Digest.String() == h.String() {
			return &storedLayerBlob{i, l}, nil
		}
	}
	return nil, fmt.Errorf("layer %s: there is none", h)
}

func (i *storedImage) wasOpened(d digest.Digest) bool {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.read[d]
}

type storedLayerBlob struct {
	image *storedImage
	layer Layer
}

func (l *storedLayerBlob) Digest() (v1.Hash, error) { return v1.NewHash(l.layer.Digest.String()) }
func (l *storedLayerBlob) Size() (int64, error)     { return l.layer.Descriptor.Size, nil }
func (l *storedLayerBlob) MediaType() (types.MediaType, error) {
	return types.MediaType(l.layer.MediaType), nil
}

func (l *storedLayerBlob) Compressed() (io.ReadCloser, error) {
	opened, err := l.image.images.open(l.image.ctx, l.image.image.repo)
	if err != nil {
		return nil, err
	}
	r, err := opened.Blobs(l.image.ctx).Open(l.image.ctx, l.layer.Digest)
	if err != nil {
		return nil, err
	}
	l.image.mu.Lock()
	l.image.read[l.layer.Digest] = true
	l.image.mu.Unlock()
	// It ends by itself: net/http looks for more behind the last byte when it may have closed it already.
	p := &progressReader{Reader: io.LimitReader(r, l.layer.Descriptor.Size), ctx: l.image.ctx}
	if l.image.report != nil {
		p.report = func(done int64) { l.image.report(l.layer, done) }
	}
	return blobReader{p, r}, nil
}

// A blobReader is distribution's without its way to close, which says that it is closed as an error.
type blobReader struct {
	io.Reader
	blob io.Closer
}

func (r blobReader) Close() error {
	_ = r.blob.Close()
	return nil
}

// Save writes images as docker save does: an archive that docker load takes, of each name that is given with the names that it was given by.
func (s *Images) Save(ctx context.Context, w io.Writer, refs []string) error {
	if len(refs) > s.MaxImages {
		return errorf(ErrInvalid, "%d images, at most %d are saved at once", len(refs), s.MaxImages)
	}
	archive := map[name.Reference]v1.Image{}
	byID := map[digest.Digest]v1.Image{}
	for _, ref := range refs {
		named, err := s.saved(ctx, ref)
		if err != nil {
			return err
		}
		for _, n := range named {
			img, ok := byID[n.image.ID]
			if !ok {
				stored, err := s.stored(ctx, n.image)
				if err != nil {
					return err
				}
				if img, err = partial.CompressedToImage(stored); err != nil {
					return err
				}
				byID[n.image.ID] = img
			}
			archive[n.name] = img
		}
	}
	if err := tarball.MultiRefWrite(archive, w); err != nil {
		return fmt.Errorf("save: %w", err)
	}
	return nil
}

type savedImage struct {
	name  name.Reference
	image *Image
}

// saved is what a reference adds to an archive: a name without a tag every tag of it, an id no name.
func (s *Images) saved(ctx context.Context, ref string) ([]savedImage, error) {
	names := []reference.NamedTagged(nil)
	if n, err := reference.ParseNormalizedNamed(ref); err == nil && reference.IsNameOnly(n) {
		if names, err = s.Tags(ctx, n); err != nil && !errors.Is(err, ErrNotFound) {
			return nil, err
		}
	}
	if names == nil {
		i, n, err := s.find(ctx, ref)
		if err != nil {
			return nil, err
		}
		tagged, ok := n.(reference.NamedTagged)
		if !ok {
			nameless, err := name.NewDigest("image@"+i.ID.String(), name.WeakValidation)
			if err != nil {
				return nil, err
			}
			return []savedImage{{nameless, i}}, nil
		}
		names = []reference.NamedTagged{tagged}
	}
	var all []savedImage
	for _, n := range names {
		i, err := s.byName(ctx, n)
		if err != nil {
			return nil, err
		}
		tag, err := name.NewTag(reference.FamiliarString(n), name.WeakValidation)
		if err != nil {
			return nil, errorf(ErrInvalid, "%v", err)
		}
		all = append(all, savedImage{tag, i})
	}
	return all, nil
}
