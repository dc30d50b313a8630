package main

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"

	"github.com/spf13/pflag"

	"github.com/cradlestack/cradlestack/csi-plugin/filer/api"
	"github.com/cradlestack/cradlestack/internal/command"
)

// A usersAPI is where Nomad's users reach the filer.
type usersAPI struct {
	address, cert, key string
	nomadAt, plugin    string
	nomad              *nomad
}

func (u *usersAPI) flags(f *pflag.FlagSet) {
	f.StringVar(&u.address, "api", "", "address to answer Nomad's users on, about their volumes' snapshots and grants: 0.0.0.0:2050 (default: only root is answered, on the socket)")
	f.StringVar(&u.cert, "api-cert", "", "PEM file of the certificate for that; without one it has to be a loopback address, as tokens are sent there")
	f.StringVar(&u.key, "api-key", "", "PEM file of its key")
	f.StringVar(&u.nomadAt, "nomad", command.TaskAPI(), "address of Nomad's API, which says what a user's token allows (default: the task API, where the task has an identity)")
	f.StringVar(&u.plugin, "plugin", "cradle", "the id in Nomad of the plugin whose volumes these are")
}

// listen is nil where users are not answered.
func (u *usersAPI) listen() (net.Listener, error) {
	if u.address == "" {
		return nil, nil
	}
	if u.nomadAt == "" {
		return nil, errors.New("--api: Nomad is to say what a user may do; give its address with --nomad")
	}
	var err error
	if u.nomad, err = openNomad(u.nomadAt, u.plugin); err != nil {
		return nil, err
	}
	pair := &keyPair{cert: u.cert, key: u.key}
	if u.cert != "" {
		if _, err := pair.get(nil); err != nil {
			return nil, fmt.Errorf("--api-cert: %w", err)
		}
	}
	l, err := net.Listen("tcp", u.address)
	if err != nil {
		return nil, fmt.Errorf("--api: %w", err)
	}
	switch {
	case u.cert != "":
		return tls.NewListener(l, &tls.Config{MinVersion: tls.VersionTLS12, GetCertificate: pair.get, NextProtos: []string{"http/1.1"}}), nil
	case !l.Addr().(*net.TCPAddr).IP.IsLoopback():
		return nil, errors.Join(fmt.Errorf("--api %s: tokens that are sent there could be read on the way; give a certificate with --api-cert and --api-key", u.address), l.Close())
	}
	return l, nil
}

// maxUsersHeader bounds the head of what users ask.
const maxUsersHeader = 32 << 10

func (f *filer) usersHandler(n *nomad) http.Handler {
	mux := http.NewServeMux()
	f.handleSnapshots(mux, n.admit)
	f.handleGrants(mux, n)
	return limited(mux)
}

// An admission says who the caller is, and that Nomad lets it read or change a volume.
type admission func(r *http.Request, id string, change bool) (caller, error)

// change does what is told in the audit log, whatever becomes of the caller meanwhile, as long as this filer may.
func (f *filer) change(r *http.Request, admit admission, e event, do func(ctx context.Context, c caller, e *event) (any, error)) (out any, err error) {
	c, err := admit(r, e.Volume, true)
	e.Who, e.Namespace = c.who, c.namespace
	if err != nil {
		f.audit.refuse(e, err)
		return nil, err
	}
	ctx, cancel := context.WithCancelCause(context.WithoutCancel(r.Context()))
	defer cancel(nil)
	defer context.AfterFunc(f.long, func() { cancel(context.Cause(f.long)) })()
	out, err = do(ctx, c, &e)
	f.audit.write(e, err)
	return out, err
}

// handleSnapshots answers what is about volumes' snapshots, to those whom admit lets.
func (f *filer) handleSnapshots(mux *http.ServeMux, admit admission) {
	handle := handleJSON(mux, f.log)
	sees := func(pattern string, do func(r *http.Request, id string) (any, error)) {
		handle(pattern, func(r *http.Request) (any, error) {
			c, err := admit(r, r.PathValue("id"), false)
			if err != nil {
				return nil, err
			}
			return do(r, c.volume)
		})
	}
	sees("GET /volumes/{id}/snapshots", func(r *http.Request, id string) (any, error) { return f.snapshots(r.Context(), id) })
	sees("GET /volumes/{id}/schedule", func(r *http.Request, id string) (any, error) { return f.schedule(r.Context(), id) })
	sees("GET /volumes/{id}/diff", func(r *http.Request, id string) (any, error) {
		return f.diff(r.Context(), id, r.URL.Query().Get("from"), r.URL.Query().Get("to"))
	})
	handle("PUT /volumes/{id}/snapshots/{name}", func(r *http.Request) (any, error) {
		name := r.PathValue("name")
		return f.change(r, admit, event{What: "snapshot", Volume: r.PathValue("id"), Snapshot: name}, func(ctx context.Context, c caller, _ *event) (any, error) {
			return f.snapshot(ctx, c.volume, name)
		})
	})
	handle("PUT /volumes/{id}/schedule", func(r *http.Request) (any, error) {
		return f.change(r, admit, event{What: "schedule", Volume: r.PathValue("id")}, func(ctx context.Context, c caller, e *event) (any, error) {
			var asked api.Schedule
			if err := read(r, "schedule", &asked); err != nil {
				return nil, err
			}
			e.Schedule = cmp.Or(asked.Snapshots, "as the volume was made")
			return f.reschedule(ctx, c.volume, asked.Snapshots)
		})
	})
	handle("POST /volumes/{id}/rollback", func(r *http.Request) (any, error) {
		return f.change(r, admit, event{What: "rollback", Volume: r.PathValue("id")}, func(ctx context.Context, c caller, e *event) (any, error) {
			var asked api.Rollback
			if err := read(r, "rollback", &asked); err != nil {
				return nil, err
			}
			done, err := f.rollback(ctx, c, e.Volume, asked)
			e.Snapshot, e.Path, e.Undo = asked.Snapshot, asked.Path, done.Undo
			return done, err
		})
	})
}
