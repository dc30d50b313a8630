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

	Tenant *Tenant `json:"tenant,omitempty"` // whose it is; nil for root's

	// What the filer adds.
	Secret string `json:"secret,omitempty"` // the password; lists have none
	WebDAV string `json:"webdav,omitempty"` // URL of the volume
	S3     string `json:"s3,omitempty"`     // URL of the service, where the volume's name can be that of a bucket
}

// A Tenant is one of Nomad's namespaces, to which a grant belongs.
type Tenant struct {
	Namespace string `json:"namespace"`
	Name      string `json:"name"`     // of the grant, in the namespace: others may have one of the same name
	Volume    string `json:"volume"`   // as Nomad calls it
	Variable  string `json:"variable"` // path of the namespace's Variable that the secret is in
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
