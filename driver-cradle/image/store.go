package image

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/internal/durable"
)

// A Store is one cache directory. Any number of processes use it at once, each of them may be killed at any line: files
// appear complete under their names or not at all, and every lock ends with the process that holds it.
//
//	lock                        held exclusively while things are removed, shared while they are looked up to be used
//	layers/sha256/<hex>.ext4    a converted layer, named by its diff id; read-only
//	layers/sha256/<hex>.json    what is known of it (layerRecord)
//	layers/sha256/<hex>.checked identity of the file that was found to be right (identity)
//	layers/sha256/<hex>.lock    held by who converts it
//	images/<hash>.json          a resolved reference for one platform (imageRecord); its modification time is its last use
//	holds/<hash>-<id>.json      a pod directory's claim on an image's layers (holdRecord); the hash is of its path
//	tmp/<random>/               a Pull's files, or those of who has asked for a TempDir; the directory is locked while they live
type Store struct {
	root string
}

// Open opens the cache at root, makes it where it is missing, and removes what killed processes left in tmp.
func Open(root string) (*Store, error) {
	root, err := filepath.Abs(root)
	if err != nil {
		return nil, err
	}
	s := &Store{root}
	for _, dir := range []string{"", "layers", "layers/sha256", "images", "holds", "tmp"} {
		if err := os.MkdirAll(s.path(dir), 0o755); err != nil {
			return nil, fmt.Errorf("open image cache: %w", err)
		}
	}
	lock, err := tryLock(s.path("lock"), lockExclusive, false)
	if err != nil {
		return nil, fmt.Errorf("open image cache: %w", err)
	}
	if lock == nil {
		return s, nil // someone is at work; the next Open or GC cleans up
	}
	defer lock.release()
	_, err = s.cleanTemp()
	if err = errors.Join(err, s.removeStray()); err != nil {
		return nil, fmt.Errorf("open image cache: %w", err)
	}
	return s, nil
}

func (s *Store) path(elem ...string) string {
	return filepath.Join(append([]string{s.root}, elem...)...)
}

func (s *Store) layerPath(diffID, ext string) string {
	return s.path("layers", "sha256", strings.TrimPrefix(diffID, "sha256:")+ext)
}

func (s *Store) shared(ctx context.Context) (*fileLock, error) {
	return lockFile(ctx, s.path("lock"), lockShared, false)
}

func (s *Store) exclusive(ctx context.Context) (*fileLock, error) {
	return lockFile(ctx, s.path("lock"), lockExclusive, false)
}

// A layerRecord is what is known of a converted layer.
type layerRecord struct {
	DiffID  string    `json:"diffId"`
	Size    int64     `json:"size"`    // of the ext4 file
	SHA256  string    `json:"sha256"`  // of the ext4 file, hexadecimal
	TarSize int64     `json:"tarSize"` // of the uncompressed tar
	Created time.Time `json:"created"`
	Owners  []string  `json:"owners,omitempty"` // who may use it; none: everybody (PullOptions.Owner)
}

func (r *layerRecord) isFor(owner string) bool {
	return len(r.Owners) == 0 || slices.Contains(r.Owners, owner)
}

// An imageRecord is a resolved reference.
type imageRecord struct {
	Version   int       `json:"version"`
	Reference string    `json:"reference"`
	Platform  string    `json:"platform"`
	Digest    string    `json:"digest,omitempty"`
	ID        string    `json:"id"`
	Config    []byte    `json:"config"` // the very bytes that ID is the digest of
	Layers    []string  `json:"layers"` // diff ids, lowest first
	Pulled    time.Time `json:"pulled"`
	Private   bool      `json:"private,omitempty"`
}

const recordVersion = 1

func (s *Store) imagePath(reference, platform string) string {
	sum := sha256.Sum256([]byte(reference + "\n" + platform))
	return s.path("images", hex.EncodeToString(sum[:])+".json")
}

// readLayer returns the layer if it is in the cache, complete.
func (s *Store) readLayer(diffID string) (Layer, error) {
	l, _, err := s.lookUpLayer(diffID)
	return l, err
}

// lookUpLayer is readLayer with what is known of the layer.
func (s *Store) lookUpLayer(diffID string) (l Layer, rec layerRecord, err error) {
	if !isDigest(diffID) {
		return l, rec, fmt.Errorf("%w: diff id %.100q is no sha256 digest", ErrCorrupt, diffID)
	}
	l = Layer{DiffID: diffID, Path: s.layerPath(diffID, ".ext4")}
	if err := readJSON(s.layerPath(diffID, ".json"), &rec); err != nil {
		return l, rec, err
	}
	fi, err := os.Stat(l.Path)
	if err != nil {
		return l, rec, err
	}
	if l.Size = fi.Size(); l.Size != rec.Size || rec.DiffID != diffID {
		return l, rec, fmt.Errorf("%s: %w: %d bytes, not the %d that were written", l.Path, ErrCorrupt, l.Size, rec.Size)
	}
	return l, rec, nil
}

// image makes an Image of a record. The error is fs.ErrNotExist where a layer is missing.
func (s *Store) image(rec *imageRecord, used time.Time) (*Image, error) {
	img := &Image{
		Reference: rec.Reference, Platform: rec.Platform, Digest: rec.Digest, ID: rec.ID,
		RawConfig: rec.Config, Pulled: rec.Pulled, Used: used, Private: rec.Private,
	}
	if err := json.Unmarshal(rec.Config, &img.Config); err != nil {
		return nil, fmt.Errorf("image %s: configuration: %w", rec.Reference, err)
	}
	if img.Config.Created != nil {
		img.Created = *img.Config.Created
	}
	for _, id := range rec.Layers {
		l, err := s.readLayer(id)
		if err != nil {
			return nil, fmt.Errorf("image %s: layer %s: %w", rec.Reference, short(id), err)
		}
		img.Layers = append(img.Layers, l)
		img.Size += l.Size
	}
	return img, nil
}

// A storedImage is a record with its file.
type storedImage struct {
	imageRecord
	path string
	used time.Time
}

// records reads all image records, newest use first. One that can't be read is left to Verify.
func (s *Store) records() ([]storedImage, error) {
	var recs []storedImage
	err := s.each("images", ".json", func(path string, fi os.FileInfo) error {
		r := storedImage{path: path, used: fi.ModTime()}
		if err := readJSON(path, &r.imageRecord); err == nil && r.Version == recordVersion {
			recs = append(recs, r)
		}
		return nil
	})
	slices.SortStableFunc(recs, func(a, b storedImage) int { return b.used.Compare(a.used) })
	return recs, err
}

// each calls fn for the files of a directory whose names end in ext.
func (s *Store) each(dir, ext string, fn func(path string, fi os.FileInfo) error) error {
	entries, err := os.ReadDir(s.path(dir))
	if err != nil {
		return err
	}
	for _, e := range entries {
		if !strings.HasSuffix(e.Name(), ext) {
			continue
		}
		fi, err := e.Info()
		if isNotExist(err) {
			continue
		}
		if err != nil {
			return err
		}
		if err := fn(s.path(dir, e.Name()), fi); err != nil {
			return err
		}
	}
	return nil
}

// List returns the images in the cache, the one used last first. An image whose layers are damaged is left out; Verify
// tells of it.
func (s *Store) List() ([]*Image, error) {
	recs, err := s.records()
	if err != nil {
		return nil, fmt.Errorf("list images: %w", err)
	}
	var imgs []*Image
	for i := range recs {
		if img, err := s.image(&recs[i].imageRecord, recs[i].used); err == nil {
			imgs = append(imgs, img)
		}
	}
	return imgs, nil
}

// Get returns the image with this reference, id, or unique beginning of an id (four digits at least). Where a reference
// was pulled for several platforms it returns the one used last.
func (s *Store) Get(refOrIDPrefix string) (*Image, error) {
	found, err := s.find(refOrIDPrefix)
	if err != nil {
		return nil, err
	}
	return s.image(&found[0].imageRecord, found[0].used)
}

// find returns the records of a reference, or all records of the one image that an id names.
func (s *Store) find(arg string) ([]storedImage, error) {
	recs, err := s.records()
	if err != nil {
		return nil, fmt.Errorf("image %s: %w", arg, err)
	}
	var found []storedImage
	if ref, err := parseReference(arg, nil); err == nil {
		for _, r := range recs {
			if r.Reference == ref.String() {
				found = append(found, r)
			}
		}
	}
	if len(found) > 0 {
		return found, nil
	}
	prefix := strings.TrimPrefix(arg, "sha256:")
	for _, r := range recs {
		if len(prefix) < 4 || !strings.HasPrefix(strings.TrimPrefix(r.ID, "sha256:"), prefix) {
			continue
		}
		if len(found) > 0 && found[0].ID != r.ID {
			return nil, fmt.Errorf("image id %s is ambiguous: give more of its digits", arg)
		}
		found = append(found, r)
	}
	if len(found) == 0 {
		return nil, fmt.Errorf("image %s: %w in the cache: pull it first", arg, ErrNotFound)
	}
	return found, nil
}

// cached returns a resolved reference if all of it is in the cache, and notes the use.
func (s *Store) cached(ctx context.Context, reference, platform string) (*Image, error) {
	lock, err := s.shared(ctx)
	if err != nil {
		return nil, err
	}
	defer lock.release()
	path := s.imagePath(reference, platform)
	var rec imageRecord
	if err := readJSON(path, &rec); err != nil {
		return nil, err
	}
	if rec.Version != recordVersion || rec.Reference != reference {
		return nil, os.ErrNotExist
	}
	now := time.Now()
	img, err := s.image(&rec, now)
	if err != nil {
		return nil, err
	}
	_ = os.Chtimes(path, now, now) // another user's cache: it only looks unused for longer
	return img, nil
}

// A session is a Pull's directory below tmp, locked while the Pull lives. Its layers file keeps GC from removing layers
// that the Pull has found or made before its image is recorded.
type session struct {
	dir     string
	lock    *os.File
	closers []io.Closer // what the image's source has open
}

const sessionLayers = "layers"

func (s *Store) begin(ctx context.Context) (*session, error) {
	lock, err := s.shared(ctx) // cleanTemp sees no directory that isn't locked yet
	if err != nil {
		return nil, err
	}
	defer lock.release()
	dir, err := os.MkdirTemp(s.path("tmp"), "")
	if err != nil {
		return nil, err
	}
	f, err := os.Open(dir)
	if err == nil {
		err = flock(f, unix.LOCK_EX|unix.LOCK_NB)
	}
	if err != nil {
		return nil, errors.Join(err, os.Remove(dir))
	}
	return &session{dir: dir, lock: f}, nil
}

// TempDir makes a directory for what is not to outlive this process: remove removes it, and where the process is killed before, the next Open or GC.
func (s *Store) TempDir(ctx context.Context) (dir string, remove func() error, err error) {
	x, err := s.begin(ctx)
	if err != nil {
		return "", nil, fmt.Errorf("make temporary directory: %w", spaceError(err, s.root))
	}
	return x.dir, x.end, nil
}

func (x *session) end() error {
	for _, c := range x.closers {
		c.Close()
	}
	err := os.RemoveAll(x.dir)
	x.lock.Close()
	return err
}

// cleanTemp removes the sessions of dead processes and returns the layers that living ones need. The store's lock is held
// exclusively.
func (s *Store) cleanTemp() (needed []string, err error) {
	entries, err := os.ReadDir(s.path("tmp"))
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		dir := s.path("tmp", e.Name())
		f, err := os.Open(dir)
		if err != nil {
			if isNotExist(err) {
				continue // a Pull ended just now
			}
			return nil, err
		}
		if flock(f, unix.LOCK_EX|unix.LOCK_NB) == nil {
			err = os.RemoveAll(dir)
		} else {
			var layers []string
			if readJSON(filepath.Join(dir, sessionLayers), &layers) == nil {
				needed = append(needed, layers...)
			}
		}
		f.Close()
		if err != nil {
			return nil, err
		}
	}
	return needed, nil
}

// maxRecord bounds the JSON files of the cache: an image's configuration in base64, and its layers.
const maxRecord = 2*maxConfig + 1<<20

func readJSON(path string, v any) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxRecord))
	if err != nil {
		return err
	}
	if err := json.Unmarshal(data, v); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}

// writeJSON makes path hold v, durably and at once.
func writeJSON(tmpDir, path string, v any) error {
	data, err := json.MarshalIndent(v, "", "\t")
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(tmpDir, "json-")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	defer f.Close()
	if _, err := f.Write(append(data, '\n')); err != nil {
		return err
	}
	if err := f.Chmod(0o644); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return err
	}
	return durable.SyncDir(filepath.Dir(path))
}
