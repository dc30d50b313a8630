package provider

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"strings"

	"github.com/hashicorp/terraform-plugin-framework/diag"
	"github.com/hashicorp/terraform-plugin-framework/path"

	filer "github.com/cradlestack/cradlestack/csi-plugin/filer/api"
	"github.com/cradlestack/cradlestack/csi-plugin/volume"
)

// filerVariable has the URL of cradle-filer's API where the provider's filer has not.
const filerVariable = "CRADLE_FILER_API"

// checkFiler says what is wrong with an address to which the token is sent: nobody else is to read that on the way.
func checkFiler(address string) error {
	if address == "" {
		return nil
	}
	u, err := url.Parse(address)
	if err != nil {
		return err
	}
	ip, notIP := netip.ParseAddr(u.Hostname())
	loopback := u.Hostname() == "localhost" || notIP == nil && ip.IsLoopback()
	if u.Host == "" || u.Scheme != "https" && (u.Scheme != "http" || !loopback) {
		return fmt.Errorf("%q is not such as https://filer.example.org:2050; http is for loopback addresses, as the token is sent there", address)
	}
	return nil
}

// blockRollback is why a block volume has none.
const blockRollback = "The content of a block volume is a file system of its pod's, which nobody but the pod can write: make a volume with snapshot_id, and let the pod mount that."

// planRollback tells what a rollback would do, and what there is none of.
func (r *volumeResource) planRollback(there bool, plan, state *volumeModel) (diags diag.Diagnostics) {
	at := path.Root("rollback_to")
	if plan.RollbackTo.IsNull() || there && plan.RollbackTo.Equal(state.RollbackTo) {
		return nil
	}
	switch {
	case plan.Class.ValueString() == volume.LV2:
		diags.AddAttributeError(at, "Not of this class", blockRollback)
	case !there:
		diags.AddAttributeError(at, "Not of a new volume", "A volume that is made now has no snapshots: leave rollback_to out, or begin with the content of a snapshot by snapshot_id.")
	case r.filer == "":
		diags.AddAttributeError(at, "No filer", "Volumes are rolled back by cradle-filer: give the provider the URL of its API, filer or $"+filerVariable+".")
	default:
		diags.AddAttributeWarning(at, "The volume's content will be replaced",
			fmt.Sprintf("%s becomes what it was in snapshot %s. What is in it now is kept in a snapshot that undo_snapshot names. Pods that have the volume wait meanwhile.", state.ID.ValueString(), plan.RollbackTo.ValueString()))
	}
	return diags
}

// rollback makes a volume what it was, and returns the snapshot that has what was there before.
func (r *volumeResource) rollback(ctx context.Context, m *volumeModel) (undo string, diags diag.Diagnostics) {
	name := m.RollbackTo.ValueString()
	if of, short, ok := strings.Cut(name, "@"); ok {
		if of != m.ExternalID.ValueString() {
			diags.AddAttributeError(path.Root("rollback_to"), "Not of this volume", fmt.Sprintf("%s is a snapshot of another volume than %s (%s).", name, m.ID.ValueString(), m.ExternalID.ValueString()))
			return "", diags
		}
		name = short
	}
	c := filer.Client{URL: r.filer, Token: r.config.SecretID, Namespace: m.Namespace.ValueString()}
	done, err := c.Rollback(ctx, m.Name.ValueString(), filer.Rollback{Snapshot: name})
	if err != nil {
		text := err.Error()
		switch {
		case errors.Is(err, filer.ErrDenied):
			text += "\nThe provider's token needs csi-write-volume in the volume's namespace, and plugin:read."
		case errors.Is(err, volume.ErrUnavailable):
			text += "\nSee the provider's filer, or $" + filerVariable + "."
		}
		diags.AddAttributeError(path.Root("rollback_to"), "The volume was not rolled back", m.ID.ValueString()+" to "+name+": "+text)
	}
	return done.Undo, diags
}
