package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/cradlestack/cradlestack/csi-plugin/filer/api"
	"github.com/cradlestack/cradlestack/csi-plugin/filer/ganesha"
	"github.com/cradlestack/cradlestack/csi-plugin/filer/gateway"
	"github.com/cradlestack/cradlestack/csi-plugin/filer/lease"
	"github.com/cradlestack/cradlestack/csi-plugin/filer/nfs"
	"github.com/cradlestack/cradlestack/csi-plugin/filer/s3"
	"github.com/cradlestack/cradlestack/csi-plugin/filer/webdav"
	"github.com/cradlestack/cradlestack/csi-plugin/mount"
	"github.com/cradlestack/cradlestack/csi-plugin/tree"
	"github.com/cradlestack/cradlestack/csi-plugin/volume"
	"github.com/cradlestack/cradlestack/internal/keyed"
	"github.com/cradlestack/cradlestack/spec"
)

// A filer serves the volumes of a backend that are published or granted. It keeps in dir, which is gone after a reboot:
//
//	volumes/ID             the volume's files: a mount of their own
//	publications/ID.json   a publication, as the clients' mounts are gone then, too. A set, whose clients go on meanwhile, keeps them in its state
type filer struct {
	backend    volume.Backend
	engine     nfs.Engine
	engineName string
	keptBy     string // the backend's name
	dir        string
	state      string // with what outlasts a reboot, such as grants/ID.json
	kept       string // with publications/ID.json
	shared     bool   // with other hosts
	images     bool   // a volume with a size is one
	lease      *lease.Lease
	leash      *os.File        // of the processes that serve S3, in a set
	long       context.Context // of what is done for long, which ends with the term
	webdav     *webdav.Server  // nil where that is not served
	s3         *s3.Server      // so is this
	urls       urls
	metrics    *metrics
	audit      *audit
	address    string
	log        *slog.Logger
	since      time.Time

	tenants   keyed.Lock        // of namespaces: one of their grants at a time, with its Variable, for which Nomad is waited for
	mu        sync.Mutex        // one change at a time
	entered   map[string]*visit // of volumes
	placed    map[string]bool   // volumes that restore has placed, while it is at it
	compared  sync.Map          // volumes of which somebody wants to know what has changed
	comparing chan struct{}     // one of maxComparing for each of them that is: lists of all that is in both are in memory
	lists     *tree.Memory      // that those and rollbacks have for that
	leaving   map[string]bool   // volumes that are being deleted
	halves    sync.Map          // volumes, by id, that a former process may have left half rolled back
	busy      keyed.Lock        // of volumes, by id: what lasting does
	failed    sync.Map          // volumes, by id → failed: what it came to where nobody waited any more, at most one of each
	work      sync.WaitGroup    // that it is at
	atWork    chan struct{}     // one of maxAtWork for each
	gates     sync.Map          // volumes → *gateway.Gate, of WebDAV and S3
}

// options are for clients: they wait for as long as the filer is away, and ask again often enough to go on soon.
func (f *filer) options() string {
	version := "vers=3"
	if f.engineName == byGanesha {
		version = ganesha.Version
	}
	return version + ",hard,timeo=100,retrans=3"
}

func (f *filer) published() records[api.Publication] {
	return records[api.Publication]{filepath.Join(f.kept, "publications"), "publication"}
}

func (f *filer) root(volume string) string { return filepath.Join(f.dir, "volumes", volume) }

// publish lets clients see a volume.
func (f *filer) publish(ctx context.Context, p api.Publication) (api.Publication, error) {
	if err := volume.CheckName("publication", p.ID); err != nil {
		return p, err
	}
	if len(p.Clients) == 0 {
		return p, volume.Invalid("publication "+p.ID, "it is for no clients; say the addresses that may mount it")
	}
	if err := f.whole(ctx, p.Volume); err != nil {
		return p, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	former, err := f.published().read(p.ID)
	switch {
	case err == nil && former.Volume != p.Volume:
		return p, fmt.Errorf("publication %s %w: it is of volume %s", p.ID, volume.ErrExists, former.Volume)
	case err == nil && f.served(former):
		p.Export = former.Export
	case err == nil || errors.Is(err, fs.ErrNotExist):
		separator := "/"
		if f.engineName == byGanesha {
			separator = "." // all clients of NFS-Ganesha see the directories on the way to an export
		}
		p.Export = "/" + p.Volume + separator + strings.ToLower(rand.Text())
	default:
		return p, err
	}
	p.Address, p.Options = f.address, f.options()
	if err := f.hasFiles(ctx, p.Volume); err != nil {
		return p, err
	}
	// The record comes first: what it is about can then be undone, whatever happens.
	if err := f.published().write(p.ID, p); err != nil {
		return p, err
	}
	if err := f.serve(ctx, p); err != nil {
		if former.ID == "" {
			err = errors.Join(err, f.end(ctx, p))
		}
		return p, err
	}
	f.log.Info("published", "publication", p.ID, "volume", p.Volume, "read-only", p.ReadOnly, "clients", p.Clients)
	return p, nil
}

// served says whether a publication is one of this engine, whose paths and handles are none of another's.
func (f *filer) served(p api.Publication) bool {
	its, _, _ := strings.Cut(p.Options, ",")
	own, _, _ := strings.Cut(f.options(), ",")
	return its == own
}

// serve makes the volume's files appear, and exports them.
func (f *filer) serve(ctx context.Context, p api.Publication) error {
	if !f.served(p) {
		return errors.New("it was published by another engine (--engine); publish it again, and have its clients mount it again")
	}
	if err := f.isWhole(p.Volume); err != nil {
		return err
	}
	root, err := f.place(ctx, p.Volume)
	if err != nil {
		return err
	}
	at, err := mount.At(root)
	if err == nil && at == nil {
		err = fmt.Errorf("%s: it has been unmounted", root)
	}
	if err != nil {
		return err
	}
	if f.engineName == byGanesha && !strings.Contains(","+at.VFSOptions+","+at.Options+",", ",dirsync,") {
		f.log.Warn("after a power cut files of this volume may have the names that they had some seconds before: its file system is mounted without dirsync, on the host as well or by the operator", "volume", p.Volume)
	}
	return stuck(f.engine.Export(nfs.Export{
		Path: p.Export, Root: root, Volume: p.Volume, ReadOnly: p.ReadOnly, Clients: p.Clients, Hidden: webdav.Hidden, Snapshots: f.seen(p.Volume),
	}))
}

// stuck gives the error of a protocol its meaning.
func stuck(err error) error {
	if errors.Is(err, nfs.ErrStuck) || errors.Is(err, gateway.ErrStuck) {
		return fmt.Errorf("%w: %w; try again once it does", volume.ErrUnavailable, err)
	}
	return err
}

// hasFiles refuses what can't be served.
func (f *filer) hasFiles(ctx context.Context, id string) error {
	v, err := f.backend.Get(ctx, id)
	switch {
	case err == nil && f.leaving[id]:
		err = fmt.Errorf("volume %s: %w: it is being deleted", id, volume.ErrInUse)
	case err == nil && v.Block():
		err = volume.Invalid("volume "+v.ID, "class %s is of block volumes, which have no files to serve", v.Class)
	case err == nil && f.shared && f.images && v.Size > 0:
		err = volume.Invalid("volume "+v.ID, "it has a size, so its files are in an image, which two hosts must not mount; a set of filers serves volumes that are made without one")
	}
	return err
}

// place makes the volume's files appear.
func (f *filer) place(ctx context.Context, id string) (root string, err error) {
	if f.placed[id] {
		return f.root(id), nil
	}
	if err := f.hasFiles(ctx, id); err != nil {
		return "", err
	}
	source, err := f.backend.Stage(ctx, id, volume.Use{As: volume.AsFiles})
	if err != nil {
		return "", err
	}
	root = f.root(id)
	err = f.mount(ctx, source, root)
	if err == nil && f.placed != nil {
		f.placed[id] = true
	}
	return root, err
}

func (f *filer) mount(ctx context.Context, source volume.Source, root string) error {
	var o mount.Options
	if f.engineName == byGanesha {
		o, _ = mount.ParseOptions([]string{"dirsync"}) // it does not sync directories, and says that they are
	}
	return mount.Place(ctx, source.Device, source.Directory, source.FSType, root, o)
}

// answers refuses to touch a volume whose storage is known to answer nothing: an unmount would have no end, and keep all other volumes' publications and grants waiting.
func (f *filer) answers(ctx context.Context, id string) error {
	_, err := f.backend.Get(ctx, id)
	if errors.Is(err, volume.ErrUnavailable) {
		return err
	}
	return nil
}

// release undoes that, unless somebody has the volume besides those publications and grants that are just ending.
func (f *filer) release(ctx context.Context, id string, ending int) error {
	users := 0
	publications, err := f.published().all()
	for _, p := range publications {
		if p.Volume == id {
			users++
		}
	}
	grants, gerr := f.granted().all()
	for _, g := range grants {
		if g.Volume == id {
			users++
		}
	}
	if err := errors.Join(err, gerr); err != nil || users > ending || f.entered[id] != nil {
		return err
	}
	if err := f.answers(ctx, id); err != nil {
		return err
	}
	root := f.root(id)
	if err := mount.Unmount(root); err != nil {
		return err
	}
	if err := os.Remove(root); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return f.backend.Unstage(ctx, id)
}

// unpublish ends a publication.
func (f *filer) unpublish(ctx context.Context, id string) error {
	if !volume.ValidName(id) {
		return nil
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	p, err := f.published().read(id)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err == nil {
		err = f.end(ctx, p)
	}
	if err == nil {
		f.log.Info("unpublished", "publication", id, "volume", p.Volume)
	}
	return err
}

// end undoes serve, as far as no other publication needs it, and then the record.
func (f *filer) end(ctx context.Context, p api.Publication) error {
	if err := f.engine.Unexport(p.Export); err != nil {
		return stuck(err)
	}
	if err := f.release(ctx, p.Volume, 1); err != nil {
		return err
	}
	return f.published().remove(p.ID)
}

// restore serves again what was published before this process began.
func (f *filer) restore(ctx context.Context) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	all, err := f.published().all()
	errs := []error{err}
	grants, err := f.granted().all()
	errs = append(errs, err)
	f.placed = map[string]bool{} // clients wait: a volume that is published many times is asked for once
	defer func() { f.placed = nil }()
	if err := f.placeAll(ctx, all, grants); err != nil {
		f.log.Warn("mount all volumes at once", "error", err) // one by one they say what is the matter
	}
	return errors.Join(append(errs, f.serveAll(ctx, all, grants))...)
}

// serveAll serves publications and grants, as far as it can.
func (f *filer) serveAll(ctx context.Context, publications []api.Publication, grants []api.Grant) error {
	var errs []error
	for _, p := range publications {
		if err := f.serve(ctx, p); err != nil {
			errs = append(errs, fmt.Errorf("publication %s: %w", p.ID, err))
		}
	}
	for _, g := range grants {
		if err := f.admit(ctx, g); err != nil {
			errs = append(errs, fmt.Errorf("grant %s: %w", g.ID, err))
		}
	}
	return errors.Join(errs...)
}

// placesAtOnce bounds what is mounted at a time: after a crash each file system replays its journal.
const placesAtOnce = 8

// placeAll makes the files of all volumes appear that are published or granted, as far as the backend can be asked for them together.
func (f *filer) placeAll(ctx context.Context, publications []api.Publication, grants []api.Grant) error {
	b, ok := f.backend.(volume.FilesStager)
	wanted := map[string]bool{}
	for _, p := range publications {
		wanted[p.Volume] = f.served(p) || wanted[p.Volume]
	}
	for _, g := range grants {
		wanted[g.Volume] = f.webdav != nil || f.s3 != nil || wanted[g.Volume]
	}
	if !ok || len(wanted) == 0 {
		return nil
	}
	maps.DeleteFunc(wanted, func(_ string, wants bool) bool { return !wants })
	sources, err := b.StageFiles(ctx, slices.Collect(maps.Keys(wanted)))
	var g errgroup.Group
	g.SetLimit(placesAtOnce)
	var mu sync.Mutex
	for id, source := range sources {
		g.Go(func() error {
			err := f.mount(ctx, source, f.root(id))
			if err == nil {
				mu.Lock()
				defer mu.Unlock()
				f.placed[id] = true
			}
			return err
		})
	}
	return errors.Join(err, g.Wait())
}

// publications does not wait for what is being changed, nor do grants and status: that may be waiting for storage.
func (f *filer) publications() ([]api.Publication, error) { return f.published().all() }

func (f *filer) status() (api.Status, error) {
	s, _, err := f.census()
	return s, err
}

// census is the filer's status, and the volumes that are published or granted.
func (f *filer) census() (s api.Status, volumes map[string]bool, err error) {
	all, err := f.publications()
	volumes = map[string]bool{}
	for _, p := range all {
		volumes[p.Volume] = true
	}
	grants, gerr := f.grants()
	for _, g := range grants {
		volumes[g.Volume] = true
	}
	s = api.Status{
		Version: version, Since: f.since, Engine: f.engineName, Address: f.address, Volumes: len(volumes), Publications: len(all), Grants: len(grants), WebDAV: f.urls.webdav, S3: f.urls.s3,
	}
	return s, volumes, errors.Join(err, gerr)
}

// mounted is where a published volume's files are.
func (f *filer) mounted(id string) (string, error) {
	if !volume.ValidName(id) {
		return "", fmt.Errorf("volume %.80q: %w", id, volume.ErrNotFound)
	}
	root := f.root(id)
	is, err := mount.Is(root)
	if err == nil && !is {
		err = fmt.Errorf("volume %s: %w: it is not published", id, volume.ErrNotFound)
	}
	return root, err
}

func (f *filer) stats(id string) (spec.VolumeStats, error) {
	root, err := f.mounted(id)
	if err != nil {
		return spec.VolumeStats{}, err
	}
	return mount.Stats(root)
}

// grow lets the file system of a volume fill it.
func (f *filer) grow(ctx context.Context, id string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	root, err := f.mounted(id)
	if err != nil {
		return err
	}
	source, err := f.backend.Stage(ctx, id, volume.Use{As: volume.AsFiles})
	if err != nil || source.Device == "" || source.FSType == mount.ZFS { // whose quota is all there is to grow
		return err
	}
	return mount.Grow(ctx, source.Device, root, source.FSType)
}
