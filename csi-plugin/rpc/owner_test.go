package rpc

import (
	"context"
	"fmt"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/cradlestack/cradlestack/csi-plugin/volume"
)

// A volume that was restored on another host, or is not wholly restored on this one, is not attached; nor is any where nobody says whose it is.
func TestOwner(t *testing.T) {
	block := volume.Parameters{Class: volume.LV2}
	for _, c := range []struct {
		what  string
		v     volume.Volume
		owner Owner
		err   error
		code  codes.Code
		want  string
	}{
		{"never restored", volume.Volume{ID: "v", Parameters: block}, Owner{}, nil, codes.OK, ""},
		{"restored here", volume.Volume{ID: "v", Generation: 2, Parameters: block}, Owner{2, "node2"}, nil, codes.OK, ""},
		{"restored elsewhere", volume.Volume{ID: "v", Parameters: block}, Owner{1, "node2"}, nil, codes.FailedPrecondition, `it was restored on node node2, and what this host has is of before; "cradle-csi lv2 discard v"`},
		{"restored elsewhere again", volume.Volume{ID: "v", Generation: 1, Parameters: block}, Owner{2, "node3"}, nil, codes.FailedPrecondition, "it was restored on node node3"},
		{"received only", volume.Volume{ID: "v", Generation: 1, Parameters: block}, Owner{}, nil, codes.FailedPrecondition, "has not come to its end"},
		{"no answer", volume.Volume{ID: "v", Parameters: block}, Owner{}, fmt.Errorf("%w: no", volume.ErrUnavailable), codes.Unavailable, "no"},
		{"files", volume.Volume{ID: "v", Parameters: volume.Parameters{Class: volume.NFS}}, Owner{1, "node2"}, nil, codes.OK, ""},
	} {
		s := &node{Server: &Server{config: Config{Owner: func(context.Context, string) (Owner, error) { return c.owner, c.err }}}}
		err := translate(s.own(t.Context(), c.v))
		if status.Code(err) != c.code || c.want != "" && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v; want %v, %s", c.what, err, c.code, c.want)
		}
	}
	if err := (&node{Server: &Server{}}).own(t.Context(), volume.Volume{Generation: 1, Parameters: block}); err != nil {
		t.Errorf("nobody to ask: %v", err)
	}
}
