package guest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/driver-cradle/wire"
)

// Version of the agent.
const Version = "1"

// Main is what this executable does: PID 1 of the VM; or, by the name it was started with, a stage or a container's init.
// handler answers everything that is not a control call. It does not return as PID 1.
func Main(args []string, handler func(*Pod) http.Handler) int {
	switch {
	case len(args) == 2 && args[0] == stageName:
		runStage(args[1])
	case len(args) > 2 && args[0] == initName && args[1] == "--":
		return runInit(args[2:])
	case os.Getpid() != 1:
		fmt.Fprintln(os.Stderr, "cradle-init: this is PID 1 of a pod's VM and nothing else")
		return 2
	}
	// Threads that change their namespaces end with their goroutine; the first one can't, so nothing else may run on it.
	runtime.LockOSThread()
	// With little garbage, collecting late costs less than collecting often; the limit keeps the agent inside its reserve.
	debug.SetGCPercent(400)
	debug.SetMemoryLimit(24 << 20)
	// Fixed, or Go looks for the cgroup's limit again and again.
	runtime.GOMAXPROCS(runtime.NumCPU())
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	log.Error("the agent can't go on", "error", serve(log, handler))
	// The end of PID 1 is a kernel panic: that ends the VM, with the reason above on its console.
	return 1
}

// serve boots the guest and serves its host, for ever or until the reason that it returns.
func serve(log *slog.Logger, handler func(*Pod) http.Handler) error {
	if err := leaveRootfs(); err != nil {
		return err
	}
	if err := mountSystem(); err != nil {
		return err
	}
	if err := loadModules(); err != nil {
		return err
	}
	if err := makePodCgroup(); err != nil {
		return err
	}
	if err := limitDevices(podCgroup, defaultDevices); err != nil {
		log.Warn("containers may use every device", "error", err) // a kernel without it boots pods all the same
	}
	tuneKernel()
	if err := takeDefaultLimits(); err != nil {
		return err
	}
	if err := makeBaseLayer(); err != nil {
		return err
	}
	if err := loopbackUp(); err != nil {
		return err
	}
	events, err := listenUevents()
	if err != nil {
		return err
	}
	pod := newPod(log, newChildren(), events)
	if err := mount("", "/", "", unix.MS_REC|unix.MS_SHARED, ""); err != nil {
		return err
	}
	if err := pod.parkStage(); err != nil {
		return fmt.Errorf("park a stage: %w", err)
	}
	port, err := wire.OpenPort()
	if err != nil {
		return err
	}
	if !connected(port) { // a template: nobody waits
		if err := pod.rehearse(handler); err != nil {
			log.Warn("rehearse a start", "error", err)
		}
	}
	// Not here: whoever is bound to a thread waits for two at every step.
	ended := make(chan error)
	go func() { ended <- attend(port, pod.server(handler)) }()
	return <-ended
}

// server answers a host process.
func (p *Pod) server(handler func(*Pod) http.Handler) *http.Server {
	s := &http.Server{Handler: p.routes(handler(p)), ErrorLog: slog.NewLogLogger(p.log.Handler(), slog.LevelWarn), Protocols: new(http.Protocols)}
	s.Protocols.SetHTTP1(true)
	return s
}

// attend serves one host process after the other, for ever or until the reason that it returns.
func attend(port *wire.Port, server *http.Server) error {
	for {
		// In a template, the guest is saved while it sleeps here.
		if err := port.Wait(); err != nil {
			return fmt.Errorf("wait for the host: %w", err)
		}
		var stillborn error
		session, err := wire.Accept(port, func(b *wire.Birth) error {
			stillborn = becomeIndividual(b)
			return stillborn
		})
		if stillborn != nil {
			return stillborn
		}
		if err != nil {
			continue // the host process went away
		}
		_ = server.Serve(session)
		session.Close()
	}
}

// connected says whether a host process has connected to the port.
func connected(port *wire.Port) bool {
	rc, err := port.SyscallConn()
	if err != nil {
		return false
	}
	up := false
	_ = rc.Control(func(fd uintptr) {
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		_, err := unix.Poll(fds, 0)
		up = err == nil && fds[0].Revents&unix.POLLHUP == 0
	})
	return up
}

// loadModules loads the modules that a distribution's kernel needs, in the order of their names.
func loadModules() error {
	files, err := filepath.Glob("/modules/*.ko")
	if err != nil {
		return err
	}
	for _, path := range files {
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		parameters := ""
		if strings.HasSuffix(path, "-dummy.ko") {
			parameters = "numdummies=0" // the command line's are for what is built in
		}
		err = unix.FinitModule(int(f.Fd()), parameters, 0)
		f.Close()
		if err != nil && !errors.Is(err, unix.EEXIST) {
			return &os.PathError{Op: "load module", Path: path, Err: err}
		}
	}
	return nil
}

// maxLaunch bounds a control call's body: 127 layers and hundreds of volumes are far below.
const maxLaunch = 16 << 20

// routes are the control calls of package wire; everything else is docker's.
func (p *Pod) routes(docker http.Handler) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("POST "+wire.PathLaunch, func(w http.ResponseWriter, r *http.Request) {
		l := new(wire.Launch)
		if err := decode(r, l); err != nil {
			answer(w, nil, err)
			return
		}
		err := p.start(r.Context(), l)
		if name := r.URL.Query().Get("attach"); err == nil && name != "" {
			attach := r.Clone(r.Context())
			attach.URL.Path = "/containers/" + name + "/attach"
			docker.ServeHTTP(w, attach)
			return
		}
		answer(w, p.Status(), err)
	})
	mux.HandleFunc("GET "+wire.PathStatus, func(w http.ResponseWriter, _ *http.Request) { answer(w, p.Status(), nil) })
	mux.HandleFunc("GET "+wire.PathWait, func(w http.ResponseWriter, r *http.Request) {
		s, err := p.Wait(r.Context())
		answer(w, s, err)
	})
	for path, call := range map[string]func(context.Context, StopOptions) (wire.Status, error){wire.PathStop: p.Stop, wire.PathShutdown: p.Shutdown} {
		mux.HandleFunc("POST "+path, func(w http.ResponseWriter, r *http.Request) {
			o := StopOptions{Signal: r.FormValue("signal")}
			var err error
			if o.Grace, err = parseGrace(r.FormValue("timeout")); err == nil && o.Signal != "" {
				_, err = ParseSignal(o.Signal)
			}
			if err != nil {
				answer(w, nil, err)
				return
			}
			s, err := call(r.Context(), o)
			answer(w, s, err)
		})
	}
	mux.HandleFunc("POST "+wire.PathJoin, func(w http.ResponseWriter, r *http.Request) {
		j := new(wire.Join)
		if err := decode(r, j); err != nil {
			answer(w, nil, err)
			return
		}
		s, err := p.join(r.Context(), j)
		answer(w, s, err)
	})
	mux.HandleFunc("POST "+wire.PathLeave, func(w http.ResponseWriter, r *http.Request) {
		answer(w, struct{}{}, p.leave(r.Context(), r.FormValue("container")))
	})
	mux.HandleFunc("GET "+wire.PathOutput, p.output)
	mux.HandleFunc("POST "+wire.PathFreeze, func(w http.ResponseWriter, r *http.Request) {
		timeout, err := parseGrace(r.FormValue("timeout"))
		if err == nil && timeout == nil {
			timeout = new(time.Duration)
		}
		if err == nil {
			err = p.Freeze(r.FormValue("volume"), *timeout)
		}
		answer(w, struct{}{}, err)
	})
	mux.HandleFunc("POST "+wire.PathThaw, func(w http.ResponseWriter, r *http.Request) {
		s, err := p.Thaw(r.FormValue("volume"))
		answer(w, s, err)
	})
	mux.HandleFunc("POST "+wire.PathGrow, func(w http.ResponseWriter, r *http.Request) {
		answer(w, struct{}{}, p.Grow(r.FormValue("volume")))
	})
	mux.HandleFunc("GET "+wire.PathUsage, func(w http.ResponseWriter, r *http.Request) {
		s, err := p.Usage(r.FormValue("volume"))
		answer(w, s, err)
	})
	mux.HandleFunc("GET "+wire.PathStats, func(w http.ResponseWriter, _ *http.Request) {
		s, err := p.Stats()
		answer(w, s, err)
	})
	mux.Handle("/cradle/", http.NotFoundHandler())
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasPrefix(r.URL.Path, "/cradle/") {
			mux.ServeHTTP(w, r)
			return
		}
		docker.ServeHTTP(w, r)
	})
}

// parseGrace reads a number of seconds; "" is nil.
func parseGrace(s string) (*time.Duration, error) {
	if s == "" {
		return nil, nil
	}
	n, err := strconv.ParseFloat(s, 64)
	if err != nil || !(n >= 0 && n <= math.MaxInt32) {
		return nil, &stateError{ErrInvalid, fmt.Sprintf("timeout %q is no number of seconds", s)}
	}
	d := time.Duration(n * float64(time.Second))
	return &d, nil
}

func decode(r *http.Request, v any) error {
	if err := json.NewDecoder(io.LimitReader(r.Body, maxLaunch)).Decode(v); err != nil {
		return &stateError{ErrInvalid, "request body: " + err.Error()}
	}
	return nil
}

// answer is docker's: JSON, an error as {"message": …}.
func answer(w http.ResponseWriter, v any, err error) {
	w.Header().Set("Content-Type", "application/json")
	if err != nil {
		status := http.StatusInternalServerError
		switch {
		case errors.Is(err, ErrInvalid):
			status = http.StatusBadRequest
		case errors.Is(err, ErrNotFound):
			status = http.StatusNotFound
		case errors.Is(err, ErrConflict), errors.Is(err, ErrNotRunning):
			status = http.StatusConflict
		}
		w.WriteHeader(status)
		v = map[string]string{"message": err.Error()}
	}
	_ = json.NewEncoder(w).Encode(v)
}
