// Package registry keeps the images of docker's Engine API: distribution's registry, embedded, with a folder or an S3 bucket for its storage.
//
// The registry is the store; there is nothing beside it but caches. An image's names are tags of repositories, NAMESPACE/DOMAIN/PATH, so what is pulled,
// loaded or committed through the API, and what is pushed to the registry itself, are the same images, and nodes pull them by digest. Each namespace of
// Nomad's sees its own: see names.go for how names map, token.go for who may do what, collect.go for how space is freed.
//
// It knows neither Nomad nor HTTP routes of docker's API, and imports nothing of ours.
package registry

import (
	"context"
	"crypto/ed25519"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/distribution/distribution/v3"
	"github.com/distribution/distribution/v3/configuration"
	"github.com/distribution/distribution/v3/registry/handlers"
	"github.com/distribution/distribution/v3/registry/storage"
	storagedriver "github.com/distribution/distribution/v3/registry/storage/driver"
	"github.com/distribution/distribution/v3/registry/storage/driver/factory"
	_ "github.com/distribution/distribution/v3/registry/storage/driver/filesystem" // registers itself
	_ "github.com/distribution/distribution/v3/registry/storage/driver/s3-aws"     // registers itself
	"github.com/go-jose/go-jose/v4"
)

// A Config says where images are kept and who may have them.
type Config struct {
	Folder string // where the images are; "" with S3
	S3     *S3    // where the images are; nil with Folder

	// Key signs tokens. All servers of one storage have the same. nil is Folder's own, made when it is first needed.
	Key ed25519.PrivateKey
	// URL is where clients and nodes reach the registry, https://registry.example:5000. "" is whatever address they have used.
	URL string
	// WorkloadKeys returns the keys that sign the workload identities of Nomad's (its /.well-known/jwks.json). nil: they are not accepted.
	WorkloadKeys func(context.Context) (*jose.JSONWebKeySet, error)

	// Platform is what the nodes run, "linux/amd64" unless given.
	Platform string
	// Insecure names the upstream registries, HOST or HOST:PORT, that may be asked without TLS or with a certificate that nobody vouches for, and that may
	// be at a loopback or link-local address.
	Insecure []string
	// Grace is how old a blob must be to be collected when nothing refers to it: longer than any push takes. 24 hours unless given.
	Grace time.Duration
	// MaxLayer bounds a layer, unpacked; MaxImages the images of one archive. 64 GiB and 1000 unless given.
	MaxLayer  int64
	MaxImages int

	Log *slog.Logger // slog.Default() unless given

	retryDelay time.Duration // of the first repetition of a transfer that broke
}

// An S3 is a bucket, with distribution's names for what it takes to reach it.
type S3 struct {
	Endpoint  string // "" is Amazon's
	Region    string
	Bucket    string
	Prefix    string // of all keys
	AccessKey string // "" is what the environment has to say
	SecretKey string
	PathStyle bool // the bucket is in the path, not in the host's name
}

// A Registry is open storage. It has no state of its own: any number of them may have the same storage open.
type Registry struct {
	Config
	driver   storagedriver.StorageDriver
	store    distribution.Namespace
	app      *handlers.App
	platform platform
	cache    *cache
	upstream *upstream
	http     http.Handler

	// gate is held shared by whoever makes something refer to blobs, exclusively while garbage is collected.
	gate sync.RWMutex
	// pulls holds back the second of two who want the same blob at once.
	pulls keyedMutex
}

// Open opens the storage.
func Open(ctx context.Context, c Config) (_ *Registry, err error) {
	if (c.Folder == "") == (c.S3 == nil) {
		return nil, errors.New("registry: either a folder or an S3 bucket has to be given")
	}
	if c.Platform == "" {
		c.Platform = "linux/amd64"
	}
	if c.Grace == 0 {
		c.Grace = 24 * time.Hour
	}
	if c.MaxLayer == 0 {
		c.MaxLayer = 64 << 30
	}
	if c.MaxImages == 0 {
		c.MaxImages = 1000
	}
	if c.Log == nil {
		c.Log = slog.Default()
	}
	if c.retryDelay == 0 {
		c.retryDelay = time.Second
	}
	r := &Registry{Config: c, cache: newCache(), upstream: newUpstream(c.Insecure)}
	if r.platform, err = parsePlatform(c.Platform); err != nil {
		return nil, err
	}
	if r.Key == nil {
		if c.Folder == "" {
			return nil, errors.New("registry: a key for tokens has to be given, the same to all servers of the bucket")
		}
		if r.Key, err = folderKey(c.Folder); err != nil {
			return nil, fmt.Errorf("registry: key for tokens: %w", err)
		}
	}
	forwardLogs(c.Log)
	kind, parameters := c.storage()
	if r.driver, err = factory.Create(ctx, kind, parameters); err != nil {
		return nil, fmt.Errorf("registry: %w", err)
	}
	if r.store, err = storage.NewRegistry(ctx, r.driver, storage.EnableDelete); err != nil {
		return nil, fmt.Errorf("registry: %w", err)
	}
	if r.app, err = r.newApp(); err != nil {
		return nil, err
	}
	r.http = r.handler()
	return r, nil
}

// Close ends what belongs to it. Its handler must not be used any more.
func (r *Registry) Close() error {
	r.upstream.close()
	return r.app.Shutdown()
}

// Handler serves the registry's API (OCI distribution-spec) under /v2/, and tokens for it at /token.
func (r *Registry) Handler() http.Handler { return r.http }

// storage is the driver's name and parameters, as distribution's configuration has them.
func (c *Config) storage() (string, configuration.Parameters) {
	if c.S3 == nil {
		return "filesystem", configuration.Parameters{"rootdirectory": filepath.Join(c.Folder, "images")}
	}
	return "s3", configuration.Parameters{
		"regionendpoint": c.S3.Endpoint, "region": c.S3.Region, "bucket": c.S3.Bucket, "rootdirectory": c.S3.Prefix,
		"accesskey": c.S3.AccessKey, "secretkey": c.S3.SecretKey, "forcepathstyle": c.S3.PathStyle,
	}
}

// newApp makes distribution's HTTP side over the same storage. Nothing is deleted through it: docker rmi knows what is in use.
func (r *Registry) newApp() (app *handlers.App, err error) {
	secret, err := hkdf.Key(sha256.New, r.Key.Seed(), nil, "cradlestack registry upload state", 32)
	if err != nil {
		return nil, err
	}
	kind, parameters := r.storage()
	c := &configuration.Configuration{
		Storage: configuration.Storage{
			kind:          parameters,
			"redirect":    {"disable": true},
			"maintenance": {"uploadpurging": map[any]any{"enabled": false}}, // Collect does it
		},
		Auth: configuration.Auth{controllerName: {"registry": r}},
	}
	c.HTTP.Secret = hex.EncodeToString(secret) // of upload URLs, which any server goes on with
	c.HTTP.RelativeURLs = true
	defer func() {
		if p := recover(); p != nil { // its way to say that a configuration is wrong
			err = fmt.Errorf("registry: %v", p)
		}
	}()
	return handlers.NewApp(context.Background(), c), nil
}

// folderKey reads the folder's key, or makes it. Of two who make it at once both have the same then.
func folderKey(folder string) (ed25519.PrivateKey, error) {
	if err := os.MkdirAll(folder, 0o700); err != nil {
		return nil, err
	}
	path := filepath.Join(folder, "token.key")
	for range 2 {
		data, err := os.ReadFile(path)
		if err == nil {
			return ParseKey(data)
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		seed := make([]byte, ed25519.SeedSize)
		if _, err := rand.Read(seed); err != nil {
			return nil, err
		}
		part, err := os.CreateTemp(folder, "token.key.*")
		if err != nil {
			return nil, err
		}
		err = pem.Encode(part, &pem.Block{Type: keyType, Bytes: seed})
		err = errors.Join(err, part.Sync(), part.Close())
		if err == nil {
			err = os.Link(part.Name(), path) // never over one that is there
		}
		os.Remove(part.Name())
		if err != nil && !errors.Is(err, fs.ErrExist) {
			return nil, err
		}
	}
	return nil, fmt.Errorf("%s can't be made", path)
}

const keyType = "CRADLESTACK REGISTRY KEY"

// ParseKey reads a key that signs tokens: PEM, its bytes an ed25519 seed, as token.key in a registry's folder has it.
func ParseKey(data []byte) (ed25519.PrivateKey, error) {
	b, _ := pem.Decode(data)
	if b == nil || b.Type != keyType || len(b.Bytes) != ed25519.SeedSize {
		return nil, fmt.Errorf("no PEM block %q with %d bytes", keyType, ed25519.SeedSize)
	}
	return ed25519.NewKeyFromSeed(b.Bytes), nil
}

// A keyedMutex is one mutex for each key.
type keyedMutex struct {
	mu   sync.Mutex
	held map[string]chan struct{}
}

// lock waits until nobody has the key, or the context ends.
func (k *keyedMutex) lock(ctx context.Context, key string) (unlock func(), err error) {
	for {
		k.mu.Lock()
		if k.held == nil {
			k.held = map[string]chan struct{}{}
		}
		other, busy := k.held[key]
		if !busy {
			mine := make(chan struct{})
			k.held[key] = mine
			k.mu.Unlock()
			return func() {
				k.mu.Lock()
				delete(k.held, key)
				k.mu.Unlock()
				close(mine)
			}, nil
		}
		k.mu.Unlock()
		select {
		case <-other:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}
