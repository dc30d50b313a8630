package guest

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/spec"
)

// identifyNFS tells this machine from others that have its host name and address, and from those that were copied in the middle of their lives: a server of version 4 would
// take them for one client, and their locks for each other's. It is what the kernel adds to its name (nfs.nfs4_unique_id).
func identifyNFS(id string) error {
	const most = 63
	err := os.WriteFile("/sys/module/nfs/parameters/nfs4_unique_id", []byte(id[:min(most, len(id))]), 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // this kernel has no NFS, as mounting will say
	}
	return err
}

// mountNFS mounts as mount.nfs(8) does: the version asked for, or the newest that the server speaks.
func mountNFS(ctx context.Context, n *spec.NFSVolume, at, id string) error {
	if err := identifyNFS(id); err != nil {
		return err
	}
	host, _ := n.Server()
	ips, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	if err != nil {
		return fmt.Errorf("nfs server %s: %w", host, err)
	}
	flags, data := parseMountOptions(0, n.Options)
	if n.ReadOnly {
		flags |= unix.MS_RDONLY
	}
	mounts, err := n.Mounts(ips[0], data)
	if err != nil {
		return &stateError{ErrInvalid, err.Error()}
	}
	for _, m := range mounts {
		if err = mount(m.Source, at, m.Type, flags, strings.Join(m.Data, ",")); err == nil {
			return nil
		}
		// Not this version, or (the last) not the MOUNT program at this port.
		if !errors.Is(err, unix.EPROTONOSUPPORT) && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.EPFNOSUPPORT) {
			break
		}
	}
	return fmt.Errorf("nfs %s: %w", mounts[0].Source, err)
}
