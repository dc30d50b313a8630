package image

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/internal/durable"
)

const (
	// A layer that is larger than ratioFrom and maxRatio times as large as its blob is taken for a bomb: text
	// compresses 4 to 20 times, gzip ends at 1032, zstd has no bound.
	ratioFrom = 1 << 30
	maxRatio  = 100

	zstdWindow = 128 << 20 // what `zstd --long` uses; docker and containerd write 8 MiB at most

	// spaceEvery is how many bytes are written between two looks at the free space.
	spaceEvery = 4 << 20
	// maxReserve of free space is never touched, or a twentieth of a small file system.
	maxReserve = 1 << 30
)

// A blob is a layer as its source has it.
type blob struct {
	diffID    string // of the uncompressed tar
	digest    string // of the blob; empty where only the diff id is known
	size      int64  // of the blob
	mediaType string // empty where the source names none
	open      func(ctx context.Context) (io.ReadCloser, error)
}

// check refuses what can't be a layer of a Linux image, before anything is fetched.
func (b *blob) check() error {
	if !isDigest(b.diffID) {
		return fmt.Errorf("%w: diff id %.100q is no sha256 digest", ErrCorrupt, b.diffID)
	}
	if b.digest != "" && !isDigest(b.digest) {
		return fmt.Errorf("%w: %.100q is no sha256 digest", ErrCorrupt, b.digest)
	}
	if b.size < 0 {
		return fmt.Errorf("%w: a blob of %d bytes", ErrCorrupt, b.size)
	}
	switch b.mediaType {
	case "",
		"application/vnd.oci.image.layer.v1.tar",
		"application/vnd.oci.image.layer.v1.tar+gzip",
		"application/vnd.oci.image.layer.v1.tar+zstd",
		"application/vnd.docker.image.rootfs.diff.tar",
		"application/vnd.docker.image.rootfs.diff.tar.gzip",
		"application/vnd.docker.image.rootfs.diff.tar.zstd":
		return nil
	}
	return fmt.Errorf("layers of type %.100q are not supported: build the image with plain, gzip or zstd layers", b.mediaType)
}

// A job brings one layer into the cache.
type job struct {
	store    *Store
	session  *session
	blob     blob
	owner    string // see PullOptions.Owner
	maxLayer int64
	budget   *atomic.Int64 // bytes that all layers of the image may still take
	progress func(phase Phase, done, total int64)
}

// ensure returns the layer, from the cache or converted now. Whoever comes while another converts the same layer, in
// this process or another, waits for that one.
func (j *job) ensure(ctx context.Context) (Layer, error) {
	if l, rec, err := j.store.lookUpLayer(j.blob.diffID); err == nil && rec.isFor(j.owner) {
		j.progress(Ready, l.Size, l.Size)
		return l, nil
	}
	path := j.store.layerPath(j.blob.diffID, ".lock")
	lock, err := tryLock(path, lockExclusive, true)
	if lock == nil && err == nil {
		j.progress(Waiting, 0, 0)
		lock, err = lockFile(ctx, path, lockExclusive, true)
	}
	if err != nil {
		return Layer{}, err
	}
	defer lock.release()
	l, rec, err := j.store.lookUpLayer(j.blob.diffID)
	switch {
	case err != nil:
		err = j.convert(ctx)
	case !rec.isFor(j.owner):
		err = j.acquire(ctx, rec)
	}
	if err != nil {
		return Layer{}, spaceError(err, j.store.root)
	}
	if l, err = j.store.readLayer(j.blob.diffID); err != nil {
		return Layer{}, err
	}
	j.progress(Ready, l.Size, l.Size)
	return l, nil
}

// acquire gives a layer that is another's to who can fetch it as well. Knowing its digest is not enough: a registry may claim to have whatever it likes.
func (j *job) acquire(ctx context.Context, rec layerRecord) error {
	dir, err := os.MkdirTemp(j.session.dir, "layer-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	content, err := createSparse(ctx, filepath.Join(dir, "tar"))
	if err != nil {
		return err
	}
	defer content.file.Close()
	if _, err := j.fetch(ctx, content); err != nil {
		return err
	}
	rec.Owners = append(rec.Owners, j.owner)
	if j.owner == "" {
		rec.Owners = nil
	}
	return writeJSON(dir, j.store.layerPath(j.blob.diffID, ".json"), rec)
}

// convert fetches the blob, verifies it, and writes layer and record.
func (j *job) convert(ctx context.Context) error {
	dir, err := os.MkdirTemp(j.session.dir, "layer-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)

	content, err := createSparse(ctx, filepath.Join(dir, "tar"))
	if err != nil {
		return err
	}
	defer content.file.Close()
	t, err := j.fetch(ctx, content)
	if err != nil {
		return err
	}

	total := content.end
	j.progress(Converting, 0, total)
	out, err := createSparse(ctx, filepath.Join(dir, "ext4"))
	if err != nil {
		return err
	}
	defer out.file.Close()
	out.written = func(n int64) { j.progress(Converting, min(n, total), total) }
	if err := writeExt4(t, content.file, out); err != nil {
		return fmt.Errorf("convert to ext4: %w", err)
	}
	sum, err := j.sync(out)
	if err != nil {
		return err
	}

	rec := layerRecord{
		DiffID: j.blob.diffID, Size: out.end, SHA256: sum, TarSize: total, Created: time.Now().UTC().Truncate(time.Second),
	}
	if j.owner != "" {
		rec.Owners = []string{j.owner}
	}
	if err := writeJSON(dir, j.store.layerPath(j.blob.diffID, ".json"), rec); err != nil {
		return err
	}
	path := j.store.layerPath(j.blob.diffID, ".ext4")
	if err := os.Rename(out.file.Name(), path); err != nil {
		return err
	}
	if made, err := identify(path); err == nil {
		noteChecked(strings.TrimSuffix(path, ".ext4"), made)
	}
	return durable.SyncDir(filepath.Dir(path))
}

// sync makes the file durable and read-only and returns its digest.
func (j *job) sync(f *sparseFile) (string, error) {
	var g errgroup.Group
	g.Go(func() error {
		if err := f.file.Chmod(0o444); err != nil {
			return err
		}
		return f.file.Sync()
	})
	h := sha256.New()
	if _, err := io.Copy(h, io.NewSectionReader(f.file, 0, f.end)); err != nil {
		return "", errors.Join(err, g.Wait())
	}
	return hex.EncodeToString(h.Sum(nil)), g.Wait()
}

// fetch writes the uncompressed layer to w and returns its tree, once both digests are what they should be.
func (j *job) fetch(ctx context.Context, w *sparseFile) (*tree, error) {
	// What doesn't compress grows by less than a hundredth.
	if j.blob.size > j.maxLayer+j.maxLayer/100+1<<20 {
		return nil, fmt.Errorf("%w: %s, the limit of one layer is %s", ErrTooLarge, formatSize(j.blob.size), formatSize(j.maxLayer))
	}
	j.progress(Downloading, 0, j.blob.size)
	src, err := j.blob.open(ctx)
	if err != nil {
		return nil, err
	}
	defer src.Close()

	in := &blobReader{src: src, hash: sha256.New(), job: j}
	diff := sha256.New()
	t, err := j.scan(in, diff, w)
	if errors.Is(err, ErrCorrupt) && !in.failed {
		// Bytes that don't decode are most likely not those that were announced: say that rather than the consequence.
		if verr := in.verify(); verr != nil {
			return nil, verr
		}
	}
	if err != nil {
		return nil, err
	}
	if err := in.verify(); err != nil {
		return nil, err
	}
	if got := "sha256:" + hex.EncodeToString(diff.Sum(nil)); got != j.blob.diffID {
		return nil, fmt.Errorf("%w: content has the digest %s, the image says %s", ErrCorrupt, got, j.blob.diffID)
	}
	return t, w.finish()
}

func (j *job) scan(in *blobReader, diff hash.Hash, w *sparseFile) (*tree, error) {
	r, closeReader, err := decompress(in)
	if err != nil {
		return nil, err
	}
	defer closeReader()
	limit := &layerLimit{r: r, in: in, job: j}
	return scanTar(io.TeeReader(limit, io.MultiWriter(diff, w)), layerBounds(j.maxLayer))
}

var (
	gzipMagic = []byte{0x1f, 0x8b}             // RFC 1952 §2.3.1
	zstdMagic = []byte{0x28, 0xb5, 0x2f, 0xfd} // RFC 8878 §3.1.1
)

// decompress tells gzip, zstd and plain tar apart by their first bytes, as docker does: media types in the wild lie, and
// the diff id tells in any case whether the result is right.
func decompress(r io.Reader) (io.Reader, func(), error) {
	br := bufio.NewReaderSize(r, 1<<20)
	magic, err := br.Peek(4)
	if err != nil && err != io.EOF {
		return nil, nil, err
	}
	switch {
	case bytes.HasPrefix(magic, gzipMagic):
		z, err := gzip.NewReader(br)
		if err != nil {
			return nil, nil, decodeError(err)
		}
		return decoder{z}, func() { z.Close() }, nil
	case bytes.Equal(magic, zstdMagic),
		len(magic) == 4 && magic[0]&0xf0 == 0x50 && bytes.Equal(magic[1:], []byte{0x2a, 0x4d, 0x18}): // a skippable frame, §3.1.2
		z, err := zstd.NewReader(br, zstd.WithDecoderMaxWindow(zstdWindow), zstd.WithDecoderConcurrency(1))
		if err != nil {
			return nil, nil, decodeError(err)
		}
		return decoder{z}, z.Close, nil
	}
	return br, func() {}, nil
}

// A decoder marks what a decompressor finds wrong.
type decoder struct{ r io.Reader }

func (d decoder) Read(p []byte) (int, error) {
	n, err := d.r.Read(p)
	return n, decodeError(err)
}

func decodeError(err error) error {
	var source *readError
	switch {
	case err == nil, err == io.EOF, errors.As(err, &source):
		return err
	case errors.Is(err, zstd.ErrWindowSizeExceeded), errors.Is(err, zstd.ErrDecoderSizeExceeded):
		return fmt.Errorf("%w: zstd window of more than %s", ErrTooLarge, formatSize(zstdWindow))
	case errors.Is(err, io.ErrUnexpectedEOF):
		return fmt.Errorf("%w: the compressed data ends too early", ErrCorrupt)
	}
	return fmt.Errorf("%w: does not decompress: %w", ErrCorrupt, err)
}

// A readError is one of the source, not of the bytes that came.
type readError struct{ err error }

func (e *readError) Error() string { return e.err.Error() }
func (e *readError) Unwrap() error { return e.err }

// A blobReader reads a blob, no further than its announced size, and keeps its digest.
type blobReader struct {
	src    io.Reader
	hash   hash.Hash
	n      int64
	failed bool
	job    *job
}

func (b *blobReader) Read(p []byte) (int, error) {
	size := b.job.blob.size
	if b.n >= size {
		return 0, io.EOF
	}
	p = p[:min(int64(len(p)), size-b.n)]
	n, err := b.src.Read(p)
	b.hash.Write(p[:n])
	b.n += int64(n)
	b.job.progress(Downloading, b.n, size)
	if err != nil && err != io.EOF {
		b.failed = true
		if errors.Is(err, io.ErrUnexpectedEOF) {
			err = fmt.Errorf("%w: truncated: it ends after %d of %d bytes: pull it again", ErrCorrupt, b.n, size)
		}
		err = &readError{err}
	}
	return n, err
}

// verify reads what the decompressor left over and compares size and digest.
func (b *blobReader) verify() error {
	if _, err := io.Copy(io.Discard, b); err != nil {
		return err
	}
	want := b.job.blob
	if b.n < want.size {
		return fmt.Errorf("%w: truncated: %d of %d bytes: pull it again or rebuild the image", ErrCorrupt, b.n, want.size)
	}
	if got := "sha256:" + hex.EncodeToString(b.hash.Sum(nil)); want.digest != "" && got != want.digest {
		return fmt.Errorf("%w: blob has the digest %s, the manifest says %s: pull it again or push the image anew", ErrCorrupt, got, want.digest)
	}
	return nil
}

// A layerLimit ends a layer that grows out of bounds.
type layerLimit struct {
	r   io.Reader
	in  *blobReader
	job *job
	n   int64
}

func (l *layerLimit) Read(p []byte) (int, error) {
	n, err := l.r.Read(p)
	l.n += int64(n)
	switch {
	case l.n > l.job.maxLayer:
		return 0, fmt.Errorf("%w: more than %s uncompressed, the limit of one layer", ErrTooLarge, formatSize(l.job.maxLayer))
	case l.job.budget.Add(-int64(n)) < 0:
		return 0, fmt.Errorf("%w: the image's layers take more than the limit uncompressed", ErrTooLarge)
	case l.n > ratioFrom && l.n/maxRatio > l.in.n:
		return 0, fmt.Errorf("%w: %s uncompressed out of %s: taken for a decompression bomb", ErrTooLarge, formatSize(l.n), formatSize(l.in.n))
	}
	return n, err
}

// A sparseFile is written with holes where there would be blocks of zeros, and only while the file system has room.
//
// The file is no embedded field: its ReadFrom would go past Write.
type sparseFile struct {
	file    *os.File
	ctx     context.Context
	pos     int64
	end     int64 // of the content
	disk    int64 // bytes written since the last look at the free space
	written func(end int64)
}

func createSparse(ctx context.Context, path string) (*sparseFile, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	return &sparseFile{file: f, ctx: ctx, disk: spaceEvery}, nil
}

var zeros [ext4Block]byte

func (s *sparseFile) Write(p []byte) (int, error) {
	if err := s.ctx.Err(); err != nil {
		return 0, context.Cause(s.ctx)
	}
	for rest := p; len(rest) > 0; {
		n := s.run(rest)
		if hole := s.pos >= s.end && isZero(rest[:n]); !hole {
			if err := s.room(n); err != nil {
				return len(p) - len(rest), err
			}
			if _, err := s.file.WriteAt(rest[:n], s.pos); err != nil {
				return len(p) - len(rest), err
			}
		}
		s.pos += int64(n)
		s.end = max(s.end, s.pos)
		rest = rest[n:]
	}
	if s.written != nil {
		s.written(s.end)
	}
	return len(p), nil
}

// run is the length of what can be written at once: a zero block, or everything up to the next one.
func (s *sparseFile) run(p []byte) int {
	first := ext4Block - int(s.pos%ext4Block)
	if first >= len(p) {
		return len(p)
	}
	zero := isZero(p[:first])
	n := first
	for n < len(p) && isZero(p[n:min(n+ext4Block, len(p))]) == zero {
		n += ext4Block
	}
	return min(n, len(p))
}

func isZero(p []byte) bool {
	for len(p) > len(zeros) {
		if !bytes.Equal(p[:len(zeros)], zeros[:]) {
			return false
		}
		p = p[len(zeros):]
	}
	return bytes.Equal(p, zeros[:len(p)])
}

// room fails where writing on would leave less than the reserve.
func (s *sparseFile) room(n int) error {
	if s.disk += int64(n); s.disk < spaceEvery {
		return nil
	}
	s.disk = 0
	return checkSpace(filepath.Dir(s.file.Name()), int64(n))
}

func checkSpace(dir string, want int64) error {
	free, total, err := freeSpace(dir)
	if err != nil {
		return err
	}
	if reserve := min(maxReserve, total/20); free-want < reserve {
		return fmt.Errorf("%w: %s free at %s, of which %s stay reserved: free some, or run kcradle images gc",
			ErrNoSpace, formatSize(free), dir, formatSize(reserve))
	}
	return nil
}

// spaceError gives a full disk the words that checkSpace uses.
func spaceError(err error, dir string) error {
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		return fmt.Errorf("%w at %s: free some, or run kcradle images gc: %w", ErrNoSpace, dir, err)
	}
	return err
}

// finish gives the file its size, also where it ends in a hole.
func (s *sparseFile) finish() error { return s.file.Truncate(s.end) }

func (s *sparseFile) Seek(offset int64, whence int) (int64, error) {
	switch whence {
	case io.SeekCurrent:
		offset += s.pos
	case io.SeekEnd:
		offset += s.end
	}
	if offset < 0 {
		return 0, os.ErrInvalid
	}
	s.pos = offset
	return offset, nil
}

func (s *sparseFile) Read(p []byte) (int, error) {
	n, err := s.file.ReadAt(p, s.pos)
	s.pos += int64(n)
	return n, err
}

// verifyBytes checks that data has the digest.
func verifyBytes(what, digest string, data []byte) error {
	sum := sha256.Sum256(data)
	if got := hex.EncodeToString(sum[:]); got != strings.TrimPrefix(digest, "sha256:") {
		return fmt.Errorf("%w: %s has the digest sha256:%s instead of %s", ErrCorrupt, what, got, digest)
	}
	return nil
}
