// Package image turns an image reference into verified layer images on disk: it resolves a registry reference, a docker
// daemon's image, a docker archive or an OCI layout, checks every digest, converts each layer once to a read-only ext4
// file, and keeps the results in a cache that many processes share.
//
// Everything that comes from outside is taken for hostile: sizes, counts and compression ratios are bounded, a layer
// becomes visible only when the digest of its blob and of its content are the announced ones, and nothing in a layer can
// name a place outside of it.
//
// The package imports nothing of ours but spec and wire, and never Nomad.
package image

import (
	"errors"
	"fmt"
	"io/fs"
	"runtime"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
)

// Sizes that are enforced on whatever comes from outside.
const (
	maxManifest = 4 << 20 // distribution-spec: registries should take manifests of 4 MiB
	maxConfig   = 8 << 20
	maxLayers   = 500 // overlayfs takes no more lower directories

	// DefaultMaxLayerSize bounds one layer's uncompressed tar.
	DefaultMaxLayerSize = 64 << 30
	// DefaultMaxImageSize bounds the sum over all layers of an image.
	DefaultMaxImageSize = 256 << 30
)

// What Pull, Get, Remove and Hold fail with, for errors.Is.
var (
	ErrNotFound     = errors.New("no such image")
	ErrUnauthorized = errors.New("not authorized")
	ErrUnreachable  = errors.New("registry not reachable")
	ErrPlatform     = errors.New("no image for this platform")
	ErrCorrupt      = errors.New("corrupt image")
	ErrRefused      = errors.New("refused")
	ErrTooLarge     = errors.New("too large")
	ErrNoSpace      = errors.New("no space")
	ErrInUse        = errors.New("image in use")
)

// Config is an image's configuration with docker's additions to OCI's: Healthcheck, OnBuild, Shell
// (moby docker-image-spec v1.3).
type Config = dockerspec.DockerOCIImage

// An Image is a resolved reference whose layers are in the cache.
type Image struct {
	Reference string    // as docker shows it: debian:12, oci:/srv/redis:latest
	Platform  string    // linux/amd64
	Digest    string    // of the manifest, sha256:…; empty where the source has none (an archive of `docker save` before 25)
	ID        string    // digest of the configuration, sha256:…: docker's image id
	Config    Config    // of the image
	RawConfig []byte    // the bytes that ID is the digest of
	Layers    []Layer   // lowest first
	Size      int64     // of all layer files, bytes
	Created   time.Time // as the image says
	Pulled    time.Time // when this reference was last resolved
	Used      time.Time // when it was last asked for
	Private   bool      // it has an owner: see PullOptions
}

// A Layer is an ext4 file system holding one layer of an image as overlayfs wants it: whiteouts are character devices 0:0,
// opaque directories have trusted.overlay.opaque=y. It has no journal and mounts read-only.
type Layer struct {
	DiffID string // digest of the uncompressed tar, sha256:…
	Path   string // of the read-only file in the cache
	Size   int64  // of the file, bytes
}

// PullOptions of Store.Pull; the zero value is docker's behaviour.
type PullOptions struct {
	Platform string         // os/arch[/variant]; default linux/<the host's architecture>
	Keychain authn.Keychain // default: docker's configuration and its credential helpers
	Insecure []string       // registries (host[:port]) that may be asked over HTTP or with an unknown certificate
	// Mirrors lists for a registry (docker.io, ghcr.io, host:port) where to ask first: host[:port][/prefix], with
	// http:// in front for one without TLS. The registry itself comes last.
	Mirrors  map[string][]string
	Progress func(Progress) // called from several goroutines, one call at a time
	Force    bool           // resolve again although the reference is cached
	// Owner is the tenant whose credentials Keychain has, "" where they are everybody's. What came by them is for others only if they can have it too: they
	// have to show the registry their own for the image, and to fetch each layer once.
	Owner        string
	MaxLayerSize int64 // bytes of one uncompressed layer; default DefaultMaxLayerSize
	MaxImageSize int64 // bytes of all uncompressed layers; default DefaultMaxImageSize
	Jobs         int   // layers in work at once; default 4
}

func (o PullOptions) withDefaults() (PullOptions, error) {
	if o.Platform == "" {
		o.Platform = "linux/" + runtime.GOARCH
	}
	os, arch, variant := splitPlatform(o.Platform)
	switch arch {
	case "":
		return o, fmt.Errorf("platform %q: give os/arch[/variant], as in linux/arm64", o.Platform)
	case "x86_64":
		arch = "amd64"
	case "aarch64":
		arch = "arm64"
	}
	o.Platform = joinPlatform(os, arch, variant)
	if o.Keychain == nil {
		o.Keychain = authn.DefaultKeychain
	}
	if o.MaxLayerSize <= 0 {
		o.MaxLayerSize = DefaultMaxLayerSize
	}
	if o.MaxImageSize <= 0 {
		o.MaxImageSize = DefaultMaxImageSize
	}
	if o.Jobs <= 0 {
		o.Jobs = 4
	}
	return o, nil
}

// A Phase is what is being done with a layer.
type Phase string

// The phases of a layer, in this order; a cached layer has only the last.
const (
	Waiting     Phase = "waiting"     // for another process that works on the same layer
	Downloading Phase = "downloading" // Done of Total compressed bytes
	Converting  Phase = "converting"  // Done of Total uncompressed bytes
	Ready       Phase = "ready"
)

// Progress of one layer of a Pull.
type Progress struct {
	Layer string // diff id
	Index int    // of the layer, from 0
	Count int    // layers of the image
	Phase Phase
	Done  int64 // bytes
	Total int64 // bytes, 0 where unknown
}

// isDigest says whether s is a sha256 digest in its only spelling: it becomes part of file names.
func isDigest(s string) bool {
	hex, ok := strings.CutPrefix(s, "sha256:")
	if !ok || len(hex) != 64 {
		return false
	}
	for _, c := range []byte(hex) {
		if (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return true
}

// short is a digest as people are shown it.
func short(digest string) string {
	hex := strings.TrimPrefix(digest, "sha256:")
	return hex[:min(12, len(hex))]
}

// formatSize writes n bytes for people.
func formatSize(n int64) string {
	switch {
	case n >= 10<<30:
		return fmt.Sprintf("%d GiB", n>>30)
	case n >= 10<<20:
		return fmt.Sprintf("%d MiB", n>>20)
	case n >= 10<<10:
		return fmt.Sprintf("%d KiB", n>>10)
	}
	return fmt.Sprintf("%d bytes", n)
}

func isNotExist(err error) bool { return errors.Is(err, fs.ErrNotExist) }
