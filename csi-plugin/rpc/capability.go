package rpc

import (
	"slices"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/cradlestack/cradlestack/csi-plugin/mount"
	"github.com/cradlestack/cradlestack/csi-plugin/volume"
)

// A wish is a volume capability that was checked.
type wish struct {
	block    bool
	readOnly bool // the access mode allows no writing
	fsType   string
	flags    []string
	options  mount.Options // what flags say
}

type mode = csi.VolumeCapability_AccessMode_Mode

// Access modes of a class. A block volume has one host; there is no host besides that could read it.
var (
	blockModes = []mode{csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER, csi.VolumeCapability_AccessMode_SINGLE_NODE_READER_ONLY}
	fileModes  = append([]mode{
		csi.VolumeCapability_AccessMode_MULTI_NODE_READER_ONLY, csi.VolumeCapability_AccessMode_MULTI_NODE_SINGLE_WRITER,
		csi.VolumeCapability_AccessMode_MULTI_NODE_MULTI_WRITER,
	}, blockModes...)
)

// read checks a capability by itself, whatever volume it is for.
func read(c *csi.VolumeCapability) (w wish, err error) {
	if c == nil {
		return w, invalid("volume capability: there is none; say access mode and access type")
	}
	m := c.GetAccessMode().GetMode()
	if m == csi.VolumeCapability_AccessMode_UNKNOWN {
		return w, invalid("volume capability: it has no access mode; say one")
	}
	w.readOnly = m == csi.VolumeCapability_AccessMode_SINGLE_NODE_READER_ONLY || m == csi.VolumeCapability_AccessMode_MULTI_NODE_READER_ONLY
	switch {
	case c.GetBlock() != nil:
		w.block = true
	case c.GetMount() != nil:
		w.fsType = c.GetMount().GetFsType()
		w.flags = c.GetMount().GetMountFlags()
		var unknown string
		if w.options, unknown = mount.ParseOptions(w.flags); unknown != "" {
			return w, invalid("volume capability: mount flag %.40q is not allowed", unknown)
		}
		w.readOnly = w.readOnly || w.options.IsReadOnly()
	default:
		return w, invalid("volume capability: it has no access type; say block or mount")
	}
	return w, nil
}

// suits says why a volume with these parameters can't be used so, "" where it can.
func suits(c *csi.VolumeCapability, p volume.Parameters) (reason string) {
	modes := fileModes
	if p.Block() {
		modes = blockModes
	}
	switch m := c.GetAccessMode().GetMode(); {
	case !slices.Contains(modes, m):
		return "class " + p.Class + " has no access mode " + m.String()
	case c.GetBlock() != nil && !p.Block():
		return "class " + p.Class + " is of file volumes, which can't be attached as a block device"
	}
	if fs := c.GetMount().GetFsType(); fs != "" && p.FS != "" && fs != p.FS {
		return "its file system is " + p.FS + ", not " + fs + "; set the parameter fs when it is made"
	}
	return ""
}

// wishFor checks a capability for one volume, in a call that uses it.
func wishFor(c *csi.VolumeCapability, v volume.Volume) (wish, error) {
	w, err := read(c)
	if err != nil {
		return w, err
	}
	if reason := suits(c, v.Parameters); reason != "" {
		return w, invalid("volume %s: %s", v.ID, reason)
	}
	return w, nil
}
