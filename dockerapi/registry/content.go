package registry

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"path"
	"strconv"
	"strings"
	"syscall"

	"github.com/distribution/distribution/v3"
	"github.com/distribution/distribution/v3/registry/storage"
	"github.com/distribution/reference"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/klauspost/pgzip"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Docker's media types of schema 2 (distribution docs/spec/manifest-v2-2): what docker push has always sent, and every registry takes.
const (
	mediaTypeDockerManifest = "application/vnd.docker.distribution.manifest.v2+json"
	mediaTypeDockerConfig   = "application/vnd.docker.container.image.v1+json"
	mediaTypeDockerLayer    = "application/vnd.docker.image.rootfs.diff.tar.gzip"
)

// A platform is one as docker writes it.
type platform struct{ os, architecture, variant string }

func parsePlatform(s string) (platform, error) {
	parts := strings.Split(s, "/")
	if len(parts) < 2 || len(parts) > 3 || parts[0] == "" || parts[1] == "" {
		return platform{}, errorf(ErrInvalid, "%.100q is no platform: write one as linux/amd64", s)
	}
	return platform{parts[0], parts[1], strings.Join(parts[2:], "")}, nil
}

func (p platform) String() string {
	return strings.TrimSuffix(p.os+"/"+p.architecture+"/"+p.variant, "/")
}

// matches tells whether an index's entry is for the platform; one that does not say is.
func (p platform) matches(o *ocispec.Platform) bool {
	return o == nil || o.OS == p.os && o.Architecture == p.architecture && (p.variant == "" || o.Variant == "" || o.Variant == p.variant)
}

// A fact is what a layer's blob does not say of itself: what is in it when it is unpacked. It is kept beside the blobs, by digest.
type fact struct {
	diffID digest.Digest
	size   int64 // of the files in the tar, docker's idea of a layer's size
}

func factPath(d digest.Digest) string {
	return path.Join("/cradlestack/layers/sha256", d.Encoded()[:2], d.Encoded())
}

func (r *Registry) putFact(ctx context.Context, d digest.Digest, f fact) error {
	r.cache.facts.Add(d, f)
	return r.driver.PutContent(ctx, factPath(d), []byte(f.diffID.String()+" "+strconv.FormatInt(f.size, 10)+"\n"))
}

// getFact returns what is known of a layer.
func (r *Registry) getFact(ctx context.Context, d digest.Digest) (fact, bool) {
	if f, ok := r.cache.facts.Get(d); ok {
		return f, true
	}
	data, err := r.driver.GetContent(ctx, factPath(d))
	if err != nil {
		return fact{}, false
	}
	f, ok := parseFact(string(data))
	if ok {
		r.cache.facts.Add(d, f)
	}
	return f, ok
}

func parseFact(s string) (fact, bool) {
	id, size, ok := strings.Cut(strings.TrimSuffix(s, "\n"), " ")
	n, err := strconv.ParseInt(size, 10, 64)
	f := fact{digest.Digest(id), n}
	return f, ok && err == nil && n >= 0 && f.diffID.Validate() == nil
}

// unpackedSize is what a layer takes when it is unpacked. One that was pushed to the registry from outside is unpacked for that once; one that can't be counts as it is.
func (r *Registry) unpackedSize(ctx context.Context, repo string, l Layer) (int64, error) {
	f, ok := r.getFact(ctx, l.Digest)
	if ok {
		return f.size, nil
	}
	f, err := r.measure(ctx, repo, l, nil)
	if errors.Is(err, ErrInvalid) {
		return l.Descriptor.Size, nil
	}
	return f.size, err
}

// measure unpacks a layer, checks it against its diff id, and keeps what it finds.
func (r *Registry) measure(ctx context.Context, repo string, l Layer, progress func(done int64)) (fact, error) {
	opened, err := r.open(ctx, repo)
	if err != nil {
		return fact{}, err
	}
	blob, err := opened.Blobs(ctx).Open(ctx, l.Digest)
	if err != nil {
		return fact{}, fmt.Errorf("layer %s: %w", l.Digest, err)
	}
	defer blob.Close()
	f, err := r.unpack(&progressReader{Reader: blob, ctx: ctx, report: progress})
	if err != nil {
		return fact{}, fmt.Errorf("layer %s: %w", l.Digest, err)
	}
	if err := r.putFact(ctx, l.Digest, f); err != nil {
		return fact{}, err
	}
	if f.diffID != l.DiffID {
		return fact{}, errorf(ErrInvalid, "layer %s: it contains %s, but the configuration says %s", l.Digest, f.diffID, l.DiffID)
	}
	return f, nil
}

// unpack reads a layer, compressed or not, to its end.
func (r *Registry) unpack(compressed io.Reader) (fact, error) {
	plain, err := decompress(compressed)
	if err != nil {
		return fact{}, err
	}
	defer plain.Close()
	return r.scan(plain)
}

// scan reads a layer's tar to its end, and passes it on as it is.
func (r *Registry) scan(plain io.Reader, to ...io.Writer) (fact, error) {
	h := sha256.New()
	limited := &io.LimitedReader{R: plain, N: r.MaxLayer + 1}
	all := io.TeeReader(limited, io.MultiWriter(append(to, h)...))
	var files int64
	t := tar.NewReader(all)
	err := func() error {
		for {
			e, err := t.Next()
			if err == io.EOF {
				// What is behind the end of the tar belongs to what the diff id is of.
				_, err = io.Copy(io.Discard, all)
				return err
			}
			if err != nil {
				return err
			}
			if e.Typeflag == tar.TypeReg {
				files += e.Size
			}
		}
	}()
	if limited.N <= 0 {
		return fact{}, errorf(ErrInvalid, "it has more than %d bytes when it is unpacked", r.MaxLayer)
	}
	var errno syscall.Errno // of storage: what is packed has nothing to do with it
	switch {
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded), errors.As(err, &errno):
		return fact{}, err
	case err != nil:
		return fact{}, errorf(ErrInvalid, "it can't be unpacked: %v", err)
	}
	return fact{digest.NewDigest(digest.SHA256, h), files}, nil
}

// decompress unpacks a stream that is packed, as its beginning tells.
func decompress(r io.Reader) (io.ReadCloser, error) {
	b := bufio.NewReaderSize(r, 64<<10)
	magic, err := b.Peek(4)
	if err != nil && err != io.EOF {
		return nil, err
	}
	switch {
	case bytes.HasPrefix(magic, []byte{0x1f, 0x8b}):
		z, err := gzip.NewReader(b)
		if err != nil {
			return nil, errorf(ErrInvalid, "it is no valid gzip: %v", err)
		}
		return z, nil
	case bytes.HasPrefix(magic, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		z, err := zstd.NewReader(b, zstd.WithDecoderMaxMemory(256<<20), zstd.WithDecoderMaxWindow(128<<20), zstd.WithDecoderConcurrency(1))
		if err != nil {
			return nil, errorf(ErrInvalid, "it is no valid zstd: %v", err)
		}
		return z.IOReadCloser(), nil
	}
	return io.NopCloser(b), nil
}

// A progressReader tells how much has been read, and ends with the context.
type progressReader struct {
	io.Reader
	ctx    context.Context
	report func(done int64)
	done   int64
}

func (p *progressReader) Read(b []byte) (int, error) {
	if p.ctx.Err() != nil {
		return 0, context.Cause(p.ctx)
	}
	n, err := p.Reader.Read(b)
	p.done += int64(n)
	if p.report != nil {
		p.report(p.done)
	}
	return n, err
}

// has tells whether a repository has a blob.
func (r *Registry) has(ctx context.Context, repo string, d digest.Digest) (bool, error) {
	opened, err := r.open(ctx, repo)
	if err != nil {
		return false, err
	}
	_, err = opened.Blobs(ctx).Stat(ctx, d)
	if isAbsent(err) {
		return false, nil
	}
	return err == nil, err
}

// link makes a blob that one repository has one of another's of the same namespace. The link is new then, even where there was one: for the collector it is
// as young as an upload.
func (r *Registry) link(ctx context.Context, from, to string, d digest.Digest) error {
	name, err := reference.WithName(from)
	if err != nil {
		return err
	}
	source, err := reference.WithDigest(name, d)
	if err != nil {
		return err
	}
	opened, err := r.open(ctx, to)
	if err != nil {
		return err
	}
	r.gate.RLock()
	defer r.gate.RUnlock()
	w, err := opened.Blobs(ctx).Create(ctx, storage.WithMountFrom(source))
	var mounted distribution.ErrBlobMounted
	if errors.As(err, &mounted) {
		return nil
	}
	if err != nil {
		return err
	}
	_ = w.Cancel(ctx) // an upload, begun in place of what was not there
	return fmt.Errorf("blob %s: %w", d, distribution.ErrBlobUnknown)
}

// putBytes stores a small blob.
func (r *Registry) putBytes(ctx context.Context, repo, mediaType string, data []byte) error {
	opened, err := r.open(ctx, repo)
	if err != nil {
		return err
	}
	r.gate.RLock()
	defer r.gate.RUnlock()
	_, err = opened.Blobs(ctx).Put(ctx, mediaType, data)
	return err
}

// putManifest stores a manifest and, unless tag is "", makes tag mean it. What it refers to has to be there.
func (r *Registry) putManifest(ctx context.Context, repo, mediaType string, data []byte, tag string) error {
	m, desc, err := distribution.UnmarshalManifest(mediaType, data)
	if err != nil {
		return errorf(ErrInvalid, "manifest: %v", err)
	}
	opened, err := r.open(ctx, repo)
	if err != nil {
		return err
	}
	manifests, err := opened.Manifests(ctx)
	if err != nil {
		return err
	}
	r.gate.RLock()
	defer r.gate.RUnlock()
	if _, err := manifests.Put(ctx, m); err != nil {
		return fmt.Errorf("manifest %s: %w", desc.Digest, err)
	}
	if tag == "" {
		return nil
	}
	return opened.Tags(ctx).Tag(ctx, tag, desc)
}

// A storedLayer is a layer that has come as a stream.
type storedLayer struct {
	ocispec.Descriptor
	fact
}

// putLayer stores a layer: one that is packed as it is, a plain tar packed with gzip. Reading it stops at the first byte too many.
func (r *Registry) putLayer(ctx context.Context, repo string, content io.Reader) (_ storedLayer, err error) {
	opened, err := r.open(ctx, repo)
	if err != nil {
		return storedLayer{}, err
	}
	w, err := opened.Blobs(ctx).Create(ctx)
	if err != nil {
		return storedLayer{}, err
	}
	done := false
	defer func() {
		if !done {
			_ = w.Cancel(context.WithoutCancel(ctx))
		}
	}()
	content = &progressReader{Reader: io.LimitReader(content, r.MaxLayer+1), ctx: ctx}
	b := bufio.NewReaderSize(content, 64<<10)
	magic, _ := b.Peek(4)
	packedHash := sha256.New()
	packed := io.MultiWriter(w, packedHash)
	mediaType := mediaTypeDockerLayer
	var f fact
	switch {
	case bytes.HasPrefix(magic, []byte{0x1f, 0x8b}), bytes.HasPrefix(magic, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		if magic[0] == 0x28 {
			mediaType = ocispec.MediaTypeImageLayerZstd
		}
		f, err = r.unpack(io.TeeReader(b, packed))
		if err == nil { // what follows the compressed stream is part of the blob
			_, err = io.Copy(packed, b)
		}
	default:
		f, err = r.pack(packed, b)
	}
	if err != nil {
		return storedLayer{}, err
	}
	d := digest.NewDigest(digest.SHA256, packedHash)
	r.gate.RLock()
	defer r.gate.RUnlock()
	desc, err := w.Commit(ctx, ocispec.Descriptor{Digest: d})
	if err != nil {
		return storedLayer{}, fmt.Errorf("blob %s: %w", d, err)
	}
	done = true
	desc.MediaType = mediaType
	return storedLayer{desc, f}, r.putFact(ctx, d, f)
}

// pack compresses a plain tar. The same tar always becomes the same blob.
func (r *Registry) pack(to io.Writer, plain io.Reader) (fact, error) {
	z, err := pgzip.NewWriterLevel(to, pgzip.BestSpeed)
	if err != nil {
		return fact{}, err
	}
	f, err := r.scan(plain, z)
	return f, errors.Join(err, z.Close())
}

// Size is what the files of the image's layers take together.
func (s *Images) Size(ctx context.Context, i *Image) (int64, error) {
	var total int64
	for _, l := range i.Layers {
		n, err := s.unpackedSize(ctx, i.repo, l)
		if err != nil {
			return 0, err
		}
		total += n
	}
	return total, nil
}
