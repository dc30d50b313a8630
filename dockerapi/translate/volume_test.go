package translate

import (
	"maps"
	"strings"
	"testing"

	"github.com/moby/moby/api/types/volume"
)

func TestCreateVolume(t *testing.T) {
	for _, test := range []struct {
		driver  string
		options map[string]string
		want    Volume
	}{
		{"", nil, Volume{Class: "nfs", Parameters: map[string]string{"class": "nfs"}}},
		{"local", map[string]string{"size": "10G", "zone": "a"}, Volume{Class: "nfs", Size: 10 << 30, Zone: "a", Parameters: map[string]string{"class": "nfs"}}},
		{"lv2", map[string]string{"iops": "2000", "fs": "xfs"}, Volume{Class: "lv2", Parameters: map[string]string{"class": "lv2", "attach": "direct", "iops": "2000", "fs": "xfs"}}},
		{"lv2", map[string]string{"attach": "host"}, Volume{Class: "lv2", Parameters: map[string]string{"class": "lv2", "attach": "host"}}},
	} {
		got, err := CreateVolume(&volume.CreateRequest{Name: "data", Driver: test.driver, DriverOpts: test.options}, "nfs")
		if err != nil {
			t.Errorf("%s %v: %v", test.driver, test.options, err)
			continue
		}
		if got.Class != test.want.Class || got.Size != test.want.Size || got.Zone != test.want.Zone || !maps.Equal(got.Parameters, test.want.Parameters) {
			t.Errorf("%s %v is %+v, want %+v", test.driver, test.options, got, test.want)
		}
	}
	for _, test := range []struct {
		request volume.CreateRequest
		want    string
	}{
		{volume.CreateRequest{Name: "../x"}, "includes invalid characters"},
		{volume.CreateRequest{Name: "x"}, "includes invalid characters"}, // docker wants two as well
		{volume.CreateRequest{Name: "data", Driver: "rexray"}, `plugin "rexray" not found: there are lv2, nfs, gfs`},
		{volume.CreateRequest{Name: "data", DriverOpts: map[string]string{"size": "much"}}, "a size such as 10G"},
		{volume.CreateRequest{Name: "data", DriverOpts: map[string]string{"size": "-1"}}, "a size such as 10G"},
		{volume.CreateRequest{Name: "data", DriverOpts: map[string]string{"zone": "a b"}}, "a zone is letters"},
		{volume.CreateRequest{Name: "data", DriverOpts: map[string]string{"type": "tmpfs"}}, `there is no option "type": there are size, zone, attach`},
		{volume.CreateRequest{Name: "data", DriverOpts: map[string]string{"type": "none", "o": "bind", "device": "/srv"}}, `volblocksize; a directory of the node is mounted by its path`},
		{volume.CreateRequest{Name: "data", ClusterVolumeSpec: &volume.ClusterVolumeSpec{}}, "no swarm"},
	} {
		if _, err := CreateVolume(&test.request, "lv2"); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%+v: %v, want %s", test.request, err, test.want)
		}
	}
}
