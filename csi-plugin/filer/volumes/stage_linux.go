package volumes

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/csi-plugin/filer/api"
	"github.com/cradlestack/cradlestack/csi-plugin/mount"
	"github.com/cradlestack/cradlestack/csi-plugin/volume"
	"github.com/cradlestack/cradlestack/internal/durable"
)

// Dir is where volumes are mounted, and where is written down what the filer has published for this host. It outlasts a reboot, as the publications do:
//
//	mounts/ID       a volume's files: a mount
//	notes/ID.json   its note, which is there before its publication is, and as long
//	identity        by which servers of NFS version 4 know this host
//	lock            the file of the volumes' locks
const Dir = "/var/lib/cradle/nfs"

// A note is of a volume that this host has, or is about to have, mounted.
type note struct {
	Publication string  `json:"publication"`
	Former      string  `json:"former,omitempty"` // the source of a mount that is being replaced
	Places      []place `json:"places,omitempty"` // where it is to be again
	Boot        string  `json:"boot,omitempty"`   // that of those: after another one nothing of them is mounted
}

// A place is where a volume is seen besides.
type place struct {
	At      string `json:"at"`
	Root    string `json:"root"`
	Options string `json:"options"`
}

func (b *Backend) locks() mount.Locks        { return mount.Locks(filepath.Join(b.dir, "lock")) }
func (b *Backend) point(id string) string    { return filepath.Join(b.dir, "mounts", id) }
func (b *Backend) notes() string             { return filepath.Join(b.dir, "notes") }
func (b *Backend) noteFile(id string) string { return filepath.Join(b.notes(), id+".json") }
func (b *Backend) used(id string) (at time.Time, err error) {
	fi, err := os.Stat(b.noteFile(id))
	if err != nil {
		return at, err
	}
	return fi.ModTime(), nil
}

// note reads that of a volume; the zero value is none.
func (b *Backend) note(id string) (n note, err error) {
	data, err := os.ReadFile(b.noteFile(id))
	if errors.Is(err, fs.ErrNotExist) {
		return n, nil
	}
	if err == nil {
		if err = json.Unmarshal(data, &n); err == nil && !volume.ValidName(n.Publication) {
			err = errors.New("it names no publication")
		}
	}
	if err == nil && n.Former != "" {
		var now string
		if now, err = mount.Boot(); err == nil && now != n.Boot {
			n.Former, n.Places, n.Boot = "", nil, ""
		}
	}
	if err != nil {
		err = fmt.Errorf("%s: %w; remove it once nothing of the volume is mounted here", b.noteFile(id), err)
	}
	return n, err
}

func (b *Backend) write(id string, n note) error {
	data, err := json.Marshal(n)
	if err != nil {
		return err
	}
	return durable.WriteFile(b.noteFile(id), append(data, '\n'))
}

// Stage is volume.Backend's. A volume is mounted once on a host, for writing: that some of its places are for reading only is up to who publishes it there. The filer could not
// refuse writes meanwhile: the kernel keeps a refusal, and tells it to those who may write later on.
func (b *Backend) Stage(ctx context.Context, id string, use volume.Use) (source volume.Source, err error) {
	v, err := b.Get(ctx, id)
	switch {
	case err != nil:
		return source, err
	case v.Block() || use.As == volume.AsRaw:
		return source, volume.Invalid("volume", "class %s is of file volumes, which have no block device", v.Class)
	case use.As == volume.AsGuest || v.Direct:
		return source, volume.Invalid("volume", "attach=direct is what guests attach themselves, and nothing else is")
	}
	if err := os.MkdirAll(b.notes(), 0o700); err != nil {
		return source, err
	}
	ctx, unlock, err := b.locks().Take(ctx, id)
	if err != nil {
		return source, err
	}
	defer unlock()
	if err := b.up(ctx, id); err != nil {
		return source, fmt.Errorf("stage volume %s: %w", id, err)
	}
	source.Directory = b.point(id)
	return source, nil
}

// patient is how long something that is mounted may take to answer.
const patient = 20 * time.Second

// answers says whether what is mounted at a path does.
func answers(path string) error {
	return mount.Answered(path, patient, volume.ErrUnavailable, func() error {
		var st unix.Statfs_t
		if err := unix.Statfs(path, &st); err != nil {
			return &fs.PathError{Op: "statfs", Path: path, Err: err}
		}
		return nil
	})
}

// stale says whether an error is that of a mount whose publication has ended.
func stale(err error) bool {
	return errors.Is(err, unix.ESTALE) || errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM) || errors.Is(err, unix.ENOENT)
}

// up publishes a volume, which is locked, for this host and mounts it, unless that is done; what is mounted from a publication that is no more is mounted again where it was.
func (b *Backend) up(ctx context.Context, id string) error {
	if err := mount.NFSClient(); errors.Is(err, mount.ErrNoNFS) {
		return fmt.Errorf("%w: %w: load it (modprobe nfs), or make the volume with attach=direct, which pods of cradle attach themselves", volume.ErrHost, err)
	} else if err != nil {
		return err
	}
	if err := b.identify(ctx); err != nil {
		return err
	}
	n, err := b.note(id)
	if err != nil {
		return err
	}
	at, err := mount.At(b.point(id))
	if err != nil {
		return err
	}
	if n.Publication == "" {
		n.Publication = "host-" + strings.ToLower(rand.Text())
	}
	if err := b.write(id, n); err != nil {
		return err
	}
	p, err := b.publish(ctx, id, n)
	if err != nil {
		return err
	}
	mounts, err := p.NFS().Mounts(netip.IPv6Unspecified(), nil)
	if err != nil {
		return fmt.Errorf("publication %s: %w", p.ID, err)
	}
	source := mounts[0].Source
	if at != nil {
		switch err := answers(b.point(id)); {
		case at.Source != source || stale(err):
			if err := n.replaces(at.Source, b.point(id)); err != nil {
				return err
			}
			if err := b.write(id, n); err != nil {
				return err
			}
		case err != nil:
			return err
		}
	}
	if at == nil || n.Former != "" && (at.Source != source || n.Former == source) {
		if err := b.mount(ctx, id, p); err != nil {
			return err
		}
	}
	if n.Former == "" {
		return nil
	}
	if err := n.again(b.point(id), source); err != nil {
		return err
	}
	n.Former, n.Places, n.Boot = "", nil, ""
	return b.write(id, n)
}

// publish has the filer let this host, and nobody else, see a volume.
func (b *Backend) publish(ctx context.Context, id string, n note) (p api.Publication, err error) {
	clients, err := b.addresses()
	if err != nil {
		return p, err
	}
	ask := func() error {
		return b.ask(ctx, func(ctx context.Context) (err error) {
			p, err = b.client.Publish(ctx, api.Publication{ID: n.Publication, Volume: id, Clients: clients})
			return err
		})
	}
	if err := ask(); err != nil {
		return p, err
	}
	// Where a filer of the set is on this host, this one has the set's address when that is active, and speaks to it from there.
	host, _, _ := net.SplitHostPort(p.Address)
	if ip, err := netip.ParseAddr(host); err == nil && hasFiler() && !among(ip, clients) {
		clients = append(clients, one(ip))
		return p, ask()
	}
	return p, nil
}

func hasFiler() bool {
	_, err := os.Stat(api.Socket)
	return err == nil
}

func one(ip netip.Addr) netip.Prefix {
	ip = ip.Unmap().WithZone("")
	return netip.PrefixFrom(ip, ip.BitLen())
}

func among(ip netip.Addr, all []netip.Prefix) bool {
	return slices.ContainsFunc(all, func(p netip.Prefix) bool { return p.Contains(ip.Unmap()) })
}

// addresses are this host's own: none of its guests or containers is mounted for.
func (b *Backend) addresses() (all []netip.Prefix, err error) {
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return nil, err
	}
	for _, a := range addrs {
		n, isNet := a.(*net.IPNet)
		if !isNet || !n.IP.IsGlobalUnicast() && (!n.IP.IsLoopback() || b.client.Socket == "") {
			continue
		}
		if ip, ok := netip.AddrFromSlice(n.IP); ok {
			all = append(all, one(ip))
		}
	}
	if len(all) == 0 {
		return nil, fmt.Errorf("%w: this host has no address that a filer could know it by", volume.ErrUnavailable)
	}
	return all, nil
}

// identify tells this host from others that have its name.
func (b *Backend) identify(ctx context.Context) error {
	id, err := b.identity(ctx)
	if err != nil {
		return err
	}
	return mount.IdentifyNFS(id)
}

// identity is what this host is known by, from its first mount on.
func (b *Backend) identity(ctx context.Context) (string, error) {
	_, unlock, err := b.locks().Take(ctx, "/identity") // no volume's name: others are staged at the same time
	if err != nil {
		return "", err
	}
	defer unlock()
	path := filepath.Join(b.dir, "identity")
	id, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		id = []byte(strings.ToLower(rand.Text()))
		err = durable.WriteFile(path, id)
	}
	return string(id), err
}

// mount mounts a volume at its place, instead of what is there.
func (b *Backend) mount(ctx context.Context, id string, p api.Publication) error {
	tree, err := mount.NFS(ctx, p.NFS())
	if err != nil {
		for _, away := range []error{unix.ECONNREFUSED, unix.ETIMEDOUT, unix.EHOSTUNREACH, unix.ENETUNREACH, unix.ECONNRESET, unix.EIO, unix.EINTR} {
			if errors.Is(err, away) {
				return fmt.Errorf("%w: %w", volume.ErrUnavailable, err)
			}
		}
		var unresolved *net.DNSError
		if errors.As(err, &unresolved) {
			return fmt.Errorf("%w: %w", volume.ErrUnavailable, err)
		}
		if errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM) {
			return fmt.Errorf("%w: %w: the filer sees this host at none of its own addresses (%v); let nothing translate them on the way", volume.ErrHost, err, p.Clients)
		}
		if errors.Is(err, mount.ErrNoNFS) || errors.Is(err, unix.EPROTONOSUPPORT) {
			return fmt.Errorf("%w: %w: it has not the version that the filer speaks (%s): load it (modprobe nfsv3, nfsv4)", volume.ErrHost, err, p.Options)
		}
		return err
	}
	err = drop(b.point(id))
	if err == nil { // only now: what is mounted there may not say that it is a directory
		err = os.MkdirAll(b.point(id), 0o700)
	}
	if err != nil {
		return errors.Join(err, unix.Close(int(tree)))
	}
	return tree.Attach(b.point(id))
}

// drop takes away what is mounted at a path, whoever uses it, and ends the calls that wait for its server.
func drop(path string) error {
	for {
		if mounted, err := mount.Is(path); err != nil || !mounted {
			return err
		}
		err := unix.Unmount(path, unix.MNT_FORCE|unix.UMOUNT_NOFOLLOW)
		if err != nil {
			err = unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		}
		if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) { // somebody else was faster
			return fmt.Errorf("unmount %s: %w", path, err)
		}
	}
}

// replaces notes where a source is mounted besides a point, before anything of it is taken away.
func (n *note) replaces(former, point string) error {
	mounts, err := of(former)
	if err != nil {
		return err
	}
	if n.Boot, err = mount.Boot(); err != nil {
		return err
	}
	n.Former = former
	for _, m := range mounts {
		at := func(p place) bool { return p.At == m.Mountpoint }
		if m.Mountpoint != point && !slices.ContainsFunc(n.Places, at) {
			n.Places = append(n.Places, place{m.Mountpoint, m.Root, m.Options})
		}
	}
	return nil
}

// again makes what is mounted at point, from a source, appear in all places. One whose directory is no more was unpublished meanwhile.
func (n *note) again(point, source string) error {
	for _, p := range n.Places {
		at, err := mount.At(p.At)
		if err != nil {
			return err
		}
		if at != nil && (!mount.IsNFS(at) || at.Source == source && n.Former != source) {
			continue
		}
		if at != nil {
			if err := drop(p.At); err != nil {
				return err
			}
		}
		if _, err := os.Lstat(p.At); errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err := mount.Bind(filepath.Join(point, p.Root), p.At, mount.OptionsOf(&mountinfo.Info{Options: p.Options})); err != nil {
			return err
		}
	}
	return nil
}

// of are the mounts of a source.
func of(source string) ([]*mountinfo.Info, error) {
	return mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) { return !mount.IsNFS(m) || m.Source != source, false })
}

// Unstage is volume.Backend's.
func (b *Backend) Unstage(ctx context.Context, id string) error {
	if staged, err := b.Staged(id); err != nil || !staged {
		return err
	}
	ctx, unlock, err := b.locks().Take(ctx, id)
	if err != nil {
		return err
	}
	defer unlock()
	if others, err := mount.Others(b.point(id)); err != nil || len(others) > 0 {
		return err
	}
	if err := b.down(ctx, id); err != nil {
		return fmt.Errorf("unstage volume %s: %w", id, err)
	}
	return nil
}

// Staged is volume.Stager's.
func (b *Backend) Staged(id string) (bool, error) {
	if !volume.ValidName(id) {
		return false, nil
	}
	_, err := os.Lstat(b.noteFile(id))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

// down unmounts a volume, which is locked, when all that was written is at the filer, and ends its publication.
func (b *Backend) down(ctx context.Context, id string) error {
	n, err := b.note(id)
	if err != nil {
		return err
	}
	point := b.point(id)
	if mounted, err := mount.Is(point); err != nil {
		return err
	} else if mounted {
		err := answers(point)
		if err == nil {
			err = mount.Sync(point)
		}
		switch {
		case stale(err):
			err = drop(point)
		case err == nil:
			err = unmount(ctx, point)
		}
		if err != nil {
			return err
		}
	}
	if n.Publication != "" {
		if err := b.ask(ctx, func(ctx context.Context) error { return b.client.Unpublish(ctx, n.Publication) }); err != nil {
			return err
		}
	}
	return b.forget(id)
}

func unmount(ctx context.Context, point string) error {
	err := mount.Patiently(ctx, func() error { return mount.Unmount(point) })
	if errors.Is(err, unix.EBUSY) {
		err = fmt.Errorf("%s: %w: end what still uses it", point, volume.ErrInUse)
	}
	return err
}

// forget removes what is written down of a volume that is neither mounted nor published any more.
func (b *Backend) forget(id string) error {
	for _, path := range []string{b.point(id), b.noteFile(id)} {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return durable.SyncDir(b.notes())
}

// Times that Repair has: a plugin that starts waits for it.
const (
	listing = 10 * time.Second
	idling  = 5 * time.Minute // after which nobody who has staged a volume can still be about to mount it at its place
)

// Repair is volume.Repairer's: it ends publications of what this host has not mounted any more, unmounts what is at no place, and mounts again what the filer has lost the
// publication of.
func (b *Backend) Repair(ctx context.Context, look bool, report func(string)) error {
	entries, err := os.ReadDir(b.notes())
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil || len(entries) == 0 {
		return err
	}
	asking, cancel := context.WithTimeout(ctx, listing)
	all, err := b.client.Publications(asking)
	cancel()
	if err != nil {
		return err
	}
	published := map[string]api.Publication{}
	for _, p := range all {
		published[p.ID] = p
	}
	var errs []error
	for _, e := range entries {
		id, is := strings.CutSuffix(e.Name(), ".json")
		if !is || !volume.ValidName(id) {
			continue
		}
		err := b.locks().Alone(ctx, id, func(ctx context.Context) error { return b.repair(ctx, id, published, look, report) })
		if err != nil {
			errs = append(errs, fmt.Errorf("volume %s: %w", id, err))
		}
		if errors.Is(err, volume.ErrUnavailable) { // as all others are then, each for its time
			break
		}
	}
	return errors.Join(errs...)
}

func (b *Backend) repair(ctx context.Context, id string, published map[string]api.Publication, look bool, report func(string)) error {
	n, err := b.note(id)
	if err != nil || n.Publication == "" {
		return err
	}
	at, err := mount.At(b.point(id))
	if err != nil {
		return err
	}
	p, is := published[n.Publication]
	if at == nil && n.Former == "" {
		if is {
			if places, err := of(source(p)); err != nil || len(places) > 0 {
				return err // somebody has unmounted it here alone
			}
		}
		report(fmt.Sprintf("volume %s: published for this host, and not mounted: its attachment did not come to its end, or the host was started anew", id))
		if look {
			return nil
		}
		return b.down(ctx, id)
	}
	others, err := mount.Others(b.point(id))
	if err != nil {
		return err
	}
	used, err := b.used(id)
	if err != nil {
		return err
	}
	switch {
	case n.Former == "" && len(others) == 0 && time.Since(used) > idling:
		report(fmt.Sprintf("volume %s: mounted, and at no place: its attachment did not come to its end", id))
		if look {
			return nil
		}
		return b.down(ctx, id)
	case n.Former != "" || !is || source(p) != at.Source:
		report(fmt.Sprintf("volume %s: mounted from a publication that the filer has no more; what is mounted from it is mounted again, and processes have to open their files anew", id))
	default:
		own, err := b.addresses()
		if err != nil {
			return err
		}
		if !slices.ContainsFunc(own, func(a netip.Prefix) bool { return !among(a.Addr(), p.Clients) }) {
			return answers(b.point(id))
		}
		report(fmt.Sprintf("volume %s: published for this host when it had other addresses", id))
	}
	if look {
		return nil
	}
	return b.up(ctx, id)
}

// source is what a publication is mounted as.
func source(p api.Publication) string {
	mounts, err := p.NFS().Mounts(netip.IPv6Unspecified(), nil)
	if err != nil {
		return ""
	}
	return mounts[0].Source
}

// Abandon takes a volume away from this host whose filer will not come back: who uses it gets errors, and what was written and is not at the filer is lost.
func (b *Backend) Abandon(ctx context.Context, id string, look bool, report func(string)) error {
	if err := known(id); err != nil {
		return err
	}
	n, err := b.note(id)
	if err != nil {
		return err
	}
	point := b.point(id)
	at, err := mount.At(point)
	if err != nil {
		return err
	}
	var places []*mountinfo.Info
	if at != nil {
		if places, err = mount.Others(point); err != nil {
			return err
		}
	}
	if at == nil && n.Publication == "" {
		return fmt.Errorf("volume %s: %w on this host", id, volume.ErrNotFound)
	}
	report(fmt.Sprintf("volume %s: taken away from this host, at %d places; what was written and had not reached the filer is lost", id, len(places)))
	if look {
		return nil
	}
	for _, m := range places {
		if err := drop(m.Mountpoint); err != nil {
			return err
		}
	}
	if err := drop(point); err != nil {
		return err
	}
	if n.Publication != "" {
		asking, cancel := context.WithTimeout(ctx, listing)
		defer cancel()
		if err := b.client.Unpublish(asking, n.Publication); err != nil {
			report(fmt.Sprintf("volume %s: its publication %s is left at the filer: %v", id, n.Publication, err))
		}
	}
	return b.forget(id)
}
