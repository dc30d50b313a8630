package api

import (
	"context"
	"net/http"
	"net/url"
)

// A Grant lets whoever knows its secret use a volume over WebDAV and S3, from wherever the filer is reached. It outlasts reboots.
type Grant struct {
	ID       string `json:"id"` // the user
	Volume   string `json:"volume"`
	ReadOnly bool   `json:"readOnly,omitempty"`
	UID      int    `json:"uid"` // whom belongs what is made
	GID      int    `json:"gid"`

	// What the filer adds.
	Secret string `json:"secret,omitempty"` // the password; lists have none
	WebDAV string `json:"webdav,omitempty"` // URL of the volume
	S3     string `json:"s3,omitempty"`     // URL of the service, where the volume's name can be that of a bucket
}

// Grant lets somebody use a volume, and says how.
func (c Client) Grant(ctx context.Context, g Grant) (out Grant, err error) {
	return out, c.call(ctx, http.MethodPut, "/grants/"+url.PathEscape(g.ID), g, &out)
}

// Revoke ends a grant.
func (c Client) Revoke(ctx context.Context, id string) error {
	return c.call(ctx, http.MethodDelete, "/grants/"+url.PathEscape(id), nil, nil)
}

// Grants are all that there are, without their secrets.
func (c Client) Grants(ctx context.Context) (all []Grant, err error) {
	return all, c.call(ctx, http.MethodGet, "/grants", nil, &all)
}
