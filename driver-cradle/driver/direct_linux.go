package driver

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/cradlestack/cradlestack/driver-cradle/pod"
	"github.com/cradlestack/cradlestack/driver-cradle/vmm"
	"github.com/cradlestack/cradlestack/spec"
)

// directDir is where records of volumes are that the node's CSI plugin leaves to guests. Tests have their own.
var directDir = spec.DirectDir

// findDirect reads the record of the volume that is published at a path; nil where there is none.
func findDirect(target string) (*spec.DirectAttachment, error) {
	path := filepath.Join(directDir, spec.DirectFile(target))
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, spec.MaxDocument))
	if err != nil {
		return nil, err
	}
	d, err := spec.ParseDirectAttachment(path, data)
	if err != nil {
		return nil, err
	}
	if d.Target != filepath.Clean(target) {
		return nil, fmt.Errorf("%s: it tells of %s, not of %s", path, d.Target, target)
	}
	return d, nil
}

// An attachment is a volume that the pod of a task has attached itself: what is kept of its record.
type attachment struct {
	Volume  string        `json:"volume"` // its name in the pod
	ID      string        `json:"id"`     // the CSI plugin's
	Path    string        `json:"path,omitempty"`
	Raw     bool          `json:"raw,omitempty"`
	Limits  spec.IOLimits `json:"limits,omitzero"`
	Control string        `json:"control"`
}

// controls serve the control sockets of a pod's attachments. A socket's file is there from the start of the pod to its end, also while no process answers
// on it: who calls then is refused, and not told that there is no pod.
type controls struct {
	servers []*http.Server
	stop    context.CancelFunc
	work    sync.WaitGroup
}

// serveControls begins to answer. What has grown while nobody could be told is made up for.
func serveControls(r *pod.Running, all []attachment, log *slog.Logger) (*controls, error) {
	ctx, stop := context.WithCancel(context.Background())
	c := &controls{stop: stop}
	for _, a := range all {
		l, err := listenControl(a.Control)
		if err != nil {
			c.close()
			return nil, fmt.Errorf("control socket of volume %s: %w", a.ID, err)
		}
		s := &http.Server{Handler: a.handler(r, log), ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug)}
		c.servers = append(c.servers, s)
		c.work.Go(func() { _ = s.Serve(l) }) // until close
		if a.Path != "" {
			c.work.Go(func() { a.catchUp(ctx, r, log) })
		}
	}
	return c, nil
}

// listenControl makes a socket in place of one that a killed process has left.
func listenControl(path string) (net.Listener, error) {
	fresh := path + ".new"
	if err := os.Remove(fresh); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: fresh, Net: "unix"})
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false)
	if err = os.Chmod(fresh, 0o600); err == nil {
		err = os.Rename(fresh, path)
	}
	if err != nil {
		return nil, errors.Join(err, l.Close(), os.Remove(fresh))
	}
	return l, nil
}

// close ends the answering. The sockets stay.
func (c *controls) close() {
	if c == nil {
		return
	}
	c.stop()
	for _, s := range c.servers {
		s.Close()
	}
	c.work.Wait()
}

// removeControls removes the sockets of a pod that has ended.
func removeControls(all []attachment) error {
	var errs []error
	for _, a := range all {
		for _, path := range []string{a.Control, a.Control + ".new"} {
			if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
				errs = append(errs, err)
			}
		}
	}
	return errors.Join(errs...)
}

// catchUp grows a volume that was grown before the pod started, or while there was no plugin process. It tries again where that is not possible yet: a file
// system that is frozen does not grow.
func (a *attachment) catchUp(ctx context.Context, r *pod.Running, log *slog.Logger) {
	for wait := time.Second; ; wait = min(2*wait, time.Minute) {
		size, err := sizeOf(a.Path)
		if err == nil {
			limited, cancel := context.WithTimeout(ctx, callTimeout)
			err = r.Resize(limited, a.Volume, spec.Bytes(size), a.Raw)
			cancel()
		}
		if err == nil || ctx.Err() != nil {
			return
		}
		log.Warn("the volume may be smaller in the guest than it is", "volume", a.ID, "error", err)
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return
		}
	}
}

func sizeOf(path string) (int64, error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	return f.Seek(0, io.SeekEnd)
}

// maxControl bounds what is read of a call.
const maxControl = 64 << 10

// handler is the DirectControl API of package spec.
func (a *attachment) handler(r *pod.Running, log *slog.Logger) http.Handler {
	mux := http.NewServeMux()
	handle := func(pattern string, call func(ctx context.Context, body *json.Decoder) (any, error)) {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, req *http.Request) {
			ctx, cancel := context.WithTimeoutCause(req.Context(), callTimeout, fmt.Errorf("the guest did not answer within %v", callTimeout))
			defer cancel()
			body := json.NewDecoder(io.LimitReader(req.Body, maxControl))
			body.DisallowUnknownFields()
			out, err := call(ctx, body)
			if err != nil && ctx.Err() != nil {
				err = context.Cause(ctx)
			}
			if log := log.With("volume", a.ID, "call", req.URL.Path); err != nil {
				log.Debug("volume is not controlled", "error", err)
			} else {
				log.Debug("volume is controlled")
			}
			answerControl(w, out, err)
		})
	}
	noFiles := &pod.GuestError{Code: http.StatusNotFound, Message: "the volume is attached raw: the guest has mounted no file system of it"}
	files := func(call func(ctx context.Context, body *json.Decoder) (any, error)) func(context.Context, *json.Decoder) (any, error) {
		if a.Raw {
			return func(context.Context, *json.Decoder) (any, error) { return nil, noFiles }
		}
		return call
	}
	handle("POST "+spec.DirectFreezePath, files(func(ctx context.Context, body *json.Decoder) (any, error) {
		var f spec.DirectFreeze
		if err := decodeControl(body, &f); err != nil {
			return nil, err
		}
		if f.Timeout <= 0 {
			return nil, &pod.GuestError{Code: http.StatusBadRequest, Message: "timeout: is missing: a freeze has an end"}
		}
		return nil, r.Freeze(ctx, a.Volume, time.Duration(f.Timeout))
	}))
	handle("POST "+spec.DirectThawPath, files(func(ctx context.Context, _ *json.Decoder) (any, error) {
		return nil, r.Thaw(ctx, a.Volume)
	}))
	handle("GET "+spec.DirectStatsPath, files(func(ctx context.Context, _ *json.Decoder) (any, error) {
		return r.Usage(ctx, a.Volume)
	}))
	handle("POST "+spec.DirectResizePath, func(ctx context.Context, body *json.Decoder) (any, error) {
		var s spec.DirectResize
		if err := decodeControl(body, &s); err != nil {
			return nil, err
		}
		return nil, r.Resize(ctx, a.Volume, s.Size, a.Raw)
	})
	handle("POST "+spec.DirectThrottlePath, func(ctx context.Context, body *json.Decoder) (any, error) {
		var l spec.IOLimits
		if err := decodeControl(body, &l); err != nil {
			return nil, err
		}
		if l.IOPS < 0 || l.Bandwidth < 0 {
			return nil, &pod.GuestError{Code: http.StatusBadRequest, Message: "limits are below 0: leave them out for none"}
		}
		return nil, r.Throttle(ctx, a.Volume, l)
	})
	return mux
}

func decodeControl(body *json.Decoder, into any) error {
	if err := body.Decode(into); err != nil {
		return &pod.GuestError{Code: http.StatusBadRequest, Message: "the call's body: " + err.Error()}
	}
	return nil
}

func answerControl(w http.ResponseWriter, out any, err error) {
	w.Header().Set("Content-Type", "application/json")
	var refused *pod.GuestError
	code := http.StatusInternalServerError
	switch {
	case err == nil && out == nil:
		w.WriteHeader(http.StatusNoContent)
		return
	case err == nil:
		_ = json.NewEncoder(w).Encode(out) // whoever asked may be gone
		return
	case errors.As(err, &refused):
		code = refused.Code
	case errors.Is(err, pod.ErrNotFrozen):
		code = http.StatusConflict
	case errors.Is(err, vmm.ErrShrink):
		code = http.StatusBadRequest
	}
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(spec.DirectError{Message: err.Error()})
}
