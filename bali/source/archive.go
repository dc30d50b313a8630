package source

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"

	"github.com/cradlestack/cradlestack/bali/seal"
)

// DockerArchive gathers from what docker save writes, as it comes: each layer is
// unpacked into the one temporary file when it passes, before the manifest at
// the end says where it belongs. Which layer is which is said by its digest,
// whatever the archive calls it.
func DockerArchive(ctx context.Context, stream io.Reader, o Options) (_ *Rootfs, err error) {
	r, err := newRootfs(o)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			r.Close()
			err = fmt.Errorf("docker-archive: %w", err)
		}
	}()
	a := archive{layers: make(map[v1.Hash][]member), texts: make(map[string][]byte)}
	if err := a.read(ctx, r, stream); err != nil {
		return nil, err
	}
	cfg, err := a.config()
	if err != nil {
		return nil, err
	}
	if err := r.configure(cfg, "docker-archive"); err != nil {
		return nil, err
	}
	for i, id := range cfg.RootFS.DiffIDs {
		members, ok := a.layers[id]
		if !ok {
			return nil, fmt.Errorf("layer %d of %d, %s, is not in it", i+1, len(cfg.RootFS.DiffIDs), id)
		}
		if err := r.lay(members, i+1); err != nil {
			return nil, fmt.Errorf("layer %d of %d: %w", i+1, len(cfg.RootFS.DiffIDs), err)
		}
	}
	r.Size = r.sum(r.top, make(map[*inode]bool))
	return r, nil
}

// archive is what has come of one.
type archive struct {
	layers map[v1.Hash][]member // by the digest of the uncompressed layer
	texts  map[string][]byte    // manifest.json, and what may be a configuration, by name
	kept   int64
}

const (
	maxText  = 4 << 20 // registries take no larger configuration
	maxTexts = 64 << 20
)

func (a *archive) read(ctx context.Context, r *Rootfs, stream io.Reader) error {
	z, err := uncompressed(stream)
	if err != nil {
		return err
	}
	defer z.Close()
	t := tar.NewReader(z)
	for {
		h, err := t.Next()
		if errors.Is(err, io.EOF) {
			// whoever writes it must not find the pipe closed
			_, err = io.Copy(io.Discard, z)
			return err
		}
		if err != nil {
			return err
		}
		if h.Typeflag != tar.TypeReg || h.Size == 0 {
			continue // folders, and links to layers, which are found without
		}
		if err := a.file(ctx, r, path.Clean(h.Name), t, h.Size); err != nil {
			return fmt.Errorf("%s: %w", h.Name, err)
		}
	}
}

// file takes one in: JSON, which begins with a brace or bracket, or a layer.
func (a *archive) file(ctx context.Context, r *Rootfs, name string, content io.Reader, size int64) error {
	b := bufio.NewReaderSize(content, 64<<10)
	head, err := b.Peek(512)
	if err != nil && !errors.Is(err, io.EOF) || len(head) == 0 {
		return errors.Join(err, io.ErrUnexpectedEOF)
	}
	// a tar's magic, after a first member that may have any name
	isTar := len(head) == 512 && bytes.HasPrefix(head[257:], []byte("ustar"))
	if !isTar && strings.ContainsRune("{[", rune(head[0])) || path.Base(name) == "VERSION" {
		if size > maxText {
			return nil // attestations may be large
		}
		if a.kept += size; a.kept > maxTexts {
			return fmt.Errorf("%w: more than %d bytes of JSON", seal.ErrTooLarge, maxTexts)
		}
		a.texts[name], err = io.ReadAll(b)
		return err
	}
	z, err := uncompressed(b)
	if err != nil {
		return err
	}
	defer z.Close()
	sum := sha256.New()
	members, err := r.read(ctx, io.TeeReader(z, sum))
	if err != nil {
		return err
	}
	id := v1.Hash{Algorithm: "sha256", Hex: hex.EncodeToString(sum.Sum(nil))}
	a.layers[id] = members
	return nil
}

// config is the configuration of the one image.
func (a *archive) config() (*v1.ConfigFile, error) {
	b, ok := a.texts["manifest.json"]
	if !ok {
		return nil, errors.New("it has no manifest.json: make it with docker save")
	}
	var images []struct{ Config string }
	if err := json.Unmarshal(b, &images); err != nil {
		return nil, fmt.Errorf("manifest.json: %w", err)
	}
	if len(images) != 1 {
		return nil, fmt.Errorf("it holds %d images: docker save one alone", len(images))
	}
	name := path.Clean(images[0].Config)
	if b, ok = a.texts[name]; !ok {
		return nil, fmt.Errorf("the image's configuration %s is not in it", name)
	}
	digest := strings.TrimSuffix(path.Base(name), ".json")
	if sum := sha256.Sum256(b); len(digest) == sha256.Size*2 && digest != hex.EncodeToString(sum[:]) {
		return nil, fmt.Errorf("the image's configuration %s is damaged", name)
	}
	cfg, err := v1.ParseConfigFile(bytes.NewReader(b))
	if err != nil {
		return nil, fmt.Errorf("the image's configuration %s: %w", name, err)
	}
	return cfg, nil
}

// uncompressed reads gzip, zstd, or what is neither as it is.
func uncompressed(r io.Reader) (io.ReadCloser, error) {
	b := bufio.NewReaderSize(r, 64<<10)
	head, err := b.Peek(4)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	switch {
	case bytes.HasPrefix(head, []byte{0x1f, 0x8b}):
		return gzip.NewReader(b)
	case bytes.HasPrefix(head, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		d, err := zstd.NewReader(b, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(128<<20))
		if err != nil {
			return nil, err
		}
		return d.IOReadCloser(), nil
	}
	return io.NopCloser(b), nil
}
