package rpc

import (
	"context"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/codes"

	"github.com/cradlestack/cradlestack/csi-plugin/volume"
)

// metrics are what a Prometheus collects; docs/csi.md lists them.
type metrics struct {
	backend volume.Backend
	calls   *prometheus.CounterVec
	seconds *prometheus.HistogramVec
	snaps   *prometheus.CounterVec
}

// Those that are asked of the backend whenever they are collected.
var (
	readyDesc   = prometheus.NewDesc("cradle_csi_ready", "Whether volumes can be kept at the moment.", nil, nil)
	freeDesc    = prometheus.NewDesc("cradle_csi_free_bytes", "What a new volume in a pool can have.", []string{"pool"}, nil)
	volumesDesc = prometheus.NewDesc("cradle_csi_volumes", "Volumes by class.", []string{"class"}, nil)
	bytesDesc   = prometheus.NewDesc("cradle_csi_volume_bytes", "Sizes of the volumes together, by class.", []string{"class"}, nil)
)

func newMetrics(c Config) *metrics {
	m := &metrics{
		backend: c.Backend,
		calls:   prometheus.NewCounterVec(prometheus.CounterOpts{Name: "cradle_csi_calls_total", Help: "CSI calls by method and gRPC code."}, []string{"method", "code"}),
		seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "cradle_csi_call_seconds", Help: "How long CSI calls took, by method.", Buckets: prometheus.ExponentialBuckets(0.001, 4, 9),
		}, []string{"method"}),
		snaps: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "cradle_csi_automatic_snapshots_total", Help: "Automatic snapshots that were tried, by result."}, []string{"result"}),
	}
	if c.Metrics != nil {
		c.Metrics.MustRegister(m, m.calls, m.seconds, m.snaps)
	}
	return m
}

func (m *metrics) count(method string, code codes.Code, took time.Duration) {
	m.calls.WithLabelValues(method, code.String()).Inc()
	m.seconds.WithLabelValues(method).Observe(took.Seconds())
}

// taken counts an automatic snapshot.
func (m *metrics) taken(err error) {
	result := "taken"
	if err != nil {
		result = "failed"
	}
	m.snaps.WithLabelValues(result).Inc()
}

// collectTime bounds what the backend is given to answer in.
const collectTime = 10 * time.Second

// Describe is prometheus.Collector's.
func (m *metrics) Describe(all chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{readyDesc, freeDesc, volumesDesc, bytesDesc} {
		all <- d
	}
}

// Collect is prometheus.Collector's. What can't be had is left out, and cradle_csi_ready says so.
func (m *metrics) Collect(all chan<- prometheus.Metric) {
	ctx, cancel := context.WithTimeout(context.Background(), collectTime)
	defer cancel()
	gauge := func(d *prometheus.Desc, value float64, labels ...string) {
		all <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, value, labels...)
	}
	ready := 0.0
	if m.backend.Ready(ctx) == nil {
		ready = 1
	}
	gauge(readyDesc, ready)
	for _, pool := range m.backend.Pools() {
		if free, err := m.backend.Capacity(ctx, volume.Parameters{Class: volume.NFS, Pool: pool}); err == nil {
			gauge(freeDesc, float64(free), pool)
		}
	}
	volumes, err := m.backend.List(ctx)
	if err != nil {
		return
	}
	for _, class := range []string{volume.NFS, volume.LV2, volume.GFS} {
		n, size := 0, int64(0)
		for _, v := range volumes {
			if v.Class == class {
				n++
				size += v.Size
			}
		}
		gauge(volumesDesc, float64(n), class)
		gauge(bytesDesc, float64(size), class)
	}
}
