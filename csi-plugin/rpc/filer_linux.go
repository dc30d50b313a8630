package rpc

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"github.com/cradlestack/cradlestack/csi-plugin/filer/api"
	"github.com/cradlestack/cradlestack/csi-plugin/volume"
	"github.com/cradlestack/cradlestack/spec"
)

// publication is what the filer knows a target by.
func publication(target string) string { return strings.TrimSuffix(spec.DirectFile(target), ".json") }

// attacher is the backend where it has volumes that guests mount from the storage itself, nil where a filer serves them.
func (s *Server) attacher() volume.Attacher {
	a, _ := s.config.Backend.(volume.Attacher)
	return a
}

// served says whether guests have a volume from the filer.
func (s *Server) served(p volume.Parameters) bool { return p.Served() && s.attacher() == nil }

// filer is the one that this plugin has.
func (s *Server) filer() (*api.Client, error) {
	if s.config.Filer == nil {
		return nil, fmt.Errorf("%w: guests have the volume from a filer, and this plugin knows none; start it with --filer", volume.ErrUnavailable)
	}
	return s.config.Filer, nil
}

// attach makes what the guest at target mounts.
func (s *Server) attach(ctx context.Context, a volume.Attacher, v volume.Volume, target string, w wish) (spec.Volume, error) {
	d, err := a.Attach(ctx, v.ID, target, w.readOnly)
	if err != nil {
		return d, err
	}
	c := *d.Ceph
	var flags []string
	for _, flag := range w.flags {
		if flag != "discard" { // which is for disks
			flags = append(flags, flag)
		}
	}
	c.Options = strings.Join(flags, ",")
	// The secret is apart from the record, which who runs the pod copies.
	c.SecretFile = filepath.Join(s.config.DirectDir, spec.DirectSecret(target))
	if err := s.replace(spec.DirectSecret(target), []byte(c.Secret)); err != nil {
		return d, err
	}
	c.Secret = ""
	d.Ceph = &c
	return d, nil
}

// serve has the filer let the guest at target see a volume, which mounts what is returned.
func (s *Server) serve(ctx context.Context, v volume.Volume, target string, w wish) (spec.Volume, error) {
	if a := s.attacher(); a != nil {
		return s.attach(ctx, a, v, target, w)
	}
	f, err := s.filer()
	if err != nil {
		return spec.Volume{}, err
	}
	clients, err := guestAddresses()
	if err != nil {
		return spec.Volume{}, err
	}
	p, err := f.Publish(ctx, api.Publication{ID: publication(target), Volume: v.ID, ReadOnly: w.readOnly, Clients: append(clients, s.config.Networks...)})
	if err != nil {
		return spec.Volume{}, err
	}
	n := p.NFS()
	for _, flag := range w.flags {
		if flag != "discard" { // which is for disks
			n.Options += "," + flag
		}
	}
	return spec.Volume{Name: v.ID, Class: v.Class, NFS: n}, nil
}

// local is Get, but that nobody is asked for a volume that this host has staged itself and guests do not mount: no more is known of that then.
func (s *Server) local(ctx context.Context, id string) (volume.Volume, error) {
	if b, ok := s.config.Backend.(volume.Stager); ok {
		if staged, err := b.Staged(id); err != nil || staged {
			return volume.Volume{ID: id}, err
		}
	}
	return s.config.Backend.Get(ctx, id)
}

// unserve is the reverse, of a volume that guests mount.
func (s *Server) unserve(ctx context.Context, id, target string) error {
	if a := s.attacher(); a != nil {
		return a.Detach(ctx, id, target)
	}
	v, err := s.local(ctx, id)
	if errors.Is(err, volume.ErrNotFound) || err == nil && !v.Served() {
		return nil
	}
	if err != nil {
		return err
	}
	f, err := s.filer()
	if err != nil {
		return err
	}
	return f.Unpublish(ctx, publication(target))
}

func (s *Server) filerStats(ctx context.Context, id string) (spec.VolumeStats, error) {
	f, err := s.filer()
	if err != nil {
		return spec.VolumeStats{}, err
	}
	return f.Stats(ctx, id)
}

func (s *Server) filerGrow(ctx context.Context, id string) error {
	f, err := s.filer()
	if err != nil {
		return err
	}
	return f.Grow(ctx, id)
}

// guestAddresses are those that calls of this host's guests come from: the host's own, where QEMU makes connections for them, and the
// networks of its bridges.
func guestAddresses() ([]netip.Prefix, error) {
	all, err := net.Interfaces()
	if err != nil {
		return nil, err
	}
	var out []netip.Prefix
	for _, i := range all {
		addrs, err := i.Addrs()
		if err != nil {
			return nil, err
		}
		_, err = os.Stat(filepath.Join("/sys/class/net", i.Name, "bridge"))
		bridge := err == nil
		for _, a := range addrs {
			n, isNet := a.(*net.IPNet)
			if !isNet || !n.IP.IsGlobalUnicast() {
				continue
			}
			ip, _ := netip.AddrFromSlice(n.IP)
			ip = ip.Unmap()
			bits := ip.BitLen()
			if bridge {
				bits, _ = n.Mask.Size()
			}
			out = append(out, netip.PrefixFrom(ip, bits).Masked())
		}
	}
	return out, nil
}
