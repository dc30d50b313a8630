package rpc

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"google.golang.org/grpc/codes"

	"github.com/cradlestack/cradlestack/csi-plugin/volume"
)

// fixed is a backend with two volumes.
type fixed struct {
	volume.Backend
	ready error
}

func (f fixed) Ready(context.Context) error { return f.ready }

func (fixed) Pools() []string { return []string{"default", "red", "gone"} }

func (fixed) Capacity(_ context.Context, p volume.Parameters) (int64, error) {
	if p.Pool == "gone" {
		return 0, volume.ErrUnavailable
	}
	return 100 * int64(len(p.Pool)), nil
}

func (fixed) List(context.Context) ([]volume.Volume, error) {
	return []volume.Volume{
		{ID: "a", Size: 10, Parameters: volume.Parameters{Class: volume.LV2}},
		{ID: "b", Size: 20, Parameters: volume.Parameters{Class: volume.LV2}},
	}, nil
}

func TestMetrics(t *testing.T) {
	r := prometheus.NewRegistry()
	m := newMetrics(Config{Backend: fixed{ready: errors.New("the disk is gone")}, Metrics: r})
	m.count("CreateVolume", codes.OK, time.Second)
	m.count("CreateVolume", codes.NotFound, time.Second)
	const want = `
# HELP cradle_csi_calls_total CSI calls by method and gRPC code.
# TYPE cradle_csi_calls_total counter
cradle_csi_calls_total{code="NotFound",method="CreateVolume"} 1
cradle_csi_calls_total{code="OK",method="CreateVolume"} 1
# HELP cradle_csi_free_bytes What a new volume in a pool can have.
# TYPE cradle_csi_free_bytes gauge
cradle_csi_free_bytes{pool="default"} 700
cradle_csi_free_bytes{pool="red"} 300
# HELP cradle_csi_ready Whether volumes can be kept at the moment.
# TYPE cradle_csi_ready gauge
cradle_csi_ready 0
# HELP cradle_csi_volume_bytes Sizes of the volumes together, by class.
# TYPE cradle_csi_volume_bytes gauge
cradle_csi_volume_bytes{class="gfs"} 0
cradle_csi_volume_bytes{class="lv2"} 30
cradle_csi_volume_bytes{class="nfs"} 0
# HELP cradle_csi_volumes Volumes by class.
# TYPE cradle_csi_volumes gauge
cradle_csi_volumes{class="gfs"} 0
cradle_csi_volumes{class="lv2"} 2
cradle_csi_volumes{class="nfs"} 0
`
	err := testutil.GatherAndCompare(r, strings.NewReader(want), "cradle_csi_calls_total", "cradle_csi_free_bytes", "cradle_csi_ready", "cradle_csi_volume_bytes", "cradle_csi_volumes")
	if err != nil {
		t.Error(err)
	}
}
