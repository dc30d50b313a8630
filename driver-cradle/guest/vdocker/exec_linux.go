package vdocker

import (
	"context"
	"fmt"
	"net/http"

	"github.com/moby/moby/api/types/container"

	"github.com/cradlestack/cradlestack/driver-cradle/guest"
	"github.com/cradlestack/cradlestack/driver-cradle/guest/stdio"
	"github.com/cradlestack/cradlestack/internal/dockerhttp"
)

func (a *api) execCreate(w http.ResponseWriter, r *http.Request, c *guest.Container) error {
	var q container.ExecCreateRequest
	if err := dockerhttp.Decode(w, r, &q); err != nil {
		return err
	}
	if len(q.Cmd) == 0 {
		return dockerhttp.Invalid("no exec command specified")
	}
	if q.DetachKeys != "" {
		if _, err := detachKeys(r, q.DetachKeys); err != nil {
			return err
		}
	}
	cfg := guest.ExecConfig{
		Args: q.Cmd, Env: q.Env, User: q.User, WorkingDir: q.WorkingDir, TTY: q.Tty, OpenStdin: q.AttachStdin, Privileged: q.Privileged,
		AttachStdout: q.AttachStdout, AttachStderr: q.AttachStderr, DetachKeys: q.DetachKeys,
	}
	if q.ConsoleSize != nil {
		cfg.Rows, cfg.Cols = uint16(q.ConsoleSize[0]), uint16(q.ConsoleSize[1])
	}
	e, err := c.Exec(cfg)
	if err != nil {
		return err
	}
	return dockerhttp.Answer(w, http.StatusCreated, container.ExecCreateResponse{ID: e.ID()})
}

func (a *api) execStart(w http.ResponseWriter, r *http.Request) error {
	e, err := a.pod.LookupExec(r.PathValue("id"))
	if err != nil {
		return err
	}
	var q container.ExecStartRequest
	if err := dockerhttp.Decode(w, r, &q); err != nil {
		return err
	}
	if q.Detach {
		if err := startExec(r.Context(), e); err != nil {
			return err
		}
		w.WriteHeader(http.StatusOK)
		return nil
	}
	if s := e.State(); s.Started {
		return dockerhttp.NewError(http.StatusConflict, "exec command "+e.ID()+" is already running")
	}
	cfg := e.Config()
	keys, err := detachKeys(r, cfg.DetachKeys)
	if err != nil {
		return err
	}
	ctx, gone := context.WithCancelCause(context.WithoutCancel(r.Context()))
	defer gone(nil)
	return a.serveStreams(ctx, gone, w, r, e.IO(), streams{
		// As docker: how the stream is written is said by who starts the command, not by whether that has a terminal.
		attach: stdio.AttachOptions{Stream: true}, tty: q.Tty, keys: keys, stdin: cfg.OpenStdin, stdout: cfg.AttachStdout, stderr: cfg.AttachStderr,
		began:    func() error { return startExec(ctx, e) },
		detached: func() { e.Container().Emit("exec_detach", map[string]string{"execID": e.ID()}) },
		// A client asks for the exit code as soon as the stream has ended.
		finished: func(ctx context.Context) { _, _ = e.Wait(ctx) },
	})
}

// startExec says why a command can't run as docker does, which names the runtime.
func startExec(ctx context.Context, e *guest.Exec) error {
	err := e.Start(ctx)
	if err == nil || status(err) != http.StatusInternalServerError {
		return err
	}
	return fmt.Errorf("OCI runtime exec failed: exec failed: unable to start container process: %w", err)
}

func (a *api) execResize(w http.ResponseWriter, r *http.Request) error {
	e, err := a.pod.LookupExec(r.PathValue("id"))
	if err != nil {
		return err
	}
	rows, columns, err := size(r)
	if err != nil {
		return err
	}
	if err := e.Resize(rows, columns); err != nil {
		return err
	}
	w.WriteHeader(http.StatusOK)
	return nil
}

func (a *api) execInspect(w http.ResponseWriter, r *http.Request) error {
	e, err := a.pod.LookupExec(r.PathValue("id"))
	if err != nil {
		return err
	}
	cfg, state := e.Config(), e.State()
	out := container.ExecInspectResponse{
		ID: e.ID(), ContainerID: e.Container().Spec().ID, Running: state.Running, Pid: state.Pid, CanRemove: state.Started && !state.Running,
		OpenStdin: cfg.OpenStdin, OpenStdout: cfg.AttachStdout, OpenStderr: cfg.AttachStderr, DetachKeys: []byte(cfg.DetachKeys),
		ProcessConfig: &container.ExecProcessConfig{
			Tty: cfg.TTY, Entrypoint: cfg.Args[0], Arguments: cfg.Args[1:], User: cfg.User, Privileged: &cfg.Privileged,
		},
	}
	if state.Started && !state.Running {
		out.ExitCode = &state.ExitCode
	}
	return dockerhttp.Answer(w, http.StatusOK, out)
}
