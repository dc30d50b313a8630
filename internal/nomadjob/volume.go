package nomadjob

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"net/http"
	"strings"

	"github.com/hashicorp/nomad/api"
)

// ZoneSegment is the volumes' plugin's name for zones in its topology.
const ZoneSegment = "csi.cradlestack.org/zone"

// maxVolumeName is the length of the longest name that the plugin takes.
const maxVolumeName = 128

// A Volume is what is asked of the volumes' plugin. Whoever makes one says it so, that all know it by the same name.
type Volume struct {
	Name, Namespace string // Nomad's
	Plugin          string // its id
	Parameters      map[string]string
	Size            int64  // bytes; 0: as the plugin has it
	Zone            string // "" is anywhere
	AccessMode      string // "" is its class's
	AttachmentMode  string // "" is a file system
	SnapshotID      string // it begins with the content of this snapshot
	CloneID         string // or of this volume, by its external id
}

// CSI is how Nomad takes it.
func (v *Volume) CSI() *api.CSIVolume {
	mode, attachment := v.AccessMode, v.AttachmentMode
	if mode == "" {
		mode = AccessMode(v.Parameters["class"])
	}
	if attachment == "" {
		attachment = fileSystem
	}
	made := &api.CSIVolume{
		ID: v.Name, Name: VolumeName(v.Namespace, v.Name), Namespace: v.Namespace, PluginID: v.Plugin, Parameters: v.Parameters,
		RequestedCapacityMin: v.Size, SnapshotID: v.SnapshotID, CloneID: v.CloneID,
		MountOptions:          &api.CSIMountOptions{}, // without which Nomad 1.11 lets none grow in use
		RequestedCapabilities: []*api.CSIVolumeCapability{{AccessMode: api.CSIVolumeAccessMode(mode), AttachmentMode: api.CSIVolumeAttachmentMode(attachment)}},
	}
	if v.Zone != "" {
		made.RequestedTopologies = &api.CSITopologyRequest{Required: []*api.CSITopology{{Segments: map[string]string{ZoneSegment: v.Zone}}}}
	}
	return made
}

// VolumeName is a volume's in its plugin, which does not know of namespaces: their names have no dots.
func VolumeName(namespace, name string) string {
	full := namespace + "." + name
	if len(full) > maxVolumeName {
		sum := sha256.Sum256([]byte(full))
		full = full[:maxVolumeName-1-2*len(sum)] + "." + hex.EncodeToString(sum[:])
	}
	return full
}

// IsVolumeGone says whether Nomad has not deleted a volume because it has none of that id: who else deletes it was quicker. Nomad 1.11 has no status of its own for
// that (nomad/csi_endpoint.go, CSIVolume.Delete; nomad/state/state_store.go, CSIVolumeDeregister).
func IsVolumeGone(err error, id string) bool {
	var answer api.UnexpectedResponseError
	if !errors.As(err, &answer) {
		return false
	}
	return answer.StatusCode() == http.StatusNotFound || strings.HasSuffix(strings.TrimSpace(answer.Body()), "volume not found: "+id)
}
