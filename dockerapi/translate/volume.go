package translate

import (
	"cmp"
	"maps"
	"net/http"
	"slices"
	"strings"

	"github.com/docker/go-units"
	"github.com/moby/moby/api/types/volume"

	"github.com/cradlestack/cradlestack/internal/dockerhttp"
)

// A Volume is what a request for one comes to.
type Volume struct {
	Class      string // lv2, nfs, gfs
	Size       int64  // bytes; 0: as the plugin has it
	Zone       string
	Parameters map[string]string // for the CSI plugin, the class among them
}

// Classes are what docker calls drivers.
var Classes = []string{"lv2", "nfs", "gfs"}

// parameters are options that are the CSI plugin's (docs/csi.md). Beside them there are size and zone.
var parameters = []string{"attach", "bandwidth", "compression", "fs", "iops", "pool", "snapshots", "volblocksize"}

// CreateVolume checks a request to create a volume. otherwise is the class of one that names no driver; docker's own name for that is local.
func CreateVolume(r *volume.CreateRequest, otherwise string) (*Volume, error) {
	if !VolumeRule.MatchString(r.Name) {
		return nil, dockerhttp.Invalid("create %s: %q includes invalid characters for a local volume name, only \"[a-zA-Z0-9][a-zA-Z0-9_.-]\" are allowed. If you intended to pass a host directory, use absolute path", r.Name, r.Name)
	}
	if r.ClusterVolumeSpec != nil {
		return nil, refused("a cluster volume", "this is no swarm: use a driver, "+strings.Join(Classes, ", "))
	}
	class := cmp.Or(r.Driver, "local")
	if class == "local" {
		class = otherwise
	}
	if !slices.Contains(Classes, class) {
		return nil, dockerhttp.Errorf(http.StatusNotFound, "error looking up volume plugin %s: plugin %q not found: there are %s", class, class, strings.Join(Classes, ", "))
	}
	v := &Volume{Class: class, Parameters: map[string]string{"class": class}}
	for _, name := range slices.Sorted(maps.Keys(r.DriverOpts)) {
		value := r.DriverOpts[name]
		switch {
		case name == "size":
			n, err := units.RAMInBytes(value)
			if err != nil || n <= 0 {
				return nil, dockerhttp.Invalid("create %s: -o size=%s: a size such as 10G", r.Name, value)
			}
			v.Size = n
		case name == "zone":
			if !zoneRule.MatchString(value) {
				return nil, dockerhttp.Invalid("create %s: -o zone=%s: a zone is letters, digits, _ . and -, at most 63", r.Name, value)
			}
			v.Zone = value
		case slices.Contains(parameters, name):
			v.Parameters[name] = value
		default:
			instead := ""
			if name == "device" || name == "o" || name == "type" { // of dockerd's driver local, which are mount's
				instead = "; a directory of the node is mounted by its path, and memory with --tmpfs"
			}
			return nil, dockerhttp.Invalid("create %s: there is no option %q: there are size, zone, %s%s", r.Name, name, strings.Join(parameters, ", "), instead)
		}
	}
	if class == "lv2" && v.Parameters["attach"] == "" {
		v.Parameters["attach"] = "direct" // the guest has it as a disk of its own, which is fastest
	}
	return v, nil
}
