package mount

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"slices"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/spec"
)

// ErrNoNFS is a host whose kernel mounts no NFS.
var ErrNoNFS = errors.New("this host's kernel has no NFS client")

// NFSClient says whether this host's kernel mounts NFS, whose module it loads where it has one; the error is ErrNoNFS where it does not.
func NFSClient() error {
	fd, err := unix.Fsopen("nfs", unix.FSOPEN_CLOEXEC)
	if errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENOSYS) {
		return ErrNoNFS
	}
	if err != nil {
		return fmt.Errorf("open the kernel's NFS client: %w", err)
	}
	return unix.Close(fd)
}

// nfsOptions are those that a server may ask for. Of the others, some would let calls fail (soft), or have the kernel ask another server (addr).
var nfsOptions = map[string]bool{
	"hard": true, "timeo": true, "retrans": true, "vers": true, "nfsvers": true, "minorversion": true, "proto": true, "port": true, "mountproto": true, "mountport": true, "mountvers": true,
	"lock": true, "nolock": true, "rsize": true, "wsize": true, "nconnect": true, "ac": true, "noac": true, "acregmin": true, "acregmax": true, "acdirmin": true, "acdirmax": true,
	"actimeo": true, "lookupcache": true, "rdirplus": true, "nordirplus": true, "resvport": true, "noresvport": true, "sec": true,
}

// parseNFSOptions splits what a server says to mount with, and refuses what a host does not.
func parseNFSOptions(options string) (all []string, err error) {
	for o := range strings.SplitSeq(options, ",") {
		name, value, _ := strings.Cut(o, "=")
		strange := strings.ContainsFunc(value, func(c rune) bool {
			return (c < '0' || c > '9') && (c < 'a' || c > 'z') && c != '.' && c != ':'
		})
		switch {
		case o == "":
		case !nfsOptions[name] || strange:
			return nil, fmt.Errorf("nfs option %.80q: a host does not mount with it", o)
		default:
			all = append(all, o)
		}
	}
	if _, hard := spec.MountOption(all, "hard"); !hard {
		all = append(all, "hard") // as the kernel has it without a word, but for some versions
	}
	return all, nil
}

// NFS mounts a volume where nobody else sees it, without a program: each option is one to the kernel, whatever is in it. No set-user-id program and no device node
// on it counts. It waits for a server that does not answer.
func NFS(ctx context.Context, n *spec.NFSVolume) (Tree, error) {
	options, err := parseNFSOptions(n.Options)
	if err != nil {
		return -1, err
	}
	host, _ := n.Server()
	ips, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	if err != nil {
		return -1, fmt.Errorf("nfs server %.80q: %w", host, err)
	}
	mounts, err := n.Mounts(ips[0], options)
	if err != nil {
		return -1, err
	}
	var tree Tree
	for _, m := range mounts {
		if tree, err = nfs(m, n.ReadOnly); err == nil {
			return tree, nil
		}
		// Not this version, or (the last) not the MOUNT program at this port.
		if !errors.Is(err, unix.EPROTONOSUPPORT) && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.EPFNOSUPPORT) {
			break
		}
	}
	return -1, fmt.Errorf("mount nfs of %.80q: %w", n.Address, err) // not the path, which is a secret
}

func nfs(m spec.NFSMount, readOnly bool) (Tree, error) {
	fd, err := unix.Fsopen(m.Type, unix.FSOPEN_CLOEXEC)
	if errors.Is(err, unix.ENODEV) {
		return -1, fmt.Errorf("%w: %w", ErrNoNFS, err)
	}
	if err != nil {
		return -1, err
	}
	defer unix.Close(fd)
	said := func(err error) (Tree, error) {
		if text := messages(fd); text != "" {
			err = fmt.Errorf("%w: %s", err, text)
		}
		return -1, err
	}
	if err := unix.FsconfigSetString(fd, "source", m.Source); err != nil {
		return said(err)
	}
	for _, o := range m.Data {
		name, value, valued := strings.Cut(o, "=")
		if valued {
			err = unix.FsconfigSetString(fd, name, value)
		} else {
			err = unix.FsconfigSetFlag(fd, name)
		}
		if err != nil {
			return said(fmt.Errorf("option %s: %w", o, err))
		}
	}
	for err = unix.EINTR; errors.Is(err, unix.EINTR); {
		err = unix.FsconfigCreate(fd)
	}
	if err != nil {
		return said(err)
	}
	attributes := unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOSUID
	if readOnly {
		attributes |= unix.MOUNT_ATTR_RDONLY
	}
	tree, err := unix.Fsmount(fd, unix.FSMOUNT_CLOEXEC, attributes)
	if err != nil {
		return said(err)
	}
	return Tree(tree), nil
}

// messages are what the kernel has to say of a file system that could not be mounted (linux/fs/fsopen.c).
func messages(fd int) string {
	var all []string
	for buf := make([]byte, 1<<10); len(all) < 8; {
		n, err := unix.Read(fd, buf)
		if err != nil || n <= 0 {
			break
		}
		text := string(buf[:n])
		if _, after, ok := strings.Cut(text, " "); ok { // what sort it is of comes first
			text = after
		}
		all = append(all, strings.TrimSpace(text))
	}
	return strings.Join(all, "; ")
}

// IsNFS says whether a mount is one of NFS: what is done to it may wait for its server.
func IsNFS(m *mountinfo.Info) bool { return strings.HasPrefix(m.FSType, "nfs") }

// nfsIdentifier is a part of the name by which this host's kernel is known to servers of version 4 (linux/Documentation/filesystems/nfs/client-identifier.rst).
const (
	nfsIdentifier = "/sys/fs/nfs/net/nfs_client/identifier"
	nfsUniqueID   = "/sys/module/nfs/parameters/nfs4_unique_id"
)

// IdentifyNFS tells this host from others that have its name, unless the operator has: a server of version 4 would take them for one client, and end what one of them
// holds when the other one comes.
func IdentifyNFS(id string) error {
	for _, path := range []string{nfsIdentifier, nfsUniqueID} {
		text, err := os.ReadFile(path)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if s := strings.TrimSpace(string(text)); s != "" && s != "(null)" {
			return nil
		}
	}
	err := os.WriteFile(nfsIdentifier, []byte(id), 0)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.EROFS) { // an older kernel, or a container
		return nil
	}
	return err
}

// Others are the places where what is mounted at a path is seen besides. The path need not be a mount.
func Others(path string) (all []*mountinfo.Info, err error) {
	mounts, err := mountinfo.GetMounts(nil)
	if err != nil {
		return nil, err
	}
	var own *mountinfo.Info
	for _, one := range mounts {
		if one.Mountpoint == path {
			own = one
		}
	}
	if own == nil {
		return nil, nil
	}
	return slices.DeleteFunc(mounts, func(one *mountinfo.Info) bool {
		return one.Major != own.Major || one.Minor != own.Minor || one.Mountpoint == path
	}), nil
}
