package image

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"slices"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// A resolved image is what a source says about it; nothing of it is verified but the manifest's digest.
type resolved struct {
	digest string // of the manifest, or ""
	id     string // digest of the configuration
	config []byte
	blobs  []blob
}

// A source is a place that images come from: a registry, an OCI layout, a docker archive.
type source interface {
	resolve(ctx context.Context, platform string) (*resolved, error)
}

// parse checks the configuration against its digest, its bounds, and the wanted platform, and gives each blob its diff id.
func (r *resolved) parse(platform string) (*Config, error) {
	if !isDigest(r.id) {
		return nil, fmt.Errorf("configuration: %w: %.100q is no sha256 digest", ErrCorrupt, r.id)
	}
	if err := verifyBytes("the configuration", r.id, r.config); err != nil {
		return nil, err
	}
	var c Config
	if err := json.Unmarshal(r.config, &c); err != nil {
		return nil, fmt.Errorf("configuration: %w: %w", ErrCorrupt, err)
	}
	if len(c.RootFS.DiffIDs) != len(r.blobs) {
		return nil, fmt.Errorf("%w: %d layers, but the configuration names %d", ErrCorrupt, len(r.blobs), len(c.RootFS.DiffIDs))
	}
	if len(r.blobs) > maxLayers {
		return nil, fmt.Errorf("%w: %d layers, at most %d can be stacked", ErrTooLarge, len(r.blobs), maxLayers)
	}
	if err := checkPlatform(&c, platform); err != nil {
		return nil, err
	}
	for i := range r.blobs {
		r.blobs[i].diffID = c.RootFS.DiffIDs[i].String()
		if err := r.blobs[i].check(); err != nil {
			return nil, fmt.Errorf("layer %d of %d: %w", i+1, len(r.blobs), err)
		}
	}
	return &c, nil
}

// checkPlatform compares an image's own words; a variant that it doesn't name fits.
func checkPlatform(c *Config, platform string) error {
	os, arch, variant := splitPlatform(platform)
	if c.OS != "" && c.OS != os || c.Architecture != "" && c.Architecture != arch ||
		variant != "" && c.Variant != "" && c.Variant != variant {
		return fmt.Errorf("%w: it is for %s, not for %s: give --platform, or an image built for this machine",
			ErrPlatform, joinPlatform(c.OS, c.Architecture, c.Variant), platform)
	}
	return nil
}

func splitPlatform(p string) (os, arch, variant string) {
	parts := append(strings.SplitN(p, "/", 3), "", "")
	return parts[0], parts[1], parts[2]
}

func joinPlatform(os, arch, variant string) string {
	p := os + "/" + arch
	if variant != "" {
		p += "/" + variant
	}
	return p
}

// choose returns the entry of an index for the platform: the very variant, else the one that every machine of the
// architecture runs.
func choose(entries []v1.Descriptor, platform string) (*v1.Descriptor, error) {
	os, arch, variant := splitPlatform(platform)
	baseline := map[string]string{"arm64": "v8", "arm": "v7", "amd64": "v1"}[arch]
	var have []string
	best, score := -1, -1
	for i, d := range entries {
		p := d.Platform
		if p == nil {
			p = &v1.Platform{OS: os, Architecture: arch} // says nothing; the configuration will tell
		}
		if p.OS == "unknown" { // attestations of buildkit
			continue
		}
		have = append(have, joinPlatform(p.OS, p.Architecture, p.Variant))
		if p.OS != os || p.Architecture != arch {
			continue
		}
		s := -1
		switch p.Variant {
		case variant:
			s = 3
		case "":
			s = 2
		case baseline:
			s = 1
		}
		if variant != "" && s == 2 {
			s = 1
		}
		if variant != "" && p.Variant == baseline && variant != baseline {
			s = 0
		}
		if s > score {
			best, score = i, s
		}
	}
	if best < 0 {
		slices.Sort(have)
		return nil, fmt.Errorf("%w: none for %s, only for %s: give --platform, or build the image for this machine",
			ErrPlatform, platform, strings.Join(slices.Compact(have), ", "))
	}
	return &entries[best], nil
}

// maxIndexDepth bounds indexes of indexes.
const maxIndexDepth = 4

// A fetchFunc returns a manifest or index by digest.
type fetchFunc func(ctx context.Context, d v1.Descriptor) ([]byte, error)

// manifest follows indexes from d to the platform's manifest.
func manifest(ctx context.Context, d v1.Descriptor, data []byte, platform string, fetch fetchFunc) (*v1.Manifest, v1.Descriptor, error) {
	for range maxIndexDepth {
		var m struct {
			v1.Manifest
			Manifests []v1.Descriptor `json:"manifests"`
			FSLayers  []any           `json:"fsLayers"`
		}
		if err := json.Unmarshal(data, &m); err != nil {
			return nil, d, fmt.Errorf("manifest %s: %w: %w", short(d.Digest.String()), ErrCorrupt, err)
		}
		if m.FSLayers != nil {
			return nil, d, errors.New("its manifest is of docker's first version: push the image again with a current docker")
		}
		// The bytes themselves decide what they are, as far as they say so: a document that is both an index and a
		// manifest (CVE-2021-41190) is refused.
		isIndex := len(m.Manifests) > 0 || types.MediaType(m.MediaType).IsIndex()
		isImage := m.Config.Digest.Hex != "" || len(m.Layers) > 0
		switch {
		case isIndex && isImage:
			return nil, d, fmt.Errorf("manifest %s: %w: it is both an index and a manifest", short(d.Digest.String()), ErrRefused)
		case isImage:
			return &m.Manifest, d, nil
		case !isIndex:
			return nil, d, fmt.Errorf("manifest %s: %w: it names neither a configuration nor manifests", short(d.Digest.String()), ErrCorrupt)
		}
		next, err := choose(m.Manifests, platform)
		if err != nil {
			return nil, d, err
		}
		if !isDigest(next.Digest.String()) {
			return nil, d, fmt.Errorf("manifest: %w: %.100q is no sha256 digest", ErrCorrupt, next.Digest.String())
		}
		d = *next
		if data, err = fetch(ctx, d); err != nil {
			return nil, d, fmt.Errorf("manifest %s: %w", short(d.Digest.String()), err)
		}
		if err := verifyBytes("the manifest", d.Digest.String(), data); err != nil {
			return nil, d, err
		}
	}
	return nil, d, fmt.Errorf("%w: more than %d indexes inside each other", ErrRefused, maxIndexDepth)
}

// A layoutSource is an OCI image layout (image-spec image-layout.md): a directory, or the same in a tar.
type layoutSource struct {
	fsys fs.FS
	name string // tag, or "" where there is only one image
}

func (s layoutSource) resolve(ctx context.Context, platform string) (*resolved, error) {
	data, err := readSmall(s.fsys, "index.json", maxManifest)
	if isNotExist(err) {
		return nil, fmt.Errorf("%w: index.json is missing: it is no OCI layout, or cut short", ErrCorrupt)
	}
	if err != nil {
		return nil, err
	}
	var index v1.IndexManifest
	if err := json.Unmarshal(data, &index); err != nil {
		return nil, fmt.Errorf("index.json: %w: %w", ErrCorrupt, err)
	}
	entries, err := s.entries(index.Manifests)
	if err != nil {
		return nil, err
	}
	d := entries[0]
	if len(entries) > 1 {
		chosen, err := choose(entries, platform)
		if err != nil {
			return nil, err
		}
		d = *chosen
	}
	if data, err = s.fetch(ctx, d); err != nil {
		return nil, err
	}
	m, d, err := manifest(ctx, d, data, platform, s.fetch)
	if err != nil {
		return nil, err
	}
	return s.image(m, d)
}

// entries returns what the layout has under the wanted name: several where it holds one image for several platforms.
func (s layoutSource) entries(all []v1.Descriptor) ([]v1.Descriptor, error) {
	var found []v1.Descriptor
	names := make(map[string]bool)
	for _, d := range all {
		short, full := d.Annotations["org.opencontainers.image.ref.name"], d.Annotations["io.containerd.image.name"]
		if s.name == "" || s.name == short || full != "" && familiar(s.name) == familiar(full) {
			found = append(found, d)
		}
		if full != "" {
			short = familiar(full)
		}
		names[short] = true
	}
	list := make([]string, 0, len(names))
	for n := range names {
		list = append(list, n)
	}
	slices.Sort(list)
	switch {
	case len(all) == 0:
		return nil, fmt.Errorf("%w: the layout is empty", ErrNotFound)
	case len(found) == 0:
		return nil, fmt.Errorf("%w: it has no %q, only %q", ErrNotFound, s.name, list)
	case s.name == "" && len(names) > 1:
		return nil, fmt.Errorf("it has several images: say which, one of %q", list)
	}
	return found, nil
}

func (s layoutSource) image(m *v1.Manifest, d v1.Descriptor) (*resolved, error) {
	r := &resolved{digest: d.Digest.String(), id: m.Config.Digest.String()}
	var err error
	if r.config, err = readSmall(s.fsys, blobPath(m.Config.Digest), maxConfig); err != nil {
		return nil, fmt.Errorf("configuration: %w", err)
	}
	for _, l := range m.Layers {
		r.blobs = append(r.blobs, blob{
			digest: l.Digest.String(), size: l.Size, mediaType: string(l.MediaType),
			open: func(context.Context) (io.ReadCloser, error) { return openFile(s.fsys, blobPath(l.Digest)) },
		})
	}
	return r, nil
}

func (s layoutSource) fetch(_ context.Context, d v1.Descriptor) ([]byte, error) {
	data, err := readSmall(s.fsys, blobPath(d.Digest), maxManifest)
	if err != nil {
		return nil, err
	}
	return data, verifyBytes("the manifest", d.Digest.String(), data)
}

func blobPath(h v1.Hash) string { return path.Join("blobs", h.Algorithm, h.Hex) }

// An archiveSource is what `docker save` writes.
type archiveSource struct {
	fsys fs.FS
	name string // of an image in it, or "" where there is only one
}

// manifestName is the list of images in a docker archive (moby image/tarexport).
const manifestName = "manifest.json"

func (s archiveSource) resolve(ctx context.Context, platform string) (*resolved, error) {
	data, err := readSmall(s.fsys, manifestName, maxManifest)
	if isNotExist(err) {
		if _, err := fs.Stat(s.fsys, "index.json"); err == nil {
			return layoutSource(s).resolve(ctx, platform)
		}
		return nil, fmt.Errorf("%w: manifest.json is missing: it is no docker archive, or cut short", ErrCorrupt)
	}
	if err != nil {
		return nil, err
	}
	var images []archiveImage
	if err := json.Unmarshal(data, &images); err != nil {
		return nil, fmt.Errorf("manifest.json: %w: %w", ErrCorrupt, err)
	}
	img, err := s.pick(images)
	if err != nil {
		return nil, err
	}
	r := &resolved{}
	if r.config, err = readSmall(s.fsys, img.Config, maxConfig); err != nil {
		return nil, fmt.Errorf("configuration: %w", err)
	}
	r.id = img.id()
	if m, d := s.manifestOf(r.id); m != nil {
		return layoutSource{s.fsys, ""}.image(m, d)
	}
	for _, name := range img.Layers {
		fi, err := fs.Stat(s.fsys, name)
		if err != nil {
			return nil, fmt.Errorf("layer: %w", err)
		}
		r.blobs = append(r.blobs, blob{
			size: fi.Size(),
			open: func(context.Context) (io.ReadCloser, error) { return openFile(s.fsys, name) },
		})
	}
	return r, nil
}

type archiveImage struct {
	Config   string
	RepoTags []string
	Layers   []string
}

// id is the configuration's digest, which is its name: <hex>.json, blobs/sha256/<hex> since docker 25, sha256:<hex> where
// go-containerregistry wrote the archive.
func (a *archiveImage) id() string {
	return "sha256:" + strings.TrimPrefix(strings.TrimSuffix(path.Base(a.Config), ".json"), "sha256:")
}

func (s archiveSource) pick(images []archiveImage) (*archiveImage, error) {
	var names []string
	for i, img := range images {
		if s.name == "" && len(images) == 1 {
			return &images[i], nil
		}
		for _, tag := range img.RepoTags {
			if s.name != "" && familiar(tag) == familiar(s.name) {
				return &images[i], nil
			}
			names = append(names, familiar(tag))
		}
		if s.name != "" && s.name == img.id() {
			return &images[i], nil
		}
	}
	switch {
	case len(images) == 0:
		return nil, fmt.Errorf("%w: the archive is empty", ErrNotFound)
	case s.name == "":
		return nil, fmt.Errorf("it has several images: say which, one of %q", names)
	}
	return nil, fmt.Errorf("%w: it has no %q, only %q", ErrNotFound, s.name, names)
}

// manifestOf looks for the OCI manifest that archives of docker 25 and later have beside manifest.json: it adds the
// manifest's digest and those of the blobs. Whatever is odd about it only means that they stay unknown.
func (s archiveSource) manifestOf(id string) (*v1.Manifest, v1.Descriptor) {
	data, err := readSmall(s.fsys, "index.json", maxManifest)
	if err != nil {
		return nil, v1.Descriptor{}
	}
	var index v1.IndexManifest
	if json.Unmarshal(data, &index) != nil {
		return nil, v1.Descriptor{}
	}
	for _, d := range index.Manifests[:min(len(index.Manifests), 100)] {
		data, err := layoutSource{fsys: s.fsys}.fetch(context.Background(), d)
		if err != nil {
			continue
		}
		var m v1.Manifest
		if json.Unmarshal(data, &m) == nil && m.Config.Digest.String() == id {
			return &m, d
		}
	}
	return nil, v1.Descriptor{}
}

// openFile opens a regular file: anything else might block or never end.
func openFile(fsys fs.FS, name string) (fs.File, error) {
	if !fs.ValidPath(name) {
		return nil, fmt.Errorf("%w: the name %.200q points out of the image", ErrRefused, name)
	}
	fi, err := fs.Stat(fsys, name)
	if err != nil {
		return nil, err
	}
	if !fi.Mode().IsRegular() {
		return nil, fmt.Errorf("%w: %s is no regular file", ErrRefused, name)
	}
	return fsys.Open(name)
}

func readSmall(fsys fs.FS, name string, limit int64) ([]byte, error) {
	f, err := openFile(fsys, name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return readLimited(name, f, limit)
}

func readLimited(name string, r io.Reader, limit int64) ([]byte, error) {
	data, err := io.ReadAll(io.LimitReader(r, limit+1))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	if int64(len(data)) > limit {
		return nil, fmt.Errorf("%s: %w: more than %s", name, ErrTooLarge, formatSize(limit))
	}
	return data, nil
}
