// Command agent is cradle-init with a handler in docker's place that lets tests use package guest's API from outside of the VM.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/cradlestack/cradlestack/driver-cradle/guest"
	"github.com/cradlestack/cradlestack/driver-cradle/guest/stdio"
)

func main() { os.Exit(guest.Main(os.Args, handler)) }

func handler(p *guest.Pod) http.Handler {
	mux := http.NewServeMux()
	handle := func(path string, f func(ctx context.Context, c *guest.Container, r *http.Request) (any, error)) {
		mux.HandleFunc(path, func(w http.ResponseWriter, r *http.Request) {
			c, err := p.Lookup(r.FormValue("c"))
			var v any
			if err == nil {
				v, err = f(r.Context(), c, r)
			}
			if err != nil {
				w.WriteHeader(http.StatusConflict)
				v = map[string]string{"message": err.Error()}
			}
			json.NewEncoder(w).Encode(v)
		})
	}
	mux.HandleFunc("POST /panic", func(_ http.ResponseWriter, r *http.Request) {
		if r.FormValue("in") == "handler" {
			panic("in a handler")
		}
		go func() { panic("in the background") }()
	})
	handle("GET /logs", func(ctx context.Context, c *guest.Container, r *http.Request) (any, error) {
		var stdout, stderr bytes.Buffer
		err := c.IO().ReadLogs(ctx, stdio.LogOptions{Stdout: &stdout, Stderr: &stderr, Tail: -1})
		return [2]string{stdout.String(), stderr.String()}, err
	})
	handle("GET /state", func(_ context.Context, c *guest.Container, _ *http.Request) (any, error) { return c.State(), nil })
	handle("GET /pids", func(_ context.Context, c *guest.Container, _ *http.Request) (any, error) { return c.Pids() })
	handle("POST /do", func(ctx context.Context, c *guest.Container, r *http.Request) (any, error) {
		signal := r.FormValue("signal")
		var timeout *time.Duration
		if t := r.FormValue("timeout"); t != "" {
			d, err := time.ParseDuration(t)
			if err != nil {
				return nil, err
			}
			timeout = &d
		}
		switch r.FormValue("op") {
		case "start":
			return nil, c.Start(ctx)
		case "stop":
			return nil, c.Stop(ctx, signal, timeout)
		case "restart":
			return nil, c.Restart(ctx, signal, timeout)
		case "pause":
			return nil, c.Pause()
		case "unpause":
			return nil, c.Unpause()
		case "kill":
			sig, err := guest.ParseSignal(signal)
			if err != nil {
				return nil, err
			}
			return nil, c.Kill(sig)
		case "resize":
			return nil, c.Resize(33, 77)
		case "read":
			data, err := os.ReadFile(c.Rootfs() + r.FormValue("path"))
			return string(data), err
		}
		return nil, errors.New("no such op")
	})
	handle("GET /wait", func(ctx context.Context, c *guest.Container, r *http.Request) (any, error) {
		code, msg, err := c.Wait(ctx, r.FormValue("condition"))
		return map[string]any{"Code": code, "Message": msg}, err
	})
	handle("GET /events", func(_ context.Context, c *guest.Container, _ *http.Request) (any, error) {
		past, _, cancel := p.Subscribe(time.Unix(0, 1))
		cancel()
		var actions []string
		for _, e := range past {
			if e.ID == c.Spec().ID {
				actions = append(actions, e.Action)
			}
		}
		return actions, nil
	})
	handle("POST /attach", func(ctx context.Context, c *guest.Container, r *http.Request) (any, error) {
		var out, errs bytes.Buffer
		stdin := strings.NewReader(r.FormValue("stdin"))
		err := c.IO().Attach(ctx, stdio.AttachOptions{Stdin: closer{stdin}, Stdout: &out, Stderr: &errs, Logs: true, Stream: true})
		return [2]string{out.String(), errs.String()}, err
	})
	handle("POST /exec", func(ctx context.Context, c *guest.Container, r *http.Request) (any, error) {
		var cfg guest.ExecConfig
		if err := json.Unmarshal([]byte(r.FormValue("config")), &cfg); err != nil {
			return nil, err
		}
		stdin := r.FormValue("stdin")
		cfg.OpenStdin = stdin != ""
		e, err := c.Exec(cfg)
		if err != nil {
			return nil, err
		}
		var out, errs bytes.Buffer
		attached, ended := make(chan struct{}), make(chan error, 1)
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		go func() {
			a := stdio.AttachOptions{Stdout: &out, Stderr: &errs, Stream: true, Attached: func() error { close(attached); return nil }}
			if stdin != "" {
				a.Stdin = closer{strings.NewReader(stdin)}
			}
			ended <- e.IO().Attach(ctx, a)
		}()
		<-attached
		begin := time.Now()
		if err := e.Start(ctx); err != nil {
			return map[string]any{"Code": e.State().ExitCode, "Error": err.Error()}, nil
		}
		started := time.Since(begin)
		code, err := e.Wait(ctx)
		if err != nil {
			return nil, err
		}
		<-ended
		return map[string]any{"Code": code, "Stdout": out.String(), "Stderr": errs.String(), "Started": started.String(), "Took": strconv.Itoa(int(time.Since(begin).Microseconds()))}, nil
	})
	return mux
}

type closer struct{ *strings.Reader }

func (closer) Close() error { return nil }
