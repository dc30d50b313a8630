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

// An nfsMount is one attempt at mounting.
type nfsMount struct {
	fstype, source, data string
	flags                uintptr
}

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
	host, port, err := net.SplitHostPort(n.Address)
	if err != nil {
		host, port = strings.Trim(n.Address, "[]"), ""
	}
	ips, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	if err != nil {
		return fmt.Errorf("nfs server %s: %w", host, err)
	}
	mounts, err := nfsMounts(n, host, port, ips[0].Unmap().String())
	if err != nil {
		return err
	}
	for _, m := range mounts {
		if err = mount(m.source, at, m.fstype, m.flags, m.data); err == nil {
			return nil
		}
		// Not this version, or (the last) not the MOUNT program at this port.
		if !errors.Is(err, unix.EPROTONOSUPPORT) && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.EPFNOSUPPORT) {
			break
		}
	}
	return fmt.Errorf("nfs %s: %w", mounts[0].source, err)
}

// nfsMounts are the attempts for a volume, newest version first.
func nfsMounts(n *spec.NFSVolume, host, port, ip string) ([]nfsMount, error) {
	flags, data := parseMountOptions(0, n.Options)
	if n.ReadOnly {
		flags |= unix.MS_RDONLY
	}
	for _, o := range []string{"addr", "clientaddr", "mountaddr"} {
		if _, set := option(data, o); set {
			return nil, &stateError{ErrInvalid, fmt.Sprintf("nfs option %s is set by the guest itself", o)}
		}
	}
	if _, set := option(data, "port"); !set && port != "" {
		data = append(data, "port="+port)
	}
	versions := []string{"4.2", "4.1", "4.0", "3"}
	if v, set := option(data, "vers", "nfsvers"); set {
		versions = []string{v}
		if v == "4" {
			versions = []string{"4.2", "4.1", "4.0"}
		}
	}
	data = without(data, "vers", "nfsvers", "minorversion")
	source := host
	if strings.Contains(host, ":") {
		source = "[" + host + "]"
	}
	source += ":" + n.Export
	var out []nfsMount
	for _, v := range versions {
		m := nfsMount{source: source, flags: flags}
		opts := append(data[:len(data):len(data)], "vers="+v, "addr="+ip)
		if strings.HasPrefix(v, "4") {
			m.fstype = "nfs4"
			opts = append(without(opts, "lock", "nolock", "mountport", "mountproto", "mountvers"), "clientaddr="+anyAddress(ip))
		} else {
			m.fstype = "nfs"
			_, lock := option(opts, "lock")
			if _, nolock := option(opts, "nolock"); !lock && !nolock {
				opts = append(opts, "nolock") // no statd here: locks stay on this client
			}
			if _, set := option(opts, "proto"); !set {
				opts = append(opts, "proto=tcp")
			}
			if _, set := option(opts, "mountproto"); !set {
				opts = append(opts, "mountproto=tcp")
			}
			// A server on a port of its own may answer MOUNT there too, and have no portmapper.
			_, mountport := option(opts, "mountport")
			if p, set := option(opts, "port"); set && !mountport {
				m.data = strings.Join(append(opts[:len(opts):len(opts)], "mountport="+p), ",")
				out = append(out, m)
			}
		}
		m.data = strings.Join(opts, ",")
		out = append(out, m)
	}
	return out, nil
}

// anyAddress tells an NFSv4.0 server that it can't call back.
func anyAddress(ip string) string {
	if strings.Contains(ip, ":") {
		return "::"
	}
	return "0.0.0.0"
}
