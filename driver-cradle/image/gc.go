package image

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// A holdRecord is a pod directory's claim on the layers of an image. It counts as long as the directory exists.
type holdRecord struct {
	Owner  string   `json:"owner"` // absolute path of the directory
	ID     string   `json:"id"`    // of the image
	Layers []string `json:"layers"`
}

// Hold keeps an image's layers in the cache until release is called or the directory owner, an absolute path, is gone:
// GC and Remove leave them alone. It fails with ErrNotFound where a layer was removed since Pull, which then has to be
// called again. Holding the same image for the same owner again is the same hold.
func (s *Store) Hold(img *Image, owner string) (release func() error, err error) {
	if !filepath.IsAbs(owner) {
		return nil, fmt.Errorf("hold image %s: owner %s is no absolute path", img.Reference, owner)
	}
	owner = filepath.Clean(owner)
	if fi, err := os.Stat(owner); err != nil || !fi.IsDir() {
		return nil, fmt.Errorf("hold image %s: owner %s is no directory: make it first", img.Reference, owner)
	}
	lock, err := s.shared(context.Background())
	if err != nil {
		return nil, fmt.Errorf("hold image %s: %w", img.Reference, err)
	}
	defer lock.release()
	rec := holdRecord{Owner: owner, ID: img.ID}
	for _, l := range img.Layers {
		if _, err := s.readLayer(l.DiffID); err != nil {
			return nil, fmt.Errorf("hold image %s: %w: layer %s is gone: pull it again", img.Reference, ErrNotFound, short(l.DiffID))
		}
		rec.Layers = append(rec.Layers, l.DiffID)
	}
	path := s.holdPath(img.ID, owner)
	if err := writeJSON(s.path("holds"), path, rec); err != nil {
		return nil, fmt.Errorf("hold image %s: %w", img.Reference, spaceError(err, s.root))
	}
	return func() error { return s.Release(img.ID, owner) }, nil
}

// Release ends an owner's hold on the image with this id, if there is one.
func (s *Store) Release(id, owner string) error {
	if err := os.Remove(s.holdPath(id, filepath.Clean(owner))); err != nil && !isNotExist(err) {
		return fmt.Errorf("release image %s: %w", id, err)
	}
	return nil
}

func (s *Store) holdPath(id, owner string) string {
	return s.path("holds", holdPrefix(owner)+strings.TrimPrefix(id, "sha256:")+".json")
}

// holdPrefix begins the names of an owner's holds.
func holdPrefix(owner string) string {
	sum := sha256.Sum256([]byte(owner))
	return hex.EncodeToString(sum[:]) + "-"
}

// Forget ends all holds of an owner: the directory is not any more, or not yet again, what they were for.
func (s *Store) Forget(owner string) error {
	prefix := holdPrefix(filepath.Clean(owner))
	entries, err := os.ReadDir(s.path("holds"))
	if err != nil {
		return fmt.Errorf("holds of %s: %w", owner, err)
	}
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), prefix) {
			continue
		}
		if err := os.Remove(s.path("holds", e.Name())); err != nil && !isNotExist(err) {
			return fmt.Errorf("holds of %s: %w", owner, err)
		}
	}
	return nil
}

// holds returns the living holds; with drop, the others are removed.
func (s *Store) holds(drop bool) ([]holdRecord, error) {
	var holds []holdRecord
	err := s.each("holds", "", func(path string, fi os.FileInfo) error {
		var h holdRecord
		if strings.HasSuffix(path, ".json") {
			if err := readJSON(path, &h); err != nil {
				return err
			}
			if _, err := os.Stat(h.Owner); !isNotExist(err) {
				holds = append(holds, h)
				return nil
			}
		}
		if !drop {
			return nil
		}
		return os.Remove(path)
	})
	return holds, err
}

// GCOptions say what GC removes beside what nothing refers to.
type GCOptions struct {
	MaxAge  time.Duration // images that were not used for so long go; 0: none for its age
	MaxSize int64         // images go, the least recently used first, until the layers take at most so much; 0: no bound
	DryRun  bool          // only report
}

// A GCReport is what GC removed, or would remove.
type GCReport struct {
	Images []string // references
	Layers []string // diff ids
	Freed  int64    // bytes on disk
	Kept   int64    // bytes on disk of the layers that stay
}

// GC removes images by age and size, then every layer that no image, no pod directory and no running Pull needs, and what
// killed processes left behind. An image that a pod directory holds stays.
func (s *Store) GC(ctx context.Context, o GCOptions) (GCReport, error) {
	var report GCReport
	lock, err := s.exclusive(ctx)
	if err != nil {
		return report, fmt.Errorf("collect images: %w", err)
	}
	defer lock.release()
	if err := s.collect(ctx, o, &report); err != nil {
		return report, fmt.Errorf("collect images: %w", err)
	}
	return report, nil
}

func (s *Store) collect(ctx context.Context, o GCOptions, report *GCReport) error {
	sizes, err := s.layerSizes()
	if err != nil {
		return err
	}
	pinned, err := s.cleanTemp()
	if err != nil {
		return err
	}
	holds, err := s.holds(!o.DryRun)
	if err != nil {
		return err
	}
	held := make(map[string]bool)
	for _, h := range holds {
		held[h.ID] = true
		pinned = append(pinned, h.Layers...)
	}
	users := make(map[string]int) // of a layer
	for _, id := range pinned {
		users[id]++
	}
	recs, err := s.records()
	if err != nil {
		return err
	}
	for _, r := range recs {
		for _, id := range r.Layers {
			users[id]++
		}
	}
	var total int64
	for id, n := range sizes {
		if users[id] > 0 {
			total += n
		}
	}

	now := time.Now()
	slices.Reverse(recs) // the least recently used first
	for _, r := range recs {
		if held[r.ID] && !o.DryRun {
			_ = os.Chtimes(r.path, now, now) // its pod uses it: what is counted begins with the pod's end
		}
		old := o.MaxAge > 0 && now.Sub(r.used) > o.MaxAge
		large := o.MaxSize > 0 && total > o.MaxSize
		if held[r.ID] || !old && !large {
			continue
		}
		if !o.DryRun {
			if err := os.Remove(r.path); err != nil {
				return err
			}
		}
		report.Images = append(report.Images, r.Reference)
		for _, id := range r.Layers {
			if users[id]--; users[id] == 0 {
				total -= sizes[id]
			}
		}
	}
	for id, n := range sizes {
		if users[id] > 0 {
			report.Kept += n
			continue
		}
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		report.Layers = append(report.Layers, id)
		report.Freed += n
		if !o.DryRun {
			if err := s.removeLayer(id); err != nil {
				return err
			}
		}
	}
	slices.Sort(report.Layers)
	if o.DryRun {
		return nil
	}
	return s.removeStray()
}

// layerSizes returns what each layer takes on disk.
func (s *Store) layerSizes() (map[string]int64, error) {
	sizes := make(map[string]int64)
	err := s.each(filepath.Join("layers", "sha256"), ".ext4", func(path string, fi os.FileInfo) error {
		sizes["sha256:"+strings.TrimSuffix(filepath.Base(path), ".ext4")] = diskUsage(fi)
		return nil
	})
	return sizes, err
}

func (s *Store) removeLayer(diffID string) error {
	for _, ext := range []string{".ext4", ".json", checkedExt} {
		if err := os.Remove(s.layerPath(diffID, ext)); err != nil && !isNotExist(err) {
			return err
		}
	}
	return nil
}

// removeStray removes locks that nobody holds and records without a layer. Where a lock is held a layer is coming.
func (s *Store) removeStray() error {
	dir := filepath.Join("layers", "sha256")
	return s.each(dir, "", func(path string, _ os.FileInfo) error {
		base, ext, _ := strings.Cut(filepath.Base(path), ".")
		if ext == "ext4" {
			return nil
		}
		id := "sha256:" + base
		if _, err := os.Stat(s.layerPath(id, ".ext4")); err == nil && ext != "lock" {
			return nil
		}
		lock, err := tryLock(s.layerPath(id, ".lock"), lockExclusive, true)
		if lock == nil || err != nil {
			return err
		}
		defer lock.release()
		if _, err := os.Stat(s.layerPath(id, ".ext4")); err == nil || ext == "lock" {
			return nil
		}
		if err := os.Remove(path); err != nil && !isNotExist(err) {
			return err
		}
		return nil
	})
}

// Remove forgets an image: a reference, or all references of an id, and the layers that nothing else needs. It fails with
// ErrInUse where a pod directory holds the image and no other reference to it remains.
func (s *Store) Remove(refOrID string) error {
	ctx := context.Background()
	lock, err := s.exclusive(ctx)
	if err != nil {
		return fmt.Errorf("remove image %s: %w", refOrID, err)
	}
	defer lock.release()
	found, err := s.find(refOrID)
	if err != nil {
		return err
	}
	recs, err := s.records()
	if err != nil {
		return fmt.Errorf("remove image %s: %w", refOrID, err)
	}
	others := 0
	for _, r := range recs {
		if r.ID == found[0].ID {
			others++
		}
	}
	holds, err := s.holds(false)
	if err != nil {
		return fmt.Errorf("remove image %s: %w", refOrID, err)
	}
	for _, h := range holds {
		if h.ID == found[0].ID && others == len(found) {
			return fmt.Errorf("remove image %s: %w by the pod directory %s: remove that first", refOrID, ErrInUse, h.Owner)
		}
	}
	for _, r := range found {
		if err := os.Remove(r.path); err != nil {
			return fmt.Errorf("remove image %s: %w", refOrID, err)
		}
	}
	var report GCReport
	if err := s.collect(ctx, GCOptions{}, &report); err != nil {
		return fmt.Errorf("remove image %s: %w", refOrID, err)
	}
	return nil
}

// A Problem is something in the cache that is not as it was written.
type Problem struct {
	Path string // of the file
	Err  error
}

func (p Problem) String() string { return fmt.Sprintf("%s: %v", p.Path, p.Err) }

// Verify reads every layer and record again and compares them with what was recorded when they were made. The remedy for
// each Problem is to remove its file: the next Pull brings it anew.
func (s *Store) Verify(ctx context.Context) ([]Problem, error) {
	var problems []Problem
	err := s.each(filepath.Join("layers", "sha256"), ".ext4", func(path string, _ os.FileInfo) error {
		err := verifyLayer(ctx, path)
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err != nil && !isNotExist(err) {
			problems = append(problems, Problem{path, err})
		}
		return nil
	})
	if err != nil {
		return problems, fmt.Errorf("verify image cache: %w", err)
	}
	err = s.each("images", ".json", func(path string, _ os.FileInfo) error {
		var rec imageRecord
		err := readJSON(path, &rec)
		if isNotExist(err) {
			return nil
		}
		if err == nil && rec.Version != recordVersion {
			err = fmt.Errorf("%w: version %d", ErrCorrupt, rec.Version)
		}
		if err == nil {
			err = verifyBytes("the configuration", rec.ID, rec.Config)
		}
		if err == nil {
			_, err = s.image(&rec, time.Time{})
		}
		if err != nil {
			problems = append(problems, Problem{path, err})
		}
		return nil
	})
	if err != nil {
		return problems, fmt.Errorf("verify image cache: %w", err)
	}
	return problems, nil
}

func verifyLayer(ctx context.Context, path string) error {
	var rec layerRecord
	if err := readJSON(strings.TrimSuffix(path, ".ext4")+".json", &rec); err != nil {
		if isNotExist(err) {
			return errors.New("its record is missing")
		}
		return err
	}
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, &ctxReader{ctx, f}); err != nil {
		return err
	}
	if got := hex.EncodeToString(h.Sum(nil)); got != rec.SHA256 {
		return fmt.Errorf("%w: digest %s, %s was written", ErrCorrupt, short(got), short(rec.SHA256))
	}
	return nil
}

// A ctxReader ends with its context.
type ctxReader struct {
	ctx context.Context
	r   io.Reader
}

func (c *ctxReader) Read(p []byte) (int, error) {
	if c.ctx.Err() != nil {
		return 0, context.Cause(c.ctx)
	}
	return c.r.Read(p)
}
