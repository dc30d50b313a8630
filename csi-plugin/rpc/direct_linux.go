package rpc

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/cradlestack/cradlestack/csi-plugin/mount"
	"github.com/cradlestack/cradlestack/csi-plugin/volume"
	"github.com/cradlestack/cradlestack/internal/jsonhttp"
	"github.com/cradlestack/cradlestack/spec"
)

// publishDirect leaves a record for whoever runs the pod, and on the target a mount that fails everybody else.
func (s *node) publishDirect(ctx context.Context, v volume.Volume, target string, w wish) error {
	if v.Block() {
		if err := s.only(v.ID, target); err != nil {
			return err
		}
	}
	mounted, err := mount.Is(target)
	if err != nil {
		return err
	}
	if mounted {
		former, err := s.record(spec.DirectFile(target))
		if err != nil {
			return status.Errorf(codes.AlreadyExists, "%s: something else is mounted there", target)
		}
		return published(target, former.Volume.Name == v.ID, readOnly(former), w.readOnly)
	}
	d := spec.DirectAttachment{
		Version: spec.DirectVersion, Target: target, Raw: w.block, Limits: v.Limits,
		Control: filepath.Join(s.config.DirectDir, spec.DirectSocket(target)),
	}
	if v.Block() {
		source, err := s.config.Backend.Stage(ctx, v.ID, volume.Use{As: volume.AsGuest})
		if err != nil {
			return err
		}
		d.Volume = source.Guest
		d.Volume.Block.ReadOnly, d.Volume.Block.Options = w.readOnly, strings.Join(w.flags, ",")
	} else if d.Volume, err = s.serve(ctx, v, target, w); err != nil {
		return err
	}
	if err := d.Validate(); err != nil {
		return fmt.Errorf("volume %s: its record: %w", v.ID, err)
	}
	if err := s.write(d); err != nil {
		return err
	}
	if err := os.Mkdir(target, 0o750); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return mount.Empty(target)
}

func readOnly(d *spec.DirectAttachment) bool {
	return d.Volume.Block != nil && d.Volume.Block.ReadOnly || d.Volume.NFS != nil && d.Volume.NFS.ReadOnly || d.Volume.Ceph != nil && d.Volume.Ceph.ReadOnly
}

// only refuses a second guest for a block volume: each would write what the other has cached.
func (s *Server) only(id, target string) error {
	all, err := s.attached(id)
	if err != nil {
		return err
	}
	for _, d := range all {
		if d.Target != target && d.Volume.Block != nil {
			return failed("volume %s: it is attached at %s already; a block volume has one guest", id, d.Target)
		}
	}
	return nil
}

// unattached refuses what would take a volume from a guest.
func (s *Server) unattached(id string) error {
	all, err := s.attached(id)
	if err != nil || len(all) == 0 {
		return err
	}
	return fmt.Errorf("volume %s: %w: it is attached at %s", id, volume.ErrInUse, all[0].Target)
}

// attached returns the records of a volume whose targets are mounted. One whose target is not is left by a call that did not end.
func (s *Server) attached(id string) ([]*spec.DirectAttachment, error) {
	entries, err := os.ReadDir(s.config.DirectDir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	var all []*spec.DirectAttachment
	for _, e := range entries {
		if filepath.Ext(e.Name()) != ".json" || strings.HasPrefix(e.Name(), ".") {
			continue
		}
		d, err := s.record(e.Name())
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if d.Volume.Name != id {
			continue
		}
		if mounted, err := mount.Is(d.Target); err != nil {
			return nil, err
		} else if mounted {
			all = append(all, d)
		}
	}
	return all, nil
}

func (s *Server) record(name string) (*spec.DirectAttachment, error) {
	path := filepath.Join(s.config.DirectDir, name)
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	return spec.ParseDirectAttachment(path, data)
}

// write replaces a record in one step. It is gone after a reboot, as the mount is, so that nothing has to reach a disk.
func (s *Server) write(d spec.DirectAttachment) error {
	data, err := json.MarshalIndent(d, "", "  ")
	if err != nil {
		return err
	}
	return s.replace(spec.DirectFile(d.Target), append(data, '\n'))
}

// replace writes a file beside the records.
func (s *Server) replace(name string, data []byte) error {
	if err := os.MkdirAll(s.config.DirectDir, 0o700); err != nil {
		return err
	}
	temporary := filepath.Join(s.config.DirectDir, "."+name) // one call at a time for one volume, and so for its target
	if err := os.WriteFile(temporary, data, 0o600); err != nil {
		return err
	}
	return os.Rename(temporary, filepath.Join(s.config.DirectDir, name))
}

// forget removes the record of a target with its secret, and the socket that its pod may have left.
func (s *Server) forget(target string) error {
	record, secret := spec.DirectFile(target), spec.DirectSecret(target)
	for _, name := range []string{record, "." + record, secret, "." + secret, spec.DirectSocket(target)} {
		if err := os.Remove(filepath.Join(s.config.DirectDir, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// errNoGuest is a pod that does not have the volume mounted: it has not started yet, has ended, or holds the volume raw.
var errNoGuest = errors.New("no guest has it mounted")

func (s *Server) guestStats(ctx context.Context, target string) (stats spec.VolumeStats, err error) {
	err = s.guest(ctx, http.MethodGet, target, spec.DirectStatsPath, nil, &stats)
	return stats, err
}

// guestResize tells a guest that its disk has grown. One that is not there finds out when it starts.
func (s *Server) guestResize(ctx context.Context, target string, size int64) error {
	err := s.guest(ctx, http.MethodPost, target, spec.DirectResizePath, spec.DirectResize{Size: spec.Bytes(size)}, nil)
	if errors.Is(err, errNoGuest) {
		return nil
	}
	return err
}

// guest calls the DirectControl API of the pod that has the volume at target.
func (s *Server) guest(ctx context.Context, method, target, path string, in, out any) error {
	err := jsonhttp.Call(ctx, filepath.Join(s.config.DirectDir, spec.DirectSocket(target)), method, path, in, out)
	var refusal *jsonhttp.Refusal
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return errNoGuest
	case errors.Is(err, unix.ECONNREFUSED): // the socket is there as long as the pod
		return fmt.Errorf("guest at %s: who answers for its pod is starting again: try again", target)
	case errors.As(err, &refusal) && refusal.Code == http.StatusNotFound:
		return errNoGuest
	case errors.As(err, &refusal):
		var e spec.DirectError
		if json.Unmarshal(refusal.Body, &e) != nil || e.Message == "" {
			e.Message = refusal.Error()
		}
		return fmt.Errorf("guest at %s: %s", target, e.Message)
	case err != nil:
		return fmt.Errorf("guest at %s: %w", target, err)
	}
	return nil
}

// freezeTime is after how long a guest thaws by itself, should this process be killed meanwhile.
const freezeTime = 10 * time.Second

// hold freezes the file system that a guest has mounted, for as long as its blocks are copied; nil where no guest has the volume.
func (s *Server) hold(id string) volume.Hold {
	all, err := s.attached(id)
	if err == nil && (len(all) == 0 || all[0].Volume.Block == nil) {
		return nil
	}
	return func(ctx context.Context) (func() error, error) {
		if err != nil {
			return nil, err
		}
		f := &freeze{server: s, target: all[0].Target}
		if err := f.call(ctx); err != nil {
			s.config.Log.Warn("the guest's file system does not hold still; what is copied is as after a power cut", "volume", id, "error", err)
			return nil, err
		}
		ctx, cancel := context.WithCancel(ctx)
		var g sync.WaitGroup
		g.Go(func() { f.extend(ctx) })
		return func() error {
			cancel()
			g.Wait()
			return f.thaw()
		}, nil
	}
}

// A freeze of a guest's file system that may take longer than the guest waits for by itself: it is told again and again.
type freeze struct {
	server *Server
	target string
	asked  time.Time // when the last call began that the guest answered
	lapsed bool      // the guest may have thawed in between
}

func (f *freeze) call(ctx context.Context) error {
	began := time.Now()
	err := f.server.guest(ctx, http.MethodPost, f.target, spec.DirectFreezePath, spec.DirectFreeze{Timeout: spec.Duration(freezeTime)}, nil)
	if err != nil {
		return err
	}
	f.lapsed = f.lapsed || !f.asked.IsZero() && time.Since(f.asked) > freezeTime
	f.asked = began
	return nil
}

func (f *freeze) extend(ctx context.Context) {
	t := time.NewTicker(freezeTime / 4)
	defer t.Stop()
	for {
		select {
		case <-t.C:
			_ = f.call(ctx) // what comes of it, thaw tells
		case <-ctx.Done():
			return
		}
	}
}

func (f *freeze) thaw() error {
	ctx, cancel := context.WithTimeout(context.Background(), freezeTime) // whatever has become of the call that froze
	defer cancel()
	err := f.server.guest(ctx, http.MethodPost, f.target, spec.DirectThawPath, nil, nil)
	if err == nil && (f.lapsed || time.Since(f.asked) > freezeTime) {
		err = fmt.Errorf("guest at %s: its file system did not hold still for all of the time; try again", f.target)
	}
	return err
}
