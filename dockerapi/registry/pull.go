package registry

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"path"
	"strings"
	"sync"
	"time"

	"github.com/distribution/distribution/v3"
	"github.com/distribution/reference"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
	"github.com/google/go-containerregistry/pkg/v1/types"
	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
	registrytypes "github.com/moby/moby/api/types/registry"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"
)

const (
	// transfers is how many layers come or go at once: docker's number.
	transfers = 3
	// attempts is how often a transfer is begun or gone on with.
	attempts = 5
	// maxLayers is docker's bound of an image's depth, and overlayfs's.
	maxLayers = 125

	reportEvery = 100 * time.Millisecond
)

// A Progress is one line of what a transfer has to tell, in docker's words.
type Progress struct {
	ID             string // of the layer, or the tag; "" for the whole
	Status         string
	Current, Total int64 // of bytes; 0 where there is nothing to count
}

// Transfer is what Pull and Push go by.
type Transfer struct {
	Platform string // of an index's images; "" is the nodes'
	Auth     registrytypes.AuthConfig
	Progress func(Progress) // nil: nobody looks. It is called by one goroutine at a time
}

// reporter makes calls of Progress one at a time, and not more often than anyone can see.
func (t Transfer) reporter() func(Progress) {
	if t.Progress == nil {
		return func(Progress) {}
	}
	var mu sync.Mutex
	last := map[string]Progress{}
	when := map[string]time.Time{}
	return func(p Progress) {
		mu.Lock()
		defer mu.Unlock()
		now := time.Now()
		if p.Status == last[p.ID].Status && p.Total > 0 && p.Current < p.Total && now.Sub(when[p.ID]) < reportEvery {
			return
		}
		last[p.ID], when[p.ID] = p, now
		t.Progress(p)
	}
}

// short is an id of a blob as docker shows it.
func short(d digest.Digest) string { return d.Encoded()[:12] }

// A remoteImage is one of another registry's, as far as it has to be in memory.
type remoteImage struct {
	top      *remote.Descriptor // what the name means: a manifest or an index
	data     []byte             // the manifest
	manifest *manifest
	config   []byte
	layers   []Layer
}

// Pull brings an image, of another registry's, under the same name. What the namespace has already is not fetched again; a layer whose transfer broke is gone on
// with, also by the next Pull.
func (s *Images) Pull(ctx context.Context, n reference.Named, t Transfer) error {
	n = reference.TagNameOnly(n)
	report := t.reporter()
	newer, err := s.pullOne(ctx, n, t, report)
	if err == nil {
		report(pulled(n, newer))
	}
	return err
}

func pulled(n reference.Named, newer bool) Progress {
	if newer {
		return Progress{Status: "Status: Downloaded newer image for " + reference.FamiliarString(n)}
	}
	return Progress{Status: "Status: Image is up to date for " + reference.FamiliarString(n)}
}

func (s *Images) pullOne(ctx context.Context, n reference.Named, t Transfer, report func(Progress)) (newer bool, err error) {
	repo, err := repository(s.root, n)
	if err != nil {
		return false, err
	}
	p := &puller{Images: s, name: n, repo: repo.Name(), report: report}
	image, err := p.look(ctx, t)
	if err != nil {
		return false, explain(n, false, err)
	}
	return p.pull(ctx, image, t)
}

// A puller is one Pull.
type puller struct {
	*Images
	name   reference.Named
	repo   string
	report func(Progress)
	remote name.Reference
	client *http.Client
	have   map[digest.Digest]string // blob → a repository of the namespace that has it
}

// look asks for everything but the layers.
func (p *puller) look(ctx context.Context, t Transfer) (*remoteImage, error) {
	wanted := p.platform
	if t.Platform != "" {
		var err error
		if wanted, err = parsePlatform(t.Platform); err != nil {
			return nil, err
		}
	}
	var err error
	if p.remote, err = p.remoteName(p.name); err != nil {
		return nil, err
	}
	auth := authenticator(t.Auth)
	// One token for everything.
	rt, err := transport.NewWithContext(ctx, p.remote.Context().Registry, auth, p.upstream, []string{p.remote.Scope(transport.PullScope)})
	if err != nil {
		return nil, err
	}
	p.client = &http.Client{Transport: rt}
	top, err := remote.Get(p.remote, remote.WithContext(ctx), remote.WithTransport(rt), remote.WithAuth(auth),
		remote.WithPlatform(v1.Platform{OS: wanted.os, Architecture: wanted.architecture, Variant: wanted.variant}))
	if err != nil {
		return nil, err
	}
	switch top.MediaType {
	case types.DockerManifestSchema1, types.DockerManifestSchema1Signed:
		return nil, errorf(ErrInvalid, "%s has a manifest of docker's first version: push the image again with a current docker", reference.FamiliarString(p.name))
	}
	img, err := top.Image()
	if err != nil {
		return nil, err
	}
	r := &remoteImage{top: top}
	if r.data, err = img.RawManifest(); err != nil {
		return nil, err
	}
	mediaType, err := img.MediaType()
	if err != nil {
		return nil, err
	}
	if r.manifest, err = parseManifest(string(mediaType), r.data); err != nil {
		return nil, err
	}
	if r.manifest.isIndex() || r.manifest.Config.Size > maxConfig {
		return nil, errorf(ErrInvalid, "%s is no image that can be pulled", reference.FamiliarString(p.name))
	}
	if r.config, err = img.RawConfigFile(); err != nil {
		return nil, err
	}
	var c dockerspec.DockerOCIImage
	if err := json.Unmarshal(r.config, &c); err != nil || len(c.RootFS.DiffIDs) != len(r.manifest.Layers) {
		return nil, errorf(ErrInvalid, "%s is no image of a container: docker pull can't fetch other things", reference.FamiliarString(p.name))
	}
	if len(r.manifest.Layers) > maxLayers {
		return nil, errorf(ErrInvalid, "%s has %d layers, at most %d can be stacked", reference.FamiliarString(p.name), len(r.manifest.Layers), maxLayers)
	}
	own := &ocispec.Platform{OS: c.OS, Architecture: c.Architecture, Variant: c.Variant}
	if t.Platform != "" && !wanted.matches(own) {
		return nil, errorf(ErrNotFound, "image with reference %s was found but does not match the specified platform: wanted %s, actual: %s/%s",
			reference.FamiliarString(p.name), wanted, c.OS, c.Architecture)
	}
	for i, l := range r.manifest.Layers {
		if l.Size > p.MaxLayer {
			return nil, errorf(ErrInvalid, "layer %s has %d bytes, at most %d are taken", l.Digest, l.Size, p.MaxLayer)
		}
		r.layers = append(r.layers, Layer{l, c.RootFS.DiffIDs[i]})
	}
	return r, nil
}

// pull tells whether there was anything to fetch.
func (p *puller) pull(ctx context.Context, image *remoteImage, t Transfer) (newer bool, err error) {
	top := digest.Digest(image.top.Digest.String())
	id := top.String()
	tag := ""
	if tagged, ok := p.name.(reference.Tagged); ok {
		id, tag = tagged.Tag(), tagged.Tag()
	}
	p.report(Progress{ID: id, Status: "Pulling from " + reference.Path(p.name)})

	// A platform that was asked for is what the name means then; else the index is, as its digest is what others know the image by.
	data, mediaType, whole := image.data, image.manifest.MediaType, top
	isIndex := image.top.MediaType.IsIndex()
	if isIndex && (t.Platform == "" || tag == "") {
		data, mediaType = image.top.Manifest, string(image.top.MediaType)
	} else {
		whole = image.manifest.Digest
	}
	v, err := p.view(ctx)
	if err != nil {
		return false, err
	}
	p.have = v.blobs()
	// What was loaded or pushed here is not known to be the other registry's, though it is the same.
	h := v.holding(p.repo)
	if h != nil && v.of[p.repo][whole] == image.manifest.Config.Digest && (tag == "" || h.tags[tag] == whole) {
		if err := p.markKnown(ctx, p.repo, whole); err != nil {
			return false, err
		}
		p.report(Progress{Status: "Digest: " + top.String()})
		return false, nil
	}

	for _, l := range image.layers {
		if p.have[l.Digest] == "" {
			p.report(Progress{ID: short(l.Digest), Status: "Pulling fs layer"})
		}
	}
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(transfers)
	seen := map[digest.Digest]bool{}
	for _, l := range image.layers {
		if seen[l.Digest] {
			continue
		}
		seen[l.Digest] = true
		g.Go(func() error { return p.layer(gctx, l) })
	}
	if err := g.Wait(); err != nil {
		return false, err
	}
	if err := p.putBytes(ctx, p.repo, image.manifest.Config.MediaType, image.config); err != nil {
		return false, err
	}
	if isIndex && whole == top {
		if err := p.putManifest(ctx, p.repo, image.manifest.MediaType, image.data, ""); err != nil {
			return false, err
		}
	}
	if err := p.putManifest(ctx, p.repo, mediaType, data, tag); err != nil {
		return false, err
	}
	if err := p.markKnown(ctx, p.repo, whole); err != nil {
		return false, err
	}
	p.report(Progress{Status: "Digest: " + top.String()})
	return true, nil
}

// blobs tells where in the namespace each blob of an image is.
func (v *view) blobs() map[digest.Digest]string {
	have := map[digest.Digest]string{}
	for _, i := range v.images {
		for _, l := range i.Layers {
			have[l.Digest] = i.repo
		}
	}
	return have
}

// layer makes the repository have a layer, and knows then what is in it.
func (p *puller) layer(ctx context.Context, l Layer) error {
	id := short(l.Digest)
	unlock, err := p.pulls.lock(ctx, p.root+" "+l.Digest.String())
	if err != nil {
		return err
	}
	defer unlock()
	from := p.have[l.Digest]
	if from == "" {
		from = p.repo // perhaps of a pull that was interrupted
	}
	if ok, err := p.has(ctx, from, l.Digest); err != nil {
		return err
	} else if ok {
		if err := p.link(ctx, from, p.repo, l.Digest); err != nil {
			return err
		}
		if f, ok := p.getFact(ctx, l.Digest); ok && f.diffID == l.DiffID {
			p.report(Progress{ID: id, Status: "Already exists"})
			return nil
		}
	} else {
		if err := p.download(ctx, l.Descriptor); err != nil {
			return explain(p.name, false, err)
		}
		p.report(Progress{ID: id, Status: "Download complete"})
	}
	_, err = p.measure(ctx, p.repo, l, func(done int64) {
		p.report(Progress{ID: id, Status: "Extracting", Current: done, Total: l.Size})
	})
	if err != nil {
		return err
	}
	p.report(Progress{ID: id, Status: "Pull complete"})
	return nil
}

// pullsPath has a file for each layer of which an upload has the beginning: REPOSITORY UPLOAD.
const pullsPath = "/cradlestack/pulls"

// markPath is where it is noted which upload has the beginning of a layer.
func (s *Images) markPath(d digest.Digest) string {
	return path.Join(pullsPath, s.root, d.Encoded())
}

// download fetches a blob into an upload of the repository, from where an earlier one has stopped.
func (p *puller) download(ctx context.Context, d ocispec.Descriptor) error {
	opened, err := p.open(ctx, p.repo)
	if err != nil {
		return err
	}
	// The upload outlives the context, so that the next pull finds what has come.
	keep := context.WithoutCancel(ctx)
	blobs := opened.Blobs(keep)
	mark := p.markPath(d.Digest)
	var w distribution.BlobWriter
	if data, err := p.driver.GetContent(ctx, mark); err == nil {
		if repo, id, _ := strings.Cut(string(data), " "); repo == p.repo {
			if w, err = blobs.Resume(keep, id); err != nil {
				w = nil
			} else if w.Size() > d.Size {
				_ = w.Cancel(keep)
				w = nil
			}
		}
	}
	if w == nil {
		if w, err = blobs.Create(keep); err != nil {
			return err
		}
		if err := p.driver.PutContent(keep, mark, []byte(p.repo+" "+w.ID())); err != nil {
			_ = w.Cancel(keep)
			return err
		}
	}
	if err := p.fetch(ctx, w, d); err != nil {
		return errors.Join(err, w.Close())
	}
	p.report(Progress{ID: short(d.Digest), Status: "Verifying Checksum"})
	p.gate.RLock()
	defer p.gate.RUnlock()
	_, err = w.Commit(keep, ocispec.Descriptor{Digest: d.Digest})
	if err != nil {
		// What has come is of no use: the next pull must not go on with it.
		_ = w.Cancel(keep)
		err = fmt.Errorf("layer %s: %w", d.Digest, err)
	}
	_ = p.driver.Delete(keep, mark) // an upload that does not exist is not gone on with
	return err
}

// fetch reads the blob's rest, as often as it takes.
func (p *puller) fetch(ctx context.Context, w distribution.BlobWriter, d ocispec.Descriptor) error {
	id := short(d.Digest)
	delay, ranges := p.retryDelay, true
	have := w.Size() // of the writer's beginning: what it says later may lag behind
	for attempt := 1; have < d.Size; attempt++ {
		n, err := p.fetchOnce(ctx, w, d, have, ranges)
		have += n
		var te *transport.Error
		errors.As(err, &te)
		switch {
		case err == nil:
			continue
		case te != nil && te.StatusCode == http.StatusRequestedRangeNotSatisfiable && ranges:
			ranges = false
			continue
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case attempt >= attempts, te != nil && te.StatusCode < 500 && te.StatusCode != http.StatusTooManyRequests:
			return err
		}
		p.report(Progress{ID: id, Status: fmt.Sprintf("Retrying in %d seconds", max(1, int(delay.Seconds())))})
		select {
		case <-time.After(delay):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		delay *= 2
	}
	return nil
}

// fetchOnce fetches from an offset on, and tells how much has come.
func (p *puller) fetchOnce(ctx context.Context, w distribution.BlobWriter, d ocispec.Descriptor, offset int64, ranges bool) (int64, error) {
	repo := p.remote.Context()
	u := url.URL{Scheme: repo.Scheme(), Host: repo.RegistryStr(), Path: "/v2/" + repo.RepositoryStr() + "/blobs/" + d.Digest.String()}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return 0, err
	}
	if offset > 0 && ranges {
		req.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", offset, d.Size-1))
	}
	resp, err := p.client.Do(req)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	if err := transport.CheckError(resp, http.StatusOK, http.StatusPartialContent); err != nil {
		return 0, err
	}
	if resp.StatusCode == http.StatusOK && offset > 0 { // it does not know ranges
		if _, err := io.CopyN(io.Discard, resp.Body, offset); err != nil {
			return 0, err
		}
	}
	body := &progressReader{Reader: io.LimitReader(resp.Body, d.Size-offset), ctx: ctx, report: func(done int64) {
		p.report(Progress{ID: short(d.Digest), Status: "Downloading", Current: offset + done, Total: d.Size})
	}}
	n, err := w.ReadFrom(body)
	if err == nil && offset+n < d.Size {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

// PullAll pulls every tag of a repository.
func (s *Images) PullAll(ctx context.Context, n reference.Named, t Transfer) error {
	ref, err := s.remoteName(reference.TrimNamed(n))
	if err != nil {
		return err
	}
	tags, err := remote.List(ref.Context(), remote.WithContext(ctx), remote.WithTransport(s.upstream), remote.WithAuth(authenticator(t.Auth)))
	if err != nil {
		return explain(n, false, err)
	}
	if len(tags) > s.MaxImages {
		return errorf(ErrInvalid, "%s has %d tags, at most %d are pulled at once", reference.FamiliarName(n), len(tags), s.MaxImages)
	}
	report := t.reporter()
	some := false
	for _, tag := range tags {
		one, err := reference.WithTag(reference.TrimNamed(n), tag)
		if err != nil {
			return errorf(ErrInvalid, "%v", err)
		}
		newer, err := s.pullOne(ctx, one, t, report)
		if err != nil {
			return err
		}
		some = some || newer
	}
	report(pulled(reference.TrimNamed(n), some))
	return nil
}

// Look tells what another registry has under a name, and for which platforms.
func (s *Images) Look(ctx context.Context, n reference.Named, auth registrytypes.AuthConfig) (ocispec.Descriptor, []ocispec.Platform, error) {
	var none ocispec.Descriptor
	ref, err := s.remoteName(n)
	if err != nil {
		return none, nil, err
	}
	opts := []remote.Option{remote.WithContext(ctx), remote.WithTransport(s.upstream), remote.WithAuth(authenticator(auth))}
	top, err := remote.Get(ref, opts...)
	if err != nil {
		return none, nil, explain(n, false, err)
	}
	m, err := parseManifest(string(top.MediaType), top.Manifest)
	if err != nil {
		return none, nil, err
	}
	platforms := []ocispec.Platform{}
	for _, e := range m.Entries {
		if e.Platform != nil {
			platforms = append(platforms, *e.Platform)
		}
	}
	if m.isIndex() || m.Config.Size > maxConfig {
		return m.Descriptor, platforms, nil
	}
	img, err := top.Image()
	if err != nil {
		return none, nil, explain(n, false, err)
	}
	c, err := img.ConfigFile()
	if err != nil {
		return none, nil, explain(n, false, err)
	}
	return m.Descriptor, append(platforms, ocispec.Platform{OS: c.OS, Architecture: c.Architecture, Variant: c.Variant}), nil
}
