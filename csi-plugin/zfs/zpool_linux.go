package zfs

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/cradlestack/cradlestack/csi-plugin/mount"
	"github.com/cradlestack/cradlestack/csi-plugin/volume"
)

// Zpools are those that pools are in, each once.
func Zpools(pools []Pool) (names []string, err error) {
	seen := map[string]bool{}
	for _, p := range pools {
		name := zpool(p.Dataset)
		if !zpoolName.MatchString(name) {
			return nil, volume.Invalid("pool "+p.Name, "%q is no zpool", name)
		}
		if !seen[name] {
			names = append(names, name)
		}
		seen[name] = true
	}
	return names, nil
}

// zpoolName is what zpool-create(8) allows.
var zpoolName = regexp.MustCompile(`^[a-zA-Z][a-zA-Z0-9_.:-]{0,200}$`)

// Imported says whether this host has a zpool imported.
func Imported(name string) (bool, error) {
	_, err := os.Stat("/proc/spl/kstat/zfs/" + name + "/state")
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

// whileImporting is for how long another host may be at importing a zpool while nothing on its disks says so.
const whileImporting = 20 * time.Second

// Import imports a zpool here that other hosts reach as well, unless one of them has it: with multihost on ZFS itself looks for that host's writes, for as long as
// zpoolprops(7) says, unless it was exported. The caller sees to it that no two hosts do this at once. guarded says that multihost is known to have been on: then it
// is taken also of a host that has not exported it, if nothing is written any more. settled says that no other host may still be at importing it.
//
// A zpool that is not free is an ErrUnavailable, which says who has it. Nothing of the zpool is mounted, and multihost is on. Guard is the caller's.
func Import(ctx context.Context, name string, guarded, settled bool) error {
	is, err := Imported(name)
	if err != nil {
		return err
	}
	if !is {
		if !settled {
			select {
			case <-time.After(whileImporting):
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
		args := []string{"import", "-N", "-o", "cachefile=none", "-o", "multihost=on"}
		if guarded {
			args = append(args, "-f") // which ZFS does not take for leave to skip looking
		}
		if _, err := command(ctx, "zpool", append(args, name)...); err != nil {
			return fmt.Errorf("%w: zpool %s: %w", volume.ErrUnavailable, name, err)
		}
		return nil
	}
	if _, err := command(ctx, "zpool", "set", "cachefile=none", name); err != nil { // else the host takes it again when it boots
		return err
	}
	return Guard(ctx, name)
}

// Guard has a zpool's multihost on, and no failmode by which ZFS would not say that it is suspended.
func Guard(ctx context.Context, name string) error {
	out, err := command(ctx, "zpool", "get", "-H", "-o", "property,value", "multihost,failmode", name)
	for _, row := range rows(out) {
		switch {
		case err != nil || len(row) != 2:
		case row[0] == "multihost" && row[1] != "on":
			_, err = command(ctx, "zpool", "set", "multihost=on", name)
		case row[0] == "failmode" && row[1] == "continue":
			_, err = command(ctx, "zpool", "set", "failmode=wait", name)
		}
	}
	return err
}

// Export gives a zpool back that is imported here, as often as it is busy, until ctx ends. What is mounted of it is unmounted.
func Export(ctx context.Context, name string) error {
	for {
		is, err := Imported(name)
		if err != nil || !is {
			return err
		}
		if _, err = command(ctx, "zpool", "export", name); err == nil {
			return nil
		}
		if is, ierr := Imported(name); ierr == nil && !is {
			return nil // somebody else was faster, as a filer's warden, or the next process
		}
		if !errors.Is(err, errBusy) {
			return fmt.Errorf("zpool %s: %w", name, err)
		}
		select {
		case <-time.After(100 * time.Millisecond):
		case <-ctx.Done():
			return fmt.Errorf("zpool %s: %w; end what has files of it open on this host", name, err)
		}
	}
}

// HostID is what ZFS tells hosts apart by (zgenhostid(8)).
func HostID() (string, error) {
	text, err := os.ReadFile("/sys/module/spl/parameters/spl_hostid")
	if err == nil {
		if id, err := strconv.ParseUint(strings.TrimSpace(string(text)), 10, 64); err == nil && id != 0 {
			return fmt.Sprintf("%08x", id), nil
		}
	}
	id, err := os.ReadFile("/etc/hostid")
	if err != nil || len(id) != 4 || binary.NativeEndian.Uint32(id) == 0 {
		return "", errors.New("this host has no hostid, by which ZFS tells hosts apart: run zgenhostid, and start this again")
	}
	return fmt.Sprintf("%08x", binary.NativeEndian.Uint32(id)), nil
}

// StateDataset is the file system that what belongs to the volumes' server is kept in, beside them. Its name is no volume's.
func StateDataset(pools []Pool) string { return pools[0].Dataset + "/filer:state" }

// MakeState makes it.
func (b *Backend) MakeState(ctx context.Context) error {
	_, err := zfs(ctx, "create", "-o", "mountpoint=legacy", "-o", "xattr=sa", StateDataset(b.pools))
	if errors.Is(err, errExists) {
		err = nil
	}
	return err
}

// Browse is volume.Browser's. A snapshot that is deleted meanwhile goes once it is closed, with the next that is deleted, or with the volume.
func (b *Backend) Browse(ctx context.Context, id volume.SnapshotID) (*os.Root, error) {
	t, err := b.browse(ctx, id)
	if err != nil {
		return nil, err
	}
	return t.Root()
}

// BrowseAt is volume.Browser's.
func (b *Backend) BrowseAt(ctx context.Context, id volume.SnapshotID, path string) error {
	t, err := b.browse(ctx, id)
	if err != nil {
		return err
	}
	return t.Attach(path)
}

func (b *Backend) browse(ctx context.Context, id volume.SnapshotID) (mount.Tree, error) {
	ctx, unlock, err := b.locks.Take(ctx, id.Volume, "@"+id.Name)
	if err != nil {
		return -1, err
	}
	defer unlock()
	f, err := b.find(ctx, id.Volume)
	if err != nil {
		return -1, err
	}
	s, err := f.snap(ctx, id.Name)
	if err != nil {
		return -1, err
	}
	if s.Block() {
		return -1, volume.Invalid("snapshot "+id.String(), "class %s is of block volumes, whose files are their users'", s.Class)
	}
	return mount.Detached(s.name, mount.ZFS, true)
}
