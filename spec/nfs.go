package spec

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// An NFSMount is one attempt at mounting an NFSVolume: what mount(2) gets.
type NFSMount struct {
	Type, Source string
	Data         []string
}

// Server is the host of the volume's address, and its port, "" where it names none.
func (n *NFSVolume) Server() (host, port string) {
	host, port, err := net.SplitHostPort(n.Address)
	if err != nil {
		return strings.Trim(n.Address, "[]"), ""
	}
	return host, port
}

// Mounts are the attempts for the volume at an address that its server has, newest version first; options are those that the file system gets to read, and none that this
// itself says (linux/fs/nfs/fs_context.c; nfs(5)).
func (n *NFSVolume) Mounts(ip netip.Addr, options []string) ([]NFSMount, error) {
	for _, o := range []string{"addr", "clientaddr", "mountaddr"} {
		if _, set := MountOption(options, o); set {
			return nil, fmt.Errorf("nfs option %s is set by who mounts", o)
		}
	}
	ip = ip.Unmap()
	host, port := n.Server()
	if _, set := MountOption(options, "port"); !set && port != "" {
		if p, err := strconv.ParseUint(port, 10, 16); err != nil || p == 0 {
			return nil, fmt.Errorf("nfs server %.80q: %.20q is no port", n.Address, port)
		}
		options = append(slices.Clip(options), "port="+port)
	}
	versions := []string{"4.2", "4.1", "4.0", "3"}
	if v, set := MountOption(options, "vers", "nfsvers"); set {
		versions = []string{v}
		if v == "4" {
			versions = []string{"4.2", "4.1", "4.0"}
		}
	}
	options = WithoutMountOptions(options, "vers", "nfsvers", "minorversion")
	source := host
	if strings.Contains(host, ":") {
		source = "[" + host + "]"
	}
	source += ":" + n.Export
	// The kernel compares the family that a protocol has with the address's.
	tcp, nowhere := "tcp", "0.0.0.0"
	if ip.Is6() {
		tcp, nowhere = "tcp6", "::"
	}
	var out []NFSMount
	for _, v := range versions {
		data := append(slices.Clip(options), "vers="+v, "addr="+ip.String())
		if strings.HasPrefix(v, "4") {
			data = append(WithoutMountOptions(data, "lock", "nolock", "mountport", "mountproto", "mountvers"), "clientaddr="+nowhere) // version 4.0 can't call back
			out = append(out, NFSMount{"nfs4", source, data})
			continue
		}
		_, lock := MountOption(data, "lock")
		if _, nolock := MountOption(data, "nolock"); !lock && !nolock {
			data = append(data, "nolock") // without a statd: locks stay on this client
		}
		for _, o := range []string{"proto", "mountproto"} {
			if _, set := MountOption(data, o); !set {
				data = append(data, o+"="+tcp)
			}
		}
		// A server on a port of its own may answer MOUNT there too, and have no portmapper.
		_, mountport := MountOption(data, "mountport")
		if p, set := MountOption(data, "port"); set && !mountport {
			out = append(out, NFSMount{"nfs", source, append(slices.Clip(data), "mountport="+p)})
		}
		out = append(out, NFSMount{"nfs", source, data})
	}
	return out, nil
}

// MountOption gives the value of the last of a mount's options that has one of these names.
func MountOption(options []string, names ...string) (value string, ok bool) {
	for _, o := range options {
		if name, v, _ := strings.Cut(o, "="); slices.Contains(names, name) {
			value, ok = v, true
		}
	}
	return value, ok
}

// WithoutMountOptions leaves those of these names out.
func WithoutMountOptions(options []string, names ...string) (kept []string) {
	for _, o := range options {
		if name, _, _ := strings.Cut(o, "="); !slices.Contains(names, name) {
			kept = append(kept, o)
		}
	}
	return kept
}
