package api

import (
	"context"
	"net/http"
	"net/url"
	"strconv"

	"github.com/cradlestack/cradlestack/csi-plugin/volume"
)

// A Request is a volume that is to exist.
type Request struct {
	Size       int64             `json:"size,omitempty"`  // bytes at least; 0 leaves it to the backend
	Limit      int64             `json:"limit,omitempty"` // bytes at most; 0 is no limit
	Origin     volume.Origin     `json:"origin,omitzero"`
	Parameters map[string]string `json:"parameters"` // as volume.ParseParameters reads them
}

// A Size of a volume.
type Size struct {
	Bytes int64 `json:"bytes"`
	Limit int64 `json:"limit,omitempty"` // of one that is to grow: at most; 0 is no limit
}

// A Backend is what keeps a filer's volumes.
type Backend struct {
	Name  string   `json:"name"`  // dir, zfs
	Pools []string `json:"pools"` // what the parameter pool can name, the default's first
}

// Volumes are those of the pools that are there.
type Volumes struct {
	Volumes []volume.Volume `json:"volumes"` // by id
	Missing *Error          `json:"missing,omitempty"`
}

func pathOf(id string) string { return "/volumes/" + url.PathEscape(id) }

// Create makes a volume, or finds the one that is there.
func (c Client) Create(ctx context.Context, r volume.Request) (v volume.Volume, err error) {
	return v, c.call(ctx, http.MethodPut, pathOf(r.Name), Request{r.Size, r.Limit, r.Origin, r.Map()}, &v)
}

// Delete removes one.
func (c Client) Delete(ctx context.Context, id string) error {
	return c.call(ctx, http.MethodDelete, pathOf(id), nil, nil)
}

// Volume is one.
func (c Client) Volume(ctx context.Context, id string) (v volume.Volume, err error) {
	return v, c.call(ctx, http.MethodGet, pathOf(id), nil, &v)
}

// Volumes are all, by id; with an ErrUnavailable, those of the pools that are there.
func (c Client) Volumes(ctx context.Context) (all []volume.Volume, err error) {
	var out Volumes
	err = c.call(ctx, http.MethodGet, "/volumes", nil, &out)
	if err == nil && out.Missing != nil {
		err = out.Missing.err()
	}
	return out.Volumes, err
}

// Expand makes one larger, with its file system where it is published.
func (c Client) Expand(ctx context.Context, id string, size, limit int64) (int64, error) {
	var now Size
	err := c.call(ctx, http.MethodPost, pathOf(id)+"/expand", Size{size, limit}, &now)
	return now.Bytes, err
}

// Take takes a snapshot, as one of the schedule's or as somebody's.
func (c Client) Take(ctx context.Context, id volume.SnapshotID, automatic bool) (s volume.Snapshot, err error) {
	return s, c.call(ctx, http.MethodPut, "/snapshots/"+url.PathEscape(id.String())+"?automatic="+strconv.FormatBool(automatic), nil, &s)
}

// Drop removes one.
func (c Client) Drop(ctx context.Context, id volume.SnapshotID) error {
	return c.call(ctx, http.MethodDelete, "/snapshots/"+url.PathEscape(id.String()), nil, nil)
}

// Taken are a volume's snapshots, or ("") all, by id.
func (c Client) Taken(ctx context.Context, id string) (all []volume.Snapshot, err error) {
	return all, c.call(ctx, http.MethodGet, "/snapshots?volume="+url.QueryEscape(id), nil, &all)
}

// Capacity is how many bytes a new volume with these parameters can have.
func (c Client) Capacity(ctx context.Context, p volume.Parameters) (int64, error) {
	q := url.Values{}
	for name, value := range p.Map() {
		q.Set(name, value)
	}
	var s Size
	err := c.call(ctx, http.MethodGet, "/capacity?"+q.Encode(), nil, &s)
	return s.Bytes, err
}

// Backend is the filer's.
func (c Client) Backend(ctx context.Context) (b Backend, err error) {
	return b, c.call(ctx, http.MethodGet, "/backend", nil, &b)
}

// Ready says why nothing can be kept at the moment.
func (c Client) Ready(ctx context.Context) error {
	return c.call(ctx, http.MethodGet, "/ready", nil, nil)
}
