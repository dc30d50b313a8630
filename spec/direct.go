package spec

import (
	"crypto/sha256"
	"encoding/hex"
	"path"
	"path/filepath"
	"strings"
)

// DirectDir is where a node's CSI plugin leaves the records of directly attached volumes, and where their control sockets
// are. It belongs to root, mode 0700, and is empty after a reboot, as the mounts that the records tell of are gone then.
const DirectDir = "/run/cradle/direct"

// DirectVersion is the version of the DirectAttachment format that this package reads and writes.
const DirectVersion = 1

// A DirectAttachment is the record of one volume that the guest of a pod attaches itself: the host mounts nothing but an empty
// read-only tmpfs on the target, so that a task that does not know of records fails instead of writing into nothing.
//
// The CSI plugin writes the record before NodePublishVolume answers and removes it after NodeUnpublishVolume has unmounted the
// target. Who runs a pod looks for it at DirectFile of each mount's host path, attaches Volume in place of the directory, and
// serves the DirectControl API on Control for as long as the guest holds the volume. The socket's file is there as long, also while whoever serves it
// starts again: a call is refused then (ECONNREFUSED), and where there is no file there is no guest.
type DirectAttachment struct {
	Version int      `json:"version"`         // of the format: 1
	Target  string   `json:"target"`          // the path that the volume was published at: a mount's host path
	Volume  Volume   `json:"volume"`          // block, nfs or ceph; its name is the CSI volume id
	Raw     bool     `json:"raw,omitempty"`   // a block device for the task, no mount
	Limits  IOLimits `json:"limits,omitzero"` // of a block volume, from its start on
	Control string   `json:"control"`         // path of the unix socket that the pod's holder makes, beside the record
}

// IOLimits bound what a guest does to a block volume, reads and writes together. Zero is no limit.
type IOLimits struct {
	IOPS      int64 `json:"iops,omitempty"`      // operations in a second
	Bandwidth Bytes `json:"bandwidth,omitempty"` // in a second
}

// The DirectControl API is HTTP/1.1 with JSON bodies on a record's control socket. A call that succeeds without a result
// answers 204; one that fails answers 4xx or 5xx with a DirectError. A volume that is attached raw has no file system that
// the guest mounts: freeze, thaw and stats answer 404 for it.
const (
	DirectFreezePath   = "/freeze"   // POST DirectFreeze: the file system is written out and holds still. Again: the time starts anew
	DirectThawPath     = "/thaw"     // POST, no body. 409 where it was not frozen any more: what was copied meanwhile is not consistent
	DirectResizePath   = "/resize"   // POST DirectResize: the guest sees the new size and grows the file system. Again: no change
	DirectThrottlePath = "/throttle" // POST IOLimits: they hold from now on
	DirectStatsPath    = "/stats"    // GET VolumeStats
)

// DirectFreeze asks for a file system that holds still.
type DirectFreeze struct {
	Timeout Duration `json:"timeout"` // after which the guest thaws by itself, should nobody call
}

// DirectResize tells that the image or device behind a block volume has grown.
type DirectResize struct {
	Size Bytes `json:"size"`
}

// VolumeStats is what statfs(2) says of a volume's file system.
type VolumeStats struct {
	Total           Bytes  `json:"total"`
	Used            Bytes  `json:"used"`
	Available       Bytes  `json:"available"` // to unprivileged users
	Inodes          uint64 `json:"inodes"`
	InodesUsed      uint64 `json:"inodesUsed"`
	InodesAvailable uint64 `json:"inodesAvailable"`
}

// DirectError is the body of an answer that is an error.
type DirectError struct {
	Message string `json:"message"`
}

// DirectFile is the name, in DirectDir, of the record of the volume that is published at the target path.
func DirectFile(target string) string { return directKey(target) + ".json" }

// DirectSocket is the name, in DirectDir, of that record's control socket.
func DirectSocket(target string) string { return directKey(target) + ".sock" }

// DirectSecret is the name, in DirectDir, of the file that holds the secret of a record's volume, should it have one.
func DirectSecret(target string) string { return directKey(target) + ".secret" }

// directKey is short enough for a unix socket's path, and no two targets share it.
func directKey(target string) string {
	sum := sha256.Sum256([]byte(path.Clean(target)))
	return hex.EncodeToString(sum[:16])
}

// ParseDirectAttachment reads and validates a record, as ParseLaunch does a Launch.
func ParseDirectAttachment(file string, data []byte) (*DirectAttachment, error) {
	var d DirectAttachment
	if err := parse(file, data, &d, d.validate); err != nil {
		return nil, err
	}
	return &d, nil
}

// Validate says what of a record no guest could attach: *Error values without a place, joined.
func (d *DirectAttachment) Validate() error {
	var v validator
	d.validate(&v)
	return v.err(func(*Error) {})
}

func (d *DirectAttachment) validate(v *validator) {
	if d.Version != DirectVersion {
		v.reject("version", "is %d; this program reads version %d", d.Version, DirectVersion)
	}
	v.path("target", d.Target)
	v.path("control", d.Control)
	v.volumes([]Volume{d.Volume}, false)
	for _, e := range v.problems {
		e.Field = strings.Replace(e.Field, "volumes[0]", "volume", 1)
	}
	switch b := d.Volume.Block; {
	case b == nil && d.Volume.NFS == nil && d.Volume.Ceph == nil:
		v.reject("volume", "is neither block nor nfs nor ceph; a guest attaches nothing else itself")
	case b == nil && d.Raw:
		v.reject("raw", "is for block volumes; leave it out")
	case b == nil && d.Limits != (IOLimits{}):
		v.reject("limits", "are for block volumes; leave them out")
	case b != nil && !filepath.IsAbs(b.Path):
		v.reject("volume.block.path", "%q is relative; a record belongs to no pod directory", b.Path)
	}
	if d.Limits.IOPS < 0 || d.Limits.Bandwidth < 0 {
		v.reject("limits", "are below 0; leave them out for none")
	}
}
