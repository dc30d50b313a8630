package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"

	"github.com/cradlestack/cradlestack/csi-plugin/filer/api"
	"github.com/cradlestack/cradlestack/csi-plugin/filer/s3"
	"github.com/cradlestack/cradlestack/csi-plugin/filer/webdav"
	"github.com/cradlestack/cradlestack/csi-plugin/volume"
)

// granted are the grants, with their secrets.
func (f *filer) granted() records[api.Grant] {
	return records[api.Grant]{filepath.Join(f.state, "grants"), "grant"}
}

// grant lets somebody use a volume.
func (f *filer) grant(ctx context.Context, g api.Grant) (api.Grant, error) {
	if err := volume.CheckName("grant", g.ID); err != nil {
		return g, err
	}
	if f.webdav == nil && f.s3 == nil {
		return g, volume.Invalid("grant "+g.ID, "there is nothing to use it with; let the filer serve WebDAV by --webdav, or S3 by --s3")
	}
	if err := f.whole(ctx, g.Volume); err != nil {
		return g, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	former, err := f.granted().read(g.ID)
	switch {
	case err == nil && former.Volume != g.Volume:
		return g, fmt.Errorf("grant %s %w: it is of volume %s", g.ID, volume.ErrExists, former.Volume)
	case err == nil && whose(former) != whose(g):
		return g, fmt.Errorf("grant %s %w: it is %s's", g.ID, volume.ErrExists, whose(former))
	case err == nil:
		g.Secret = former.Secret
	case errors.Is(err, fs.ErrNotExist):
		g.Secret = rand.Text()
	default:
		return g, err
	}
	g.WebDAV, g.S3 = "", ""
	if err := f.hasFiles(ctx, g.Volume); err != nil {
		return g, err
	}
	// The record comes first: what it is about can then be undone, whatever happens.
	if err := f.granted().write(g.ID, g); err != nil {
		return g, err
	}
	if err := f.admit(ctx, g); err != nil {
		if former.ID == "" {
			err = errors.Join(err, f.endGrant(ctx, g))
		}
		return g, err
	}
	f.log.Info("granted", "grant", g.ID, "volume", g.Volume, "read-only", g.ReadOnly)
	return f.urls.complete(g), nil
}

// whose grant it is.
func whose(g api.Grant) string {
	if g.Tenant == nil {
		return "root"
	}
	return "namespace " + g.Tenant.Namespace
}

// owner is whose requests are counted together: those of a namespace's grants, or of root's for one volume.
func owner(g api.Grant) string {
	if g.Tenant == nil {
		return "volume " + g.Volume
	}
	return whose(g)
}

// admit lets a grant's user in.
func (f *filer) admit(ctx context.Context, g api.Grant) error {
	if f.webdav == nil && f.s3 == nil {
		return nil
	}
	if err := f.isWhole(g.Volume); err != nil {
		return err
	}
	root, err := f.place(ctx, g.Volume)
	seen, gate := f.seen(g.Volume), f.gate(g.Volume)
	if err == nil && f.webdav != nil {
		err = f.webdav.Allow(webdav.Grant{User: g.ID, Secret: g.Secret, Volume: g.Volume, Root: root, ReadOnly: g.ReadOnly, UID: g.UID, GID: g.GID, Owner: owner(g), Snapshots: seen, Gate: gate})
	}
	if err == nil && f.s3 != nil && s3.CheckBucket(g.Volume) == nil {
		err = f.s3.Allow(s3.Grant{Key: g.ID, Secret: g.Secret, Volume: g.Volume, Root: root, ReadOnly: g.ReadOnly, UID: g.UID, GID: g.GID, Owner: owner(g), Snapshots: seen, Gate: gate})
	}
	return stuck(err)
}

// revoke ends a grant.
func (f *filer) revoke(ctx context.Context, id string) error {
	if !volume.ValidName(id) {
		return nil
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	g, err := f.granted().read(id)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err == nil {
		err = f.endGrant(ctx, g)
	}
	if err == nil {
		f.log.Info("revoked", "grant", id, "volume", g.Volume)
	}
	return err
}

// endGrant undoes admit, as far as nobody else needs it, and then the record.
func (f *filer) endGrant(ctx context.Context, g api.Grant) error {
	var errs []error
	if f.webdav != nil {
		errs = append(errs, f.webdav.Forbid(g.ID))
	}
	if f.s3 != nil {
		errs = append(errs, f.s3.Forbid(g.ID))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("end grant %s: %w", g.ID, stuck(err))
	}
	if err := f.release(ctx, g.Volume, 1); err != nil {
		return err
	}
	return f.granted().remove(g.ID)
}

func (f *filer) grants() ([]api.Grant, error) {
	all, err := f.granted().all()
	shown := []api.Grant{}
	for _, g := range all {
		g.Secret = ""
		shown = append(shown, f.urls.complete(g))
	}
	return shown, err
}
