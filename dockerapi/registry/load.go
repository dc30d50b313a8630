package registry

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"

	"github.com/distribution/reference"
	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	// maxEntries bounds the files of an archive: some per layer of the images in it.
	maxEntries = 1 << 16
	// maxSmall is the size up to which a file may be one that describes others; all of them together have maxDescriptions.
	maxSmall        = maxConfig
	maxDescriptions = 64 << 20
	// maxIndexDepth bounds indexes of indexes.
	maxIndexDepth = 4
)

// A Loaded is one image of an archive.
type Loaded struct {
	ID   digest.Digest
	Name reference.NamedTagged // nil where the archive names none: the image is known by its id then
}

// Load reads an archive, of docker save (image-spec of docker, v1.2) or an OCI image layout, compressed or not. It is read once, from its beginning to its end, and
// never written to a disk as it is: layers become blobs as they pass.
func (s *Images) Load(ctx context.Context, r io.Reader) ([]Loaded, error) {
	plain, err := decompress(&progressReader{Reader: r, ctx: ctx})
	if err != nil {
		return nil, err
	}
	defer plain.Close()
	l := &loader{Images: s, repo: s.root + "/" + dangling, files: map[string]*archiveFile{}, links: map[string]string{}}
	if err := l.read(ctx, tar.NewReader(plain)); err != nil {
		return nil, fmt.Errorf("load: %w", err)
	}
	found, err := l.images(ctx)
	if err != nil {
		return nil, fmt.Errorf("load: %w", err)
	}
	return found, nil
}

// A loader is one Load.
type loader struct {
	*Images
	repo  string // that gets what has no name, and at first everything
	files map[string]*archiveFile
	links map[string]string // links of the archive, to names in it
	held  int               // bytes in memory
}

// An archiveFile is one of the archive: in memory, as it may describe others, or stored as a layer, or both.
type archiveFile struct {
	data  []byte
	layer *storedLayer
}

// read takes the archive in. What names say is only looked at as text: nothing of it is a path of this machine.
func (l *loader) read(ctx context.Context, t *tar.Reader) error {
	for n := 0; ; n++ {
		h, err := t.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err != nil {
			return errorf(ErrInvalid, "the archive can't be read: %v", err)
		}
		if n >= maxEntries {
			return errorf(ErrInvalid, "the archive has more than %d files", maxEntries)
		}
		name, ok := inside("", h.Name)
		if !ok {
			return errorf(ErrInvalid, "the archive's %.200q points out of it", h.Name)
		}
		switch h.Typeflag {
		case tar.TypeReg:
			err = l.file(ctx, name, h.Size, t)
		case tar.TypeSymlink:
			// docker save of earlier versions links equal layers: ../<id>/layer.tar
			if target, ok := inside(path.Dir(name), h.Linkname); ok {
				l.links[name] = target
			}
		case tar.TypeLink:
			if target, ok := inside("", h.Linkname); ok {
				l.links[name] = target
			}
		}
		if err != nil {
			return fmt.Errorf("%.200s: %w", name, err)
		}
	}
}

// inside cleans a name of the archive's; false where it leads out of it.
func inside(folder, name string) (string, bool) {
	if strings.HasPrefix(name, "/") || strings.ContainsRune(name, 0) {
		return "", false
	}
	clean := path.Join(folder, name)
	return clean, clean != ".." && !strings.HasPrefix(clean, "../")
}

// file keeps a small file that may be JSON in memory, and stores any other as a layer.
func (l *loader) file(ctx context.Context, name string, size int64, content io.Reader) error {
	b := bufio.NewReaderSize(content, 512)
	begin, err := b.Peek(int(min(size, 512)))
	if err != nil && !errors.Is(err, io.EOF) {
		return errorf(ErrInvalid, "the archive can't be read: %v", err)
	}
	begin = bytes.TrimLeft(begin, " \t\r\n")
	if size <= maxSmall && (len(begin) == 0 || begin[0] == '{' || begin[0] == '[') {
		if l.held += int(size); l.held > maxDescriptions {
			return errorf(ErrInvalid, "the archive has more than %d bytes of descriptions", maxDescriptions)
		}
		data, err := io.ReadAll(b)
		if err != nil {
			return errorf(ErrInvalid, "the archive can't be read: %v", err)
		}
		l.files[name] = &archiveFile{data: data}
		return nil
	}
	if !isLayer(begin) {
		return nil // VERSION files and the like
	}
	stored, err := l.putLayer(ctx, l.repo, b)
	if err != nil {
		return err
	}
	l.files[name] = &archiveFile{layer: &stored}
	return nil
}

// isLayer tells by how a file begins whether it can be one: packed, or a tar, of which the first header's magic is looked at (or its end, in an empty one).
func isLayer(begin []byte) bool {
	return bytes.HasPrefix(begin, []byte{0x1f, 0x8b}) || bytes.HasPrefix(begin, []byte{0x28, 0xb5, 0x2f, 0xfd}) ||
		len(begin) >= 262 && bytes.Equal(begin[257:262], []byte("ustar")) || len(begin) == 512 && len(bytes.Trim(begin, "\x00")) == 0
}

// open is a file of the archive, through its links.
func (l *loader) lookup(name string) *archiveFile {
	name = path.Clean(name)
	for range 8 {
		if f := l.files[name]; f != nil {
			return f
		}
		target, ok := l.links[name]
		if !ok {
			return nil
		}
		name = target
	}
	return nil
}

func (l *loader) images(ctx context.Context) ([]Loaded, error) {
	if f := l.lookup("manifest.json"); f != nil && f.data != nil {
		return l.docker(ctx, f.data)
	}
	if f := l.lookup("index.json"); f != nil && f.data != nil {
		return l.layout(ctx, f.data)
	}
	return nil, errorf(ErrInvalid, "the archive has neither manifest.json nor index.json: it is no archive of images, or cut short")
}

// An archiveManifest is one image in manifest.json.
type archiveManifest struct {
	Config   string
	RepoTags []string
	Layers   []string
}

func parseArchiveManifest(data []byte) ([]archiveManifest, error) {
	var all []archiveManifest
	if err := json.Unmarshal(data, &all); err != nil {
		return nil, errorf(ErrInvalid, "manifest.json: %v", err)
	}
	for _, m := range all {
		if len(m.Layers) > maxLayers {
			return nil, errorf(ErrInvalid, "manifest.json: an image has %d layers, at most %d can be stacked", len(m.Layers), maxLayers)
		}
	}
	return all, nil
}

// docker makes the images of docker save's manifest.json.
func (l *loader) docker(ctx context.Context, data []byte) ([]Loaded, error) {
	manifests, err := parseArchiveManifest(data)
	if err != nil {
		return nil, err
	}
	if len(manifests) > l.MaxImages {
		return nil, errorf(ErrInvalid, "the archive has %d images, at most %d are taken", len(manifests), l.MaxImages)
	}
	var all []Loaded
	for _, m := range manifests {
		config := l.lookup(m.Config)
		if config == nil || config.data == nil {
			return nil, errorf(ErrInvalid, "configuration %.200q is missing: the archive is cut short, or none of docker's", m.Config)
		}
		layers := make([]storedLayer, 0, len(m.Layers))
		for _, name := range m.Layers {
			f := l.lookup(name)
			if f == nil || f.layer == nil {
				return nil, errorf(ErrInvalid, "layer %.200q is missing: the archive is cut short", name)
			}
			layers = append(layers, *f.layer)
		}
		found, err := l.add(ctx, config.data, layers, m.RepoTags)
		if err != nil {
			return nil, err
		}
		all = append(all, found...)
	}
	return all, nil
}

// layout makes the images of an OCI layout's index.json.
func (l *loader) layout(ctx context.Context, data []byte) ([]Loaded, error) {
	var index ocispec.Index
	if err := json.Unmarshal(data, &index); err != nil {
		return nil, errorf(ErrInvalid, "index.json: %v", err)
	}
	if len(index.Manifests) > l.MaxImages {
		return nil, errorf(ErrInvalid, "the archive has %d images, at most %d are taken", len(index.Manifests), l.MaxImages)
	}
	var all []Loaded
	for _, d := range index.Manifests {
		if d.Platform != nil && d.Platform.OS == "unknown" {
			continue
		}
		m, err := l.chosen(d, maxIndexDepth)
		if err != nil {
			return nil, err
		}
		if m == nil {
			continue
		}
		config := l.blob(m.Config.Digest)
		if config == nil || config.data == nil {
			return nil, errorf(ErrInvalid, "configuration %.100q is missing: the layout is cut short", m.Config.Digest)
		}
		var layers []storedLayer
		for _, d := range m.Layers {
			f := l.blob(d.Digest)
			if f == nil || f.layer == nil {
				return nil, errorf(ErrInvalid, "layer %.100q is missing: the layout is cut short", d.Digest)
			}
			layers = append(layers, *f.layer)
		}
		var names []string
		// The names that docker's containerd store and buildkit give; the OCI's own is only a tag, of no repository.
		if n := d.Annotations["io.containerd.image.name"]; n != "" {
			names = []string{n}
		} else if n := d.Annotations[ocispec.AnnotationRefName]; strings.ContainsAny(n, "/:") {
			names = []string{n}
		}
		found, err := l.add(ctx, config.data, layers, names)
		if err != nil {
			return nil, err
		}
		all = append(all, found...)
	}
	return all, nil
}

// blob is the layout's file of a digest. That it has the digest is checked where it is JSON; a layer is stored by its own anyway.
func (l *loader) blob(d digest.Digest) *archiveFile {
	if d.Validate() != nil || d.Algorithm() != digest.SHA256 {
		return nil
	}
	f := l.lookup("blobs/sha256/" + d.Encoded())
	if f == nil || f.data != nil && digest.FromBytes(f.data) != d {
		return nil
	}
	return f
}

// chosen follows indexes to the manifest of the nodes' platform; nil where there is none.
func (l *loader) chosen(d ocispec.Descriptor, depth int) (*manifest, error) {
	if depth == 0 {
		return nil, errorf(ErrInvalid, "more than %d indexes inside each other", maxIndexDepth)
	}
	f := l.blob(d.Digest)
	if f == nil || f.data == nil {
		return nil, nil // an index may name more than a layout has
	}
	m, err := parseManifest(d.MediaType, f.data)
	if err != nil {
		return nil, fmt.Errorf("manifest %s: %w", d.Digest, err)
	}
	if !m.isIndex() {
		switch m.Config.MediaType {
		case ocispec.MediaTypeImageConfig, mediaTypeDockerConfig:
			return m, nil
		}
		return nil, nil
	}
	for _, e := range m.Entries[:min(len(m.Entries), 64)] {
		if e.Platform != nil && !l.platform.matches(e.Platform) {
			continue
		}
		if m, err := l.chosen(e, depth-1); err != nil || m != nil {
			return m, err
		}
	}
	return nil, nil
}

// add makes an image of a configuration and its layers, under each of its names.
func (l *loader) add(ctx context.Context, config []byte, layers []storedLayer, names []string) ([]Loaded, error) {
	var c dockerspec.DockerOCIImage
	if err := json.Unmarshal(config, &c); err != nil {
		return nil, errorf(ErrInvalid, "configuration: %v", err)
	}
	if len(c.RootFS.DiffIDs) != len(layers) {
		return nil, errorf(ErrInvalid, "%d layers, but the configuration names %d", len(layers), len(c.RootFS.DiffIDs))
	}
	for i, d := range c.RootFS.DiffIDs {
		if layers[i].diffID != d {
			return nil, errorf(ErrInvalid, "layer %d contains %s, but the configuration says %.100s", i+1, layers[i].diffID, d)
		}
	}
	if len(names) > 128 {
		return nil, errorf(ErrInvalid, "an image with %d names", len(names))
	}
	var all []Loaded
	for _, s := range names {
		n, err := ParseName(s)
		if err != nil {
			return nil, err
		}
		tagged, ok := n.(reference.NamedTagged)
		if !ok {
			return nil, errorf(ErrInvalid, "%.200q is no name with a tag", s)
		}
		if err := l.put(ctx, config, layers, tagged); err != nil {
			return nil, err
		}
		all = append(all, Loaded{digest.FromBytes(config), tagged})
	}
	if all != nil {
		return all, nil
	}
	return []Loaded{{ID: digest.FromBytes(config)}}, l.put(ctx, config, layers, nil)
}

// put makes an image of a configuration and layers that are in the repository of what has no name.
func (s *Images) put(ctx context.Context, config []byte, layers []storedLayer, n reference.NamedTagged) error {
	from := s.root + "/" + dangling
	to, tag := from, ""
	if n != nil {
		repo, err := repository(s.root, n)
		if err != nil {
			return err
		}
		to, tag = repo.Name(), n.Tag()
	}
	m := ocispec.Manifest{MediaType: mediaTypeDockerManifest, Layers: []ocispec.Descriptor{}}
	m.SchemaVersion = 2
	m.Config = ocispec.Descriptor{MediaType: mediaTypeDockerConfig, Digest: digest.FromBytes(config), Size: int64(len(config))}
	for _, l := range layers {
		if l.MediaType == ocispec.MediaTypeImageLayerZstd { // which docker's media types don't know
			m.MediaType, m.Config.MediaType = ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageConfig
		}
	}
	for _, l := range layers {
		d := ocispec.Descriptor{MediaType: l.MediaType, Digest: l.Digest, Size: l.Descriptor.Size}
		if m.MediaType == ocispec.MediaTypeImageManifest && l.MediaType == mediaTypeDockerLayer {
			d.MediaType = ocispec.MediaTypeImageLayerGzip
		}
		m.Layers = append(m.Layers, d)
		if err := s.link(ctx, from, to, l.Digest); err != nil {
			return err
		}
	}
	data, err := json.Marshal(m)
	if err != nil {
		return err
	}
	if err := s.putBytes(ctx, to, m.Config.MediaType, config); err != nil {
		return err
	}
	return s.putManifest(ctx, to, m.MediaType, data, tag)
}
