package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"math"
	"net/http"
	"regexp"
	"strconv"
	"strings"
	"time"

	nomadapi "github.com/hashicorp/nomad/api"

	"github.com/cradlestack/cradlestack/csi-plugin/filer/api"
	"github.com/cradlestack/cradlestack/csi-plugin/volume"
)

const (
	tenantGrants = 64               // that a namespace may have of a volume
	variableTime = 30 * time.Second // for Nomad to write a Variable, or to remove it
)

// variablePath is what Nomad takes for a Variable's path (nomad/structs, VariableDecrypted.Validate).
var variablePath = regexp.MustCompile(`^[a-zA-Z0-9_~/-]{1,128}$`)

// handleGrants answers what is about the grants of Nomad's namespaces. The secrets are in Variables, which are written with the caller's token: this process can't.
func (f *filer) handleGrants(mux *http.ServeMux, n *nomad) {
	handle := handleJSON(mux, f.log)
	handle("PUT /grants/{id}", func(r *http.Request) (any, error) {
		var g api.Grant
		if err := read(r, "grant", &g); err != nil {
			return nil, err
		}
		t := api.Tenant{Name: r.PathValue("id"), Volume: g.Volume}
		if g.Tenant != nil {
			t.Variable = g.Tenant.Variable
		}
		g.Tenant = &t
		return f.change(r, n.admit, event{What: "grant", Volume: g.Volume, Grant: t.Name}, func(ctx context.Context, c caller, _ *event) (any, error) {
			t.Namespace, g.Volume = c.namespace, c.volume
			return f.grantTenant(ctx, n.variable(r, c.namespace), g)
		})
	})
	handle("DELETE /grants/{id}", func(r *http.Request) (any, error) {
		// Whether it is there is only for those to know who may revoke it.
		namespace, name := namespaceOf(r), r.PathValue("id")
		none := fmt.Errorf("grant %.80q of namespace %.80q: %w, or the token does not have the capability csi-write-volume there", name, namespace, volume.ErrNotFound)
		g, _, err := f.tenantGrant(api.Tenant{Namespace: namespace, Name: name})
		switch {
		case err != nil:
			return nil, err
		case g.ID == "":
			return nil, none
		}
		admitted := false
		_, err = f.change(r, n.admit, event{What: "revoke", Volume: g.Tenant.Volume, Grant: name}, func(ctx context.Context, c caller, _ *event) (any, error) {
			admitted = true
			return nil, f.revokeTenant(ctx, n.variable(r, c.namespace), *g.Tenant)
		})
		if !admitted && notForThem(err) {
			err = none
		}
		return struct{}{}, err
	})
	handle("GET /grants", func(r *http.Request) (any, error) {
		namespace := namespaceOf(r)
		all, err := f.grants()
		admitted := map[string]error{}
		shown := []api.Grant{}
		for _, g := range all {
			if g.Tenant == nil || g.Tenant.Namespace != namespace {
				continue
			}
			aerr, asked := admitted[g.Tenant.Volume]
			if !asked {
				_, aerr = n.admit(r, g.Tenant.Volume, false)
				admitted[g.Tenant.Volume] = aerr
			}
			switch {
			case aerr == nil:
				shown = append(shown, g)
			case errors.Is(aerr, api.ErrDenied): // as it is for each volume of the namespace: whoever asks has Nomad asked once
				return []api.Grant{}, nil
			case !notForThem(aerr):
				return nil, aerr
			}
		}
		return shown, err
	})
}

// notForThem says whether Nomad knows of nothing that the caller may have.
func notForThem(err error) bool {
	return errors.Is(err, api.ErrDenied) || errors.Is(err, volume.ErrNotFound)
}

// tenantGrant is a namespace's grant, one without an ID where there is none, and how many others it has of the same volume.
func (f *filer) tenantGrant(t api.Tenant) (found api.Grant, others int, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	all, err := f.granted().all()
	for _, g := range all {
		switch {
		case g.Tenant == nil || g.Tenant.Namespace != t.Namespace:
		case g.Tenant.Name == t.Name:
			found = g
		case g.Tenant.Volume == t.Volume:
			others++
		}
	}
	return found, others, err
}

// grantTenant lets a namespace's users use a volume, and puts what they need for that into its Variable.
func (f *filer) grantTenant(ctx context.Context, v variable, g api.Grant) (api.Grant, error) {
	t := g.Tenant
	if err := volume.CheckName("grant", t.Name); err != nil {
		return g, err
	}
	t.Variable = cmp.Or(t.Variable, grantVariables+t.Name)
	if !variablePath.MatchString(t.Variable) {
		return g, volume.Invalid("variable "+strconv.Quote(t.Variable), "a path has letters, digits, -, _, ~ and /, at most 128; give one with --variable")
	}
	for _, id := range []int{g.UID, g.GID} {
		if id < 0 || id >= math.MaxUint32 {
			return g, volume.Invalid("grant "+t.Name, "%d is no number of a user or group", id)
		}
	}
	unlock, err := f.tenants.Lock(ctx, t.Namespace)
	if err != nil {
		return g, err
	}
	defer unlock()
	former, others, err := f.tenantGrant(*t)
	switch {
	case err != nil:
		return g, err
	case former.ID == "" && others >= tenantGrants:
		return g, volume.Invalid("grant "+t.Name, "namespace %s has %d grants of volume %s already; revoke some", t.Namespace, others, t.Volume)
	case former.ID == "":
		g.ID = strings.ToLower(rand.Text()[:20])
	case *former.Tenant != *t:
		return g, fmt.Errorf("grant %s of namespace %s %w: it is of volume %s, with variable %s; revoke it before", t.Name, t.Namespace, volume.ErrExists, former.Tenant.Volume, former.Tenant.Variable)
	default:
		g.ID = former.ID
	}
	if g, err = f.grant(ctx, g); err != nil {
		return g, err
	}
	if err := v.write(ctx, g); err != nil {
		if former.ID == "" {
			err = errors.Join(err, f.revoke(context.WithoutCancel(ctx), g.ID))
		}
		return g, err
	}
	return g, nil
}

// revokeTenant ends a namespace's grant. The Variable goes first: as long as the grant is there, it can be revoked again.
func (f *filer) revokeTenant(ctx context.Context, v variable, t api.Tenant) error {
	unlock, err := f.tenants.Lock(ctx, t.Namespace)
	if err != nil {
		return err
	}
	defer unlock()
	g, _, err := f.tenantGrant(t)
	if err != nil || g.ID == "" || *g.Tenant != t {
		return err // somebody else has been faster
	}
	if err := v.remove(ctx, g); err != nil {
		return err
	}
	return f.revoke(ctx, g.ID)
}

// A variable is how Variables of a namespace are written and removed, by the token of who has asked for that.
type variable struct {
	client           *nomadapi.Client
	namespace, token string
}

func (n *nomad) variable(r *http.Request, namespace string) variable {
	return variable{n.client, namespace, tokenOf(r)}
}

func (v variable) options(ctx context.Context) (*nomadapi.QueryOptions, *nomadapi.WriteOptions) {
	return (&nomadapi.QueryOptions{Namespace: v.namespace, AuthToken: v.token}).WithContext(ctx), (&nomadapi.WriteOptions{Namespace: v.namespace, AuthToken: v.token}).WithContext(ctx)
}

// itsUser is the item of a Variable that says whose it is.
const itsUser = "user"

// write puts a grant into its Variable. One that is something else's stays.
func (v variable) write(ctx context.Context, g api.Grant) error {
	ctx, cancel := context.WithTimeout(ctx, variableTime)
	defer cancel()
	q, w := v.options(ctx)
	path := g.Tenant.Variable
	former, _, err := v.client.Variables().Peek(path, q)
	if err != nil {
		return v.translated(err, path)
	}
	is := &nomadapi.Variable{Namespace: v.namespace, Path: path, Items: nomadapi.VariableItems{
		itsUser: g.ID, "secret": g.Secret, "volume": g.Tenant.Volume, "bucket": g.Volume, "webdav": g.WebDAV, "s3": g.S3, "access": access(g.ReadOnly),
	}}
	if former != nil {
		if former.Items[itsUser] != g.ID {
			return fmt.Errorf("variable %s of namespace %s %w: it has something else; remove it, or name another one with --variable", path, v.namespace, volume.ErrExists)
		}
		is.ModifyIndex = former.ModifyIndex
	}
	if _, _, err := v.client.Variables().CheckedUpdate(is, w); err != nil {
		return v.translated(err, path)
	}
	return nil
}

// remove removes a grant's Variable, if it is still that.
func (v variable) remove(ctx context.Context, g api.Grant) error {
	ctx, cancel := context.WithTimeout(ctx, variableTime)
	defer cancel()
	q, w := v.options(ctx)
	path := g.Tenant.Variable
	is, _, err := v.client.Variables().Peek(path, q)
	if err == nil && is != nil && is.Items[itsUser] == g.ID {
		_, err = v.client.Variables().CheckedDelete(path, is.ModifyIndex, w)
	}
	if err != nil {
		return v.translated(err, path)
	}
	return nil
}

func (v variable) translated(err error, path string) error {
	return translated(err, fmt.Sprintf("variable %s of namespace %s", path, v.namespace), fmt.Sprintf(`read, write and destroy for variables { path "%s" }`, path))
}
