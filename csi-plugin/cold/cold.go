// Package cold keeps copies of block volumes in cold storage, a folder or an S3 bucket, encrypted and authenticated by one key. It imports
// volume alone, and knows neither CSI nor any backend.
//
// A volume is cut into chunks, each of which is stored once under a name that its content determines; a copy is a list of such names. So each
// copy is whole by itself, only what has changed is sent, what was sent before an interruption is not sent again, and a chunk that was
// changed by anybody but a holder of the key is noticed before a byte of it is used. docs/cold-format.md is the format.
package cold

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"os"
	"path"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/cradlestack/cradlestack/csi-plugin/volume"
)

// A Store keeps named objects. A name has parts that are separated by /.
type Store interface {
	// Put makes an object, or replaces it, as a whole and durably.
	Put(ctx context.Context, name string, data []byte) error

	// Get reads an object; fs.ErrNotExist where there is none, errTooLarge where it has more bytes than most: who can write to the store
	// could have all memory taken otherwise.
	Get(ctx context.Context, name string, most int64) ([]byte, error)

	// List calls each with the names that begin with prefix, which is "" or ends with /, in any order.
	List(ctx context.Context, prefix string, each func(name string) error) error

	// Delete removes an object; one that is not there is no error.
	Delete(ctx context.Context, name string) error
}

// A Vault is cold storage that a key opens.
type Vault struct {
	store Store
	key   *Key
}

// NewVault returns the vault in a store.
func NewVault(s Store, k *Key) *Vault { return &Vault{s, k} }

// Use takes the vault into use for the volumes of a backend: a directory that is not the one which that has used before is an error from now on, whatever is done, until
// the former one is there again.
func (v *Vault) Use(ctx context.Context, n volume.Noter) error { return v.use(ctx, n, true) }

// Known is Use where nothing is to be written. A backend that has used no vault in this place knows none.
func (v *Vault) Known(ctx context.Context, n volume.Noter) error { return v.use(ctx, n, false) }

func (v *Vault) use(ctx context.Context, n volume.Noter, begin bool) error {
	f, ok := v.store.(*Folder)
	if !ok {
		return nil // a bucket is that of its name
	}
	return f.use(ctx, n, begin)
}

// A Copy is one that is complete.
type Copy struct {
	Volume string
	Born   time.Time // when the volume was made that this is a copy of: another one of its name has another time
	Taken  time.Time // the time of the snapshot
}

// String is VOLUME@TAKEN, by which people name a copy.
func (c Copy) String() string { return c.Volume + "@" + c.Taken.Format(stamp) }

const (
	stamp     = "20060102T150405Z"
	bornStamp = "20060102T150405.000000000Z"
	listsDir  = "copies/"
	chunksDir = "chunks/"
	suffix    = ".age"
)

// line is what the copies of one volume have in common, and their chunks.
func (c Copy) line() string { return c.Volume + "/" + c.Born.UTC().Format(bornStamp) + "/" }

// Object is the name of the copy's list in the store.
func (c Copy) Object() string { return listsDir + c.line() + c.Taken.UTC().Format(stamp) + suffix }

// parseObject reads the name of a copy's list.
func parseObject(name string) (c Copy, ok bool) {
	parts := strings.Split(strings.TrimPrefix(name, listsDir), "/")
	if len(parts) != 3 || !volume.ValidName(parts[0]) {
		return c, false
	}
	born, berr := time.Parse(bornStamp, parts[1])
	taken, ok := strings.CutSuffix(parts[2], suffix)
	at, terr := time.Parse(stamp, taken)
	return Copy{parts[0], born, at}, ok && berr == nil && terr == nil
}

// Copies returns those of a volume, or all where id is "": by volume, and of each the newest last. One volume's copies are newer than all
// of a former one's of its name, even where that host has gone on copying it.
func (v *Vault) Copies(ctx context.Context, id string) ([]Copy, error) {
	var all []Copy
	prefix := listsDir
	if id != "" {
		if !volume.ValidName(id) {
			return nil, nil
		}
		prefix += id + "/"
	}
	err := v.store.List(ctx, prefix, func(name string) error {
		if c, ok := parseObject(name); ok {
			all = append(all, c)
		}
		return nil
	})
	slices.SortFunc(all, func(a, b Copy) int {
		return cmp.Or(cmp.Compare(a.Volume, b.Volume), a.Born.Compare(b.Born), a.Taken.Compare(b.Taken))
	})
	return all, err
}

// Find returns the copy that a person names: VOLUME is its newest, VOLUME@TAKEN one of a time. volume.ErrNotFound is none.
func (v *Vault) Find(ctx context.Context, name string) (Copy, error) {
	id, taken, one := strings.Cut(name, "@")
	all, err := v.Copies(ctx, id)
	if err != nil {
		return Copy{}, err
	}
	for _, c := range slices.Backward(all) {
		if c.Volume == id && (!one || c.Taken.Format(stamp) == taken) {
			return c, nil
		}
	}
	return Copy{}, fmt.Errorf("copy %.300q: %w; \"cradle-csi cold ls\" lists those that there are", name, volume.ErrNotFound)
}

// lastYear is the last one that has a place in a name, or in JSON.
const lastYear = 9999

// Born is when the newest volume of a name was made that there are copies of; the zero value where there are none. What can't be read counts for nothing: without the key, too, somebody can
// have made a list of any time.
func (v *Vault) Born(ctx context.Context, id string) (born time.Time, err error) {
	all, err := v.Copies(ctx, id)
	for _, c := range slices.Backward(all) {
		if err != nil {
			break
		}
		if _, err = v.manifest(ctx, c); err == nil {
			return c.Born, nil
		}
		if errors.Is(err, ErrDamaged) || errors.Is(err, volume.ErrNotFound) { // removed meanwhile
			err = nil
		}
	}
	return time.Time{}, err
}

// workers is how many chunks are on their way at once.
const workers = 8

// several calls do for each chunk, some at once, until one fails or ctx ends.
func several(ctx context.Context, all iter.Seq2[int64, string], do func(ctx context.Context, i int64, name string) error) error {
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(workers)
	for i, name := range all {
		if gctx.Err() != nil {
			break
		}
		g.Go(func() error { return do(gctx, i, name) })
	}
	return cmp.Or(g.Wait(), context.Cause(ctx))
}

// An Order puts a copy in its place among the others of a volume, whatever clocks have said.
type Order struct {
	Taken  time.Time // the snapshot's, but where the clock was set back: no later copy has an earlier one
	Former []string  // snapshots for cold storage that there were beside the one that is copied, NAME@TIME: none of them is newer
}

// Save copies a snapshot's blocks. base is an earlier copy of the same volume, the one that blocks are compared with; the zero value is none. What Save sent before it was interrupted is
// not sent again, what is missing of base is.
func (v *Vault) Save(ctx context.Context, of volume.Volume, s volume.Snapshot, o Order, blocks *volume.Blocks, base Copy) (c Copy, sent int64, err error) {
	c = Copy{of.ID, of.Created, o.Taken.Truncate(time.Second).UTC()}
	m := &manifest{header: header{
		Version: 1, Volume: of.ID, Born: of.Created, Taken: o.Taken, Snapshot: s.ID.Name, Former: o.Former, Size: blocks.Size, Chunk: chunkSize,
		Content: of.Content, Parameters: of.Map(),
	}, chunks: map[int64]string{}}
	if !o.Taken.Equal(s.Created) {
		m.Created = s.Created
	}
	if !blocks.Whole && base == (Copy{}) {
		return c, 0, errors.New("save: blocks that differ from a copy, and no copy")
	}
	if !blocks.Whole {
		former, err := v.manifest(ctx, base)
		if err != nil {
			return c, 0, err
		}
		for i, name := range former.chunks {
			if i*chunkSize < blocks.Size {
				m.chunks[i] = name
			}
		}
	}
	there, err := v.chunks(ctx, c)
	if err != nil {
		return c, 0, err
	}
	data := slices.Clone(blocks.Data)
	for i, name := range m.sorted() {
		if !there[name] {
			data = append(data, volume.Range{Start: i * chunkSize, End: (i + 1) * chunkSize})
		}
	}
	if len(data) > len(blocks.Data) {
		slices.SortFunc(data, func(a, b volume.Range) int { return cmp.Compare(a.Start, b.Start) })
	}
	var mu sync.Mutex // m.chunks, there, sent
	err = several(ctx, chunksOf(data, blocks.Size), func(ctx context.Context, i int64, _ string) error {
		data, err := readChunk(blocks, i, blocks.Size)
		if err != nil {
			return fmt.Errorf("read %s at %d: %w", s.ID, i*chunkSize, err)
		}
		name := ""
		if !zeros(data) {
			name = v.key.name(data)
		}
		mu.Lock()
		delete(m.chunks, i)
		if name != "" {
			m.chunks[i] = name
		}
		known := name == "" || there[name]
		there[name] = true
		mu.Unlock()
		if known {
			return nil
		}
		sealed, err := v.key.seal(data)
		if err == nil {
			err = v.store.Put(ctx, c.chunk(name), sealed)
		}
		if err == nil {
			mu.Lock()
			sent += int64(len(sealed))
			mu.Unlock()
		}
		return err
	})
	if err != nil {
		return c, sent, err
	}
	if len(m.chunks) == 0 && m.Content == volume.Trusted {
		m.Content = volume.Blank // the snapshot was taken before the file system was made
	}
	sealed, err := v.key.seal(m.encode(v.key))
	if err == nil {
		err = v.store.Put(ctx, c.Object(), sealed)
	}
	return c, sent + int64(len(sealed)), err
}

// chunk is the name of a chunk's object.
func (c Copy) chunk(name string) string { return chunksDir + c.line() + name[:2] + "/" + name + suffix }

// chunks lists the names of a line's chunks.
func (v *Vault) chunks(ctx context.Context, c Copy) (map[string]bool, error) {
	there := map[string]bool{}
	err := v.store.List(ctx, chunksDir+c.line(), func(object string) error {
		if name, ok := strings.CutSuffix(path.Base(object), suffix); ok {
			there[name] = true
		}
		return nil
	})
	return there, err
}

// manifest reads a copy's list.
func (v *Vault) manifest(ctx context.Context, c Copy) (*manifest, error) {
	sealed, err := v.store.Get(ctx, c.Object(), maxManifest)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("copy %s: %w", c, volume.ErrNotFound)
	}
	if err != nil && !errors.Is(err, errTooLarge) {
		return nil, err
	}
	var m *manifest
	var data []byte
	if err == nil {
		data, err = v.key.open(sealed, v.key.lists)
	}
	if err == nil {
		m, err = decode(data, v.key)
	}
	if err == nil && (m.Volume != c.Volume || !m.Born.Equal(c.Born) || !m.Taken.Truncate(time.Second).Equal(c.Taken)) {
		err = fmt.Errorf("it is one of %s@%s", m.Volume, m.Taken.Format(stamp))
	}
	if err != nil {
		return nil, fmt.Errorf("copy %s: %s: %w", c, c.Object(), &damage{err})
	}
	return m, nil
}

// ErrDamaged is a copy that can't be restored: something of it is not what was saved.
var ErrDamaged = errors.New("damaged")

type damage struct{ err error }

func (d *damage) Error() string        { return "damaged: " + d.err.Error() }
func (d *damage) Unwrap() error        { return d.err }
func (d *damage) Is(target error) bool { return target == ErrDamaged }

// fetch reads chunk i of a copy, which is as it was saved or an error.
func (v *Vault) fetch(ctx context.Context, c Copy, i int64, name string, size int64) ([]byte, error) {
	sealed, err := v.store.Get(ctx, c.chunk(name), maxSealed)
	if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, errTooLarge) {
		return nil, err
	}
	var data []byte
	if err == nil {
		data, err = v.key.open(sealed, v.key.chunks)
	}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		if _, lerr := v.store.Get(ctx, c.Object(), maxManifest); errors.Is(lerr, fs.ErrNotExist) {
			return nil, fmt.Errorf("copy %s: %w any more: newer ones have its place; begin again, with one that \"cradle-csi cold ls\" lists", c, volume.ErrNotFound)
		}
		err = errors.New("it is missing")
	case err == nil && v.key.name(data) != name:
		err = errors.New("its content is not what was saved")
	case err == nil && len(data) != chunkSize:
		err = fmt.Errorf("it has %d bytes, not %d", len(data), chunkSize)
	}
	if err != nil {
		return nil, fmt.Errorf("copy %s: chunk %d (bytes %d to %d), %s: %w", c, i, i*chunkSize, i*chunkSize+length(i, size)-1, c.chunk(name), &damage{err})
	}
	return data, nil
}

// Restore writes a copy on a disk that has its size, and that holds zeros, or what an interrupted call for the same copy has left. It never writes a byte that is not what was saved: the first damaged chunk ends it, with an
// ErrDamaged that names the chunk. What an interrupted call has written is not fetched again.
func (v *Vault) Restore(ctx context.Context, c Copy, to *os.File) error {
	m, err := v.manifest(ctx, c)
	if err != nil {
		return err
	}
	return several(ctx, m.sorted(), func(ctx context.Context, i int64, name string) error {
		have, err := readChunk(to, i, m.Size)
		if err != nil || !zeros(have) && v.key.name(have) == name {
			return err
		}
		data, err := v.fetch(ctx, c, i, name, m.Size)
		if err == nil {
			_, err = to.WriteAt(data[:length(i, m.Size)], i*chunkSize)
		}
		return err
	})
}

// Verify reads all of a copy, as Restore would, and reports every chunk that is damaged; the error is an ErrDamaged then. seen holds the names of chunks that
// were found whole, and can be given on to the next copy.
func (v *Vault) Verify(ctx context.Context, c Copy, seen *sync.Map, report func(error)) (Info, error) {
	m, err := v.manifest(ctx, c)
	if err != nil {
		return Info{}, err
	}
	var mu sync.Mutex
	bad := 0
	err = several(ctx, m.sorted(), func(ctx context.Context, i int64, name string) error {
		if _, ok := seen.Load(c.chunk(name)); ok {
			return nil
		}
		_, err := v.fetch(ctx, c, i, name, m.Size)
		if errors.Is(err, ErrDamaged) {
			mu.Lock()
			defer mu.Unlock()
			bad++
			report(err)
			return nil
		}
		if err == nil {
			seen.Store(c.chunk(name), true)
		}
		return err
	})
	if err != nil {
		return Info{}, err
	}
	if bad > 0 {
		err = fmt.Errorf("copy %s: %w: %d of %d chunks; restore another one", c, ErrDamaged, bad, len(m.chunks))
	}
	return m.info(), err
}

// Info is what a copy says of the volume.
type Info struct {
	Snapshot   string    // the name of the snapshot that was copied
	Created    time.Time // when that was taken, by the clock of then
	Former     []string  // as in Order
	Size       int64
	Stored     int64 // bytes in chunks, before compression
	Content    volume.Content
	Parameters map[string]string
}

// Info reads it.
func (v *Vault) Info(ctx context.Context, c Copy) (Info, error) {
	m, err := v.manifest(ctx, c)
	if err != nil {
		return Info{}, err
	}
	return m.info(), nil
}

func (m *manifest) info() Info {
	created := m.Created
	if created.IsZero() {
		created = m.Taken
	}
	return Info{m.Snapshot, created, m.Former, m.Size, int64(len(m.chunks)) * chunkSize, m.Content, m.Parameters}
}

// Prune removes the copies of a volume that the retention does not keep, and then the chunks that no copy has, unless which these are can't be said. Nobody may save one of the same volume
// meanwhile. saved is the newest one: a list of copies that lacks it is an old one, and nothing is removed by that.
func (v *Vault) Prune(ctx context.Context, of volume.Volume, keep volume.Retention, saved Copy) error {
	all, err := v.Copies(ctx, of.ID)
	if err != nil {
		return err
	}
	line := Copy{Volume: of.ID, Born: of.Created}.line()
	all = slices.DeleteFunc(all, func(c Copy) bool { return c.line() != line })
	if len(all) == 0 || all[len(all)-1].Object() != saved.Object() {
		return fmt.Errorf("remove old copies of volume %s: the list of its copies does not end with %s, which was saved; nothing is removed", of.ID, saved)
	}
	taken := make([]time.Time, len(all))
	for i, c := range all {
		taken[i] = c.Taken
	}
	kept := keep.Keep(taken)
	wanted := map[string]bool{}
	var drop []Copy
	var unread []error
	for i, c := range all {
		if !kept[i] {
			drop = append(drop, c)
			continue
		}
		m, err := v.manifest(ctx, c)
		if errors.Is(err, ErrDamaged) {
			unread = append(unread, err)
			continue
		}
		if err != nil {
			return err
		}
		for _, name := range m.chunks {
			wanted[name] = true
		}
	}
	if len(drop) == 0 {
		return nil
	}
	for _, c := range drop {
		if err := v.store.Delete(ctx, c.Object()); err != nil {
			return err
		}
	}
	if len(unread) > 0 {
		return fmt.Errorf("volume %s: copies that are too many are removed, but not their chunks, as a list of those that are kept can't be read. It goes in its time: %w", of.ID, errors.Join(unread...))
	}
	var rubbish []string // what a process that was killed has left, too
	err = v.store.List(ctx, chunksDir+line, func(object string) error {
		if name, ok := strings.CutSuffix(path.Base(object), suffix); !ok || !wanted[name] {
			rubbish = append(rubbish, object)
		}
		return nil
	})
	if err == nil {
		err = v.store.List(ctx, listsDir+line, func(object string) error {
			if strings.HasPrefix(path.Base(object), temporary) {
				rubbish = append(rubbish, object)
			}
			return nil
		})
	}
	if err != nil {
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(workers)
	for _, object := range rubbish {
		g.Go(func() error { return v.store.Delete(ctx, object) })
	}
	return g.Wait()
}

var nothing [chunkSize]byte

func zeros(chunk []byte) bool { return bytes.Equal(chunk, nothing[:]) }
