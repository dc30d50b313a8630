// Package source gathers what goes into an image: a folder, or an image of
// another kind (docker-archive, OCI layout, registry), flattened to one root
// file system, in the one order and form that bali/seal writes.
//
// It starts no program and needs no docker. It imports bali/seal and nothing
// else of this repository.
package source

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"github.com/cradlestack/cradlestack/bali/seal"
)

// Options say how a source is read. The zero value is usable.
type Options struct {
	// Platform chooses from an image of several; empty is linux and the
	// architecture bali was built for.
	Platform v1.Platform
	// Timestamp, if not nil, is every file's time stamp, seconds since 1970.
	Timestamp *int64
	// KeepOwners takes a folder's user and group ids over. Without it all
	// belongs to root, whoever builds. Images keep theirs in any case.
	KeepOwners bool
	// Devices keeps device nodes and named pipes; without it they are left out.
	Devices bool
	// MaxSize bounds the unpacked bytes of an image; 0 is seal.DefaultMaxSize.
	MaxSize int64
	// Warn is told what is left out.
	Warn func(format string, args ...any)
	// Progress, if not nil, is given what is read of an image's files.
	Progress io.Writer
	// Transport reaches registries; nil is the default one.
	Transport []remote.Option
}

// Rootfs is a gathered root file system. Close releases its temporary file.
type Rootfs struct {
	// Image is the description, as the source has it.
	Image seal.Image
	// Size is the sum of the files' sizes.
	Size int64

	opt   Options
	top   *node
	spool *os.File
	dir   *os.Root
}

// Open gathers from a name as users write it: docker-archive:FILE,
// oci:DIR[:TAG], dir:DIR, a path that starts with / or ., or REGISTRY/REF.
func Open(ctx context.Context, from string, o Options) (*Rootfs, error) {
	scheme, rest, _ := strings.Cut(from, ":")
	switch {
	case scheme == "docker-archive":
		f, err := os.Open(rest)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		r, err := DockerArchive(ctx, f, o)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", rest, err)
		}
		return r, nil
	case scheme == "oci":
		return ociLayout(ctx, rest, o)
	case scheme == "dir":
		return Folder(ctx, rest, o)
	case filepath.IsAbs(from) || from == "." || from == ".." || strings.HasPrefix(from, "./") || strings.HasPrefix(from, "../"):
		return Folder(ctx, from, o)
	}
	ref, err := name.ParseReference(from)
	if err != nil {
		return nil, fmt.Errorf("--from %s: %w: write a folder with a leading ./", from, err)
	}
	img, err := remote.Image(ref, append([]remote.Option{
		remote.WithContext(ctx), remote.WithAuthFromKeychain(authn.DefaultKeychain), remote.WithPlatform(o.platform()),
	}, o.Transport...)...)
	if err != nil {
		return nil, fmt.Errorf("pull %s: %w", ref, err)
	}
	return flatten(ctx, img, ref.Name(), o)
}

func ociLayout(ctx context.Context, where string, o Options) (*Rootfs, error) {
	dir, tag := where, ""
	if i := strings.LastIndex(where, ":"); i > 0 {
		if _, err := os.Stat(where); errors.Is(err, fs.ErrNotExist) {
			dir, tag = where[:i], where[i+1:]
		}
	}
	index, err := layout.ImageIndexFromPath(dir)
	if err != nil {
		return nil, fmt.Errorf("oci layout %s: %w", dir, err)
	}
	img, err := choose(index, tag, o.platform())
	if err != nil {
		return nil, fmt.Errorf("oci layout %s: %w", where, err)
	}
	return flatten(ctx, img, "oci", o)
}

// choose finds the one image of an index for a tag and platform, through
// nested indexes.
func choose(index v1.ImageIndex, tag string, p v1.Platform) (v1.Image, error) {
	m, err := index.IndexManifest()
	if err != nil {
		return nil, err
	}
	var found v1.Image
	for _, d := range m.Manifests {
		if tag != "" && d.Annotations["org.opencontainers.image.ref.name"] != tag {
			continue
		}
		var img v1.Image
		switch {
		case d.MediaType.IsIndex():
			sub, err := index.ImageIndex(d.Digest)
			if err != nil {
				return nil, err
			}
			if img, err = choose(sub, "", p); err != nil {
				return nil, err
			}
		case d.MediaType.IsImage() && (d.Platform == nil || d.Platform.Satisfies(p)):
			if img, err = index.Image(d.Digest); err != nil {
				return nil, err
			}
		default:
			continue
		}
		if found != nil {
			return nil, errors.New("it holds more than one image: name one with oci:DIR:TAG")
		}
		found = img
	}
	if found == nil {
		return nil, fmt.Errorf("no image for %s in it", p)
	}
	return found, nil
}

func (o *Options) warn(format string, args ...any) {
	if o.Warn != nil {
		o.Warn(format, args...)
	}
}

func (o *Options) time(t int64) int64 {
	if o.Timestamp != nil {
		return *o.Timestamp
	}
	return max(t, 0)
}

// Close removes what Open made.
func (r *Rootfs) Close() error {
	var errs []error
	if r.spool != nil {
		errs = append(errs, r.spool.Close())
	}
	if r.dir != nil {
		errs = append(errs, r.dir.Close())
	}
	return errors.Join(errs...)
}

// newSpool is a temporary file without a name: it can't be left behind.
func newSpool() (*os.File, error) {
	f, err := os.CreateTemp("", "bali-build-")
	if err != nil {
		return nil, err
	}
	if err := os.Remove(f.Name()); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}
