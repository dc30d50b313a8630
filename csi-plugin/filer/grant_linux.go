package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cradlestack/cradlestack/csi-plugin/filer/api"
	"github.com/cradlestack/cradlestack/csi-plugin/filer/webdav"
	"github.com/cradlestack/cradlestack/csi-plugin/volume"
)

func (f *filer) grantFile(id string) string { return filepath.Join(f.state, "grants", id+".json") }

// grant lets somebody use a volume.
func (f *filer) grant(ctx context.Context, g api.Grant) (api.Grant, error) {
	if err := volume.CheckName("grant", g.ID); err != nil {
		return g, err
	}
	if f.webdav == nil {
		return g, volume.Invalid("grant "+g.ID, "there is nothing to use it with; let the filer serve WebDAV by --webdav")
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	former, err := f.readGrant(g.ID)
	switch {
	case err == nil && former.Volume != g.Volume:
		return g, fmt.Errorf("grant %s %w: it is of volume %s", g.ID, volume.ErrExists, former.Volume)
	case err == nil:
		g.Secret = former.Secret
	case errors.Is(err, fs.ErrNotExist):
		g.Secret = rand.Text()
	default:
		return g, err
	}
	g.WebDAV, g.S3 = "", ""
	v, err := f.backend.Get(ctx, g.Volume)
	if err == nil && v.Block() {
		err = volume.Invalid("volume "+v.ID, "class %s is of block volumes, which have no files to serve", v.Class)
	}
	if err != nil {
		return g, err
	}
	// The record comes first: what it is about can then be undone, whatever happens.
	if err := f.writeGrant(g); err != nil {
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

// admit lets a grant's user in.
func (f *filer) admit(ctx context.Context, g api.Grant) error {
	if f.webdav == nil {
		return nil
	}
	root, err := f.place(ctx, g.Volume)
	if err != nil {
		return err
	}
	return f.webdav.Allow(webdav.Grant{User: g.ID, Secret: g.Secret, Volume: g.Volume, Root: root, ReadOnly: g.ReadOnly, UID: g.UID, GID: g.GID})
}

// revoke ends a grant.
func (f *filer) revoke(ctx context.Context, id string) error {
	if !volume.ValidName(id) {
		return nil
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	g, err := f.readGrant(id)
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
	if f.webdav != nil {
		f.webdav.Forbid(g.ID)
	}
	if err := f.release(ctx, g.Volume); err != nil {
		return err
	}
	return os.Remove(f.grantFile(g.ID))
}

func (f *filer) readGrant(id string) (g api.Grant, err error) {
	data, err := os.ReadFile(f.grantFile(id))
	if err == nil {
		err = json.Unmarshal(data, &g)
	}
	if err != nil {
		err = fmt.Errorf("grant %s: %w", id, err)
	}
	return g, err
}

func (f *filer) writeGrant(g api.Grant) error {
	data, err := json.MarshalIndent(g, "", "  ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(f.grantFile(g.ID)), 0o700); err != nil {
		return err
	}
	return writeFile(f.grantFile(g.ID), append(data, '\n'))
}

// allGrants are the grants by id, with their secrets.
func (f *filer) allGrants() (all []api.Grant, err error) {
	entries, err := os.ReadDir(filepath.Join(f.state, "grants"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	for _, e := range entries {
		id, isRecord := strings.CutSuffix(e.Name(), ".json")
		if !isRecord || !volume.ValidName(id) {
			continue
		}
		g, err := f.readGrant(id)
		if err != nil {
			return nil, err
		}
		all = append(all, g)
	}
	slices.SortFunc(all, func(a, b api.Grant) int { return cmp.Compare(a.ID, b.ID) })
	return all, nil
}

func (f *filer) grants() ([]api.Grant, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	all, err := f.allGrants()
	shown := []api.Grant{}
	for _, g := range all {
		g.Secret = ""
		shown = append(shown, f.urls.complete(g))
	}
	return shown, err
}
