package main

import (
	"context"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/cradlestack/cradlestack/csi-plugin/filer/gateway"
	"github.com/cradlestack/cradlestack/csi-plugin/zfs"
	"github.com/cradlestack/cradlestack/internal/command"
)

// metrics are what a Prometheus collects; docs/nfs.md lists them.
type metrics struct {
	requests *prometheus.CounterVec
	bytes    *prometheus.CounterVec
	syncs    *prometheus.HistogramVec
	began    prometheus.Counter

	mu      sync.Mutex
	term    *term                // that serves; nil of a filer that stands by
	consul  func() bool          // whether it answers; nil of a filer that is alone
	zpools  []string             // that its volumes are in
	syncing func() time.Duration // for how long a sync has been waiting; nil where none is made for that
}

// Those that are asked whenever they are collected.
var (
	activeDesc       = prometheus.NewDesc("cradle_filer_active", "Whether this filer answers clients: 0 of one that stands by, or whose lease has lapsed.", nil, nil)
	consulDesc       = prometheus.NewDesc("cradle_filer_consul", "Whether Consul answers this filer of a set.", nil, nil)
	suspendedDesc    = prometheus.NewDesc("cradle_filer_zpool_suspended", "Whether a zpool is suspended on this host, as its disks failed or did not answer.", []string{"zpool"}, nil)
	syncingDesc      = prometheus.NewDesc("cradle_filer_sync_waits_seconds", "How long a sync that this filer makes itself, again and again, has been waiting.", nil, nil)
	servedDesc       = prometheus.NewDesc("cradle_filer_volumes", "Volumes that are published or granted.", nil, nil)
	publicationsDesc = prometheus.NewDesc("cradle_filer_publications", "Publications.", nil, nil)
	grantsDesc       = prometheus.NewDesc("cradle_filer_grants", "Grants.", nil, nil)
	ageDesc          = prometheus.NewDesc("cradle_filer_snapshot_age_seconds", "How long ago the newest snapshot of a volume that is published or granted was taken.", []string{"volume"}, nil)
)

func newMetrics() *metrics {
	return &metrics{
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "cradle_filer_requests_total", Help: "Requests of clients that were answered, by protocol, method and outcome."}, []string{"protocol", "method", "code"}),
		bytes:    prometheus.NewCounterVec(prometheus.CounterOpts{Name: "cradle_filer_bytes_total", Help: "What came from clients (in) and went to them (out)."}, []string{"protocol", "direction"}),
		syncs: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "cradle_filer_sync_seconds", Help: "How long it took to bring something to stable storage.", Buckets: prometheus.ExponentialBuckets(0.0001, 4, 9),
		}, []string{"protocol"}),
		began: prometheus.NewCounter(prometheus.CounterOpts{Name: "cradle_filer_terms_total", Help: "How often this process has begun to serve."}),
	}
}

// done is told of NFS calls.
func (m *metrics) done(procedure, status string, in, out int) {
	m.count("nfs", procedure, status, int64(in), int64(out))
}

func (m *metrics) count(protocol, method, code string, in, out int64) {
	m.requests.WithLabelValues(protocol, method, code).Inc()
	m.bytes.WithLabelValues(protocol, "in").Add(float64(in))
	m.bytes.WithLabelValues(protocol, "out").Add(float64(out))
}

// methods are those of HTTP that are counted by their names, as clients can make up more.
var methods = []string{"GET", "HEAD", "PUT", "POST", "DELETE", "OPTIONS", "PROPFIND", "PROPPATCH", "MKCOL", "COPY", "MOVE", "LOCK", "UNLOCK"}

// meter is told of requests over HTTP.
func (m *metrics) meter(protocol string) gateway.Meter {
	return func(method string, code int, in, out int64) {
		if !slices.Contains(methods, method) {
			method = "other"
		}
		text := "broken off"
		if code != 0 {
			text = strconv.Itoa(code)
		}
		m.count(protocol, method, text, in, out)
	}
}

// synced is told how long it took to bring something to stable storage.
func (m *metrics) synced(protocol string) func(time.Duration) {
	seconds := m.syncs.WithLabelValues(protocol)
	return func(took time.Duration) { seconds.Observe(took.Seconds()) }
}

// serves says what serves from now on: nil for nothing.
func (m *metrics) serves(t *term) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.term = t; t != nil {
		m.began.Inc()
	}
}

// collectTime bounds what the volumes are given to answer in.
const collectTime = 10 * time.Second

// Describe is prometheus.Collector's.
func (m *metrics) Describe(all chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{activeDesc, consulDesc, suspendedDesc, syncingDesc, servedDesc, publicationsDesc, grantsDesc, ageDesc} {
		all <- d
	}
}

// Collect is prometheus.Collector's. What can't be had is left out.
func (m *metrics) Collect(all chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, value float64, labels ...string) {
		all <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, value, labels...)
	}
	truth := func(d *prometheus.Desc, is bool, labels ...string) {
		if is {
			gauge(d, 1, labels...)
		} else {
			gauge(d, 0, labels...)
		}
	}
	m.mu.Lock()
	t, consul := m.term, m.consul
	m.mu.Unlock()
	if consul != nil {
		truth(consulDesc, consul())
	}
	truth(activeDesc, t != nil && t.lease.Holds())
	stands := false
	for _, zpool := range m.zpools {
		is := zfs.Suspended(zpool) != nil
		truth(suspendedDesc, is, zpool)
		stands = stands || is
	}
	if m.syncing != nil {
		waits := m.syncing()
		gauge(syncingDesc, waits.Seconds())
		stands = stands || waits > syncsLong
	}
	if t == nil || stands {
		return
	}
	ctx, cancel := context.WithTimeout(t.long, collectTime)
	defer cancel()
	end, err := t.lease.Begin(ctx) // the volumes are this filer's meanwhile
	if err != nil {
		return
	}
	defer end()
	s, volumes, err := t.census()
	if err != nil {
		return
	}
	gauge(servedDesc, float64(s.Volumes))
	gauge(publicationsDesc, float64(s.Publications))
	gauge(grantsDesc, float64(s.Grants))
	for id := range volumes {
		if ctx.Err() != nil {
			return
		}
		if snapshots, err := t.snapshots(ctx, id); err == nil && len(snapshots) > 0 {
			gauge(ageDesc, time.Since(snapshots[len(snapshots)-1].Created).Seconds(), id)
		}
	}
}

// listen opens the address that they are collected at; nil for none.
func (m *metrics) listen(address string, log *slog.Logger) (net.Listener, error) {
	if address == "" {
		return nil, nil
	}
	l, err := command.ListenMetrics(address)
	if err != nil {
		return nil, err
	}
	log.Info("serving metrics", "url", "http://"+l.Addr().String()+"/metrics")
	return l, nil
}

func (m *metrics) handler() http.Handler {
	registry := prometheus.NewRegistry()
	registry.MustRegister(m, m.requests, m.bytes, m.syncs, m.began)
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{}))
	return mux
}
