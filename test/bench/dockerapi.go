package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/hashicorp/nomad/api"
	"golang.org/x/sync/errgroup"

	"github.com/cradlestack/cradlestack/internal/nomadtest"
	"github.com/cradlestack/cradlestack/test/programs"
)

const (
	logLines     = 1 << 20 // of 100 bytes each
	logLine      = "abcdefghijklmnopqrstuvwxyz0123456789abcdefghijklmnopqrstuvwxyz0123456789abcdefghijklmnopqrstuvwxyz0"
	listed       = 1000 // containers
	listedAtOnce = 8
)

// dockerAPI: the docker CLI in front of Nomad, beside dockerd.
func (b *bench) dockerAPI(ctx context.Context) (err error) {
	o := nomadtest.Options{Client: "gc_max_allocs = 1000"}
	if err := o.Cradle(""); err != nil {
		return err
	}
	c, err := nomadtest.Open(ctx, o)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.Close()) }()
	server, err := b.serveDockerAPI(ctx, c)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, server.close(c)) }()
	if err := b.daemonImage(ctx); err != nil {
		return err
	}
	both := func(measure func(context.Context, string) (time.Duration, error)) (ours, theirs time.Duration, err error) {
		m, err := b.interleave(ctx,
			func(ctx context.Context) (time.Duration, error) { return measure(ctx, server.host) },
			func(ctx context.Context) (time.Duration, error) { return measure(ctx, b.daemon.Host) })
		if err != nil {
			return 0, 0, err
		}
		return m[0], m[1], nil
	}
	compare := func(what string, ours, theirs time.Duration, atMost float64) {
		b.table.compare("Docker API: "+what, seconds(ours), "dockerd "+seconds(theirs), ratio(ours, theirs), atMost, 0)
	}

	run := func(ctx context.Context, host string) (time.Duration, error) {
		return docker(ctx, host, "run", "--rm", "busybox", "true")
	}
	if _, err := run(ctx, server.host); err != nil { // makes the template and converts the image
		return err
	}
	ours, theirs, err := both(run)
	if err != nil {
		return err
	}
	compare("`docker run --rm busybox true`", ours, theirs, 2)
	// Of a container that is removed at its end Nomad soon knows nothing.
	const kept = "kept"
	var all, placed, restored, inside []time.Duration
	for range b.rounds {
		begin := time.Now()
		took, err := docker(ctx, server.host, "run", "--name", kept, "busybox", "true")
		if err != nil {
			return err
		}
		// docker knows of the end from the pod, before Nomad does.
		var p parts
		if err := c.Wait(ctx, "the container's end", func(s *nomadtest.State) (ended bool) {
			p, ended = partsSince(s, begin)
			return ended
		}); err != nil {
			return err
		}
		ran, err := ranFor(ctx, server.host, kept)
		if err != nil {
			return err
		}
		all, placed, restored, inside = append(all, took), append(placed, p.placed), append(restored, p.restored), append(inside, ran)
		if _, err := docker(ctx, server.host, "rm", kept); err != nil {
			return err
		}
	}
	whole, before, machine, container := median(all), median(placed), median(restored), median(inside)
	b.table.report("the same without `--rm`", seconds(whole), "", "", false)
	b.table.report("of it: the docker CLI begins, the server writes its records, Nomad places the job", seconds(before), "", "", false)
	b.table.report("of it: Nomad's client prepares the task, the machine is restored", seconds(machine), "", "", false)
	b.table.report("of it: the container", seconds(container), "", "", false)
	b.table.report("of it: Nomad and the pod tell, the server lets the container go, its end is noted", seconds(whole-before-machine-container), "", "", false)

	for _, host := range []string{server.host, b.daemon.Host} {
		if _, err := docker(ctx, host, "run", "-d", "--name", "stays", "busybox", "sleep", "100000"); err != nil {
			return err
		}
	}
	if ours, theirs, err = both(func(ctx context.Context, host string) (time.Duration, error) {
		return docker(ctx, host, "exec", "stays", "true")
	}); err != nil {
		return err
	}
	compare("`docker exec true`", ours, theirs, 3)

	rounds := b.rounds
	defer func() { b.rounds = rounds }()
	b.rounds = min(rounds, copyRounds)
	file, back := filepath.Join(b.dir, "blob"), filepath.Join(b.dir, "back")
	if err := randomFile(file, copySize); err != nil {
		return err
	}
	defer os.Remove(file)
	if ours, theirs, err = both(func(ctx context.Context, host string) (time.Duration, error) {
		return docker(ctx, host, "cp", "-q", file, "stays:/blob")
	}); err != nil {
		return err
	}
	compare("`docker cp` of 256 MiB in", ours, theirs, 3)
	if ours, theirs, err = both(func(ctx context.Context, host string) (time.Duration, error) {
		return docker(ctx, host, "cp", "-q", "stays:/blob", back)
	}); err != nil {
		return err
	}
	compare("`docker cp` of 256 MiB out", ours, theirs, 3)
	if out, err := exec.CommandContext(ctx, "cmp", file, back).CombinedOutput(); err != nil {
		return fmt.Errorf("what came back differs: %s", out)
	}

	for _, host := range []string{server.host, b.daemon.Host} {
		if _, err := docker(ctx, host, "run", "--name", "says", "busybox", "sh", "-c", fmt.Sprintf("yes %s | head -n %d", logLine, logLines)); err != nil {
			return err
		}
	}
	if ours, theirs, err = both(logs); err != nil {
		return err
	}
	compare("`docker logs` of 100 MiB", ours, theirs, 2)

	for _, host := range []string{server.host, b.daemon.Host} {
		var all errgroup.Group
		all.SetLimit(listedAtOnce)
		for range listed {
			all.Go(func() error {
				_, err := docker(ctx, host, "create", "busybox", "true")
				return err
			})
		}
		if err := all.Wait(); err != nil {
			return err
		}
	}
	if ours, theirs, err = both(func(ctx context.Context, host string) (time.Duration, error) { return docker(ctx, host, "ps", "-a") }); err != nil {
		return err
	}
	compare(fmt.Sprintf("`docker ps -a` with %d containers", listed), ours, theirs, 2)
	return nil
}

// parts are times of a run: from its begin to its allocation, and from there to the pod's being there, by Nomad's events.
type parts struct{ placed, restored time.Duration }

// partsSince are those of the allocation that was made after begin; false where its task has not ended yet.
func partsSince(s *nomadtest.State, begin time.Time) (p parts, ended bool) {
	for _, a := range s.Allocs {
		if a.CreateTime < begin.UnixNano() {
			continue
		}
		for _, task := range a.TaskStates {
			var first int64
			for _, e := range task.Events {
				switch e.Type {
				case api.TaskStarted:
					first = e.Time
				case api.TaskTerminated:
					ended = true
				}
			}
			if first > 0 && ended {
				return parts{time.Duration(a.CreateTime - begin.UnixNano()), time.Duration(first - a.CreateTime)}, true
			}
		}
	}
	return p, false
}

// ranFor is how long a container that has ended ran.
func ranFor(ctx context.Context, host, name string) (time.Duration, error) {
	out, err := exec.CommandContext(ctx, "docker", "-H", host, "inspect", "-f", "{{.State.StartedAt}} {{.State.FinishedAt}}", name).Output()
	if err != nil {
		return 0, fmt.Errorf("docker inspect %s: %w", name, err)
	}
	from, to, _ := strings.Cut(strings.TrimSpace(string(out)), " ")
	begun, err := time.Parse(time.RFC3339Nano, from)
	if err != nil {
		return 0, err
	}
	ended, err := time.Parse(time.RFC3339Nano, to)
	return ended.Sub(begun), err
}

// logs reads all of a container's output, which it counts.
func logs(ctx context.Context, host string) (time.Duration, error) {
	begin := time.Now()
	cmd := exec.CommandContext(ctx, "docker", "-H", host, "logs", "says")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return 0, err
	}
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	n, err := io.Copy(io.Discard, out)
	if err := errors.Join(err, cmd.Wait()); err != nil {
		return 0, fmt.Errorf("docker logs: %w: %s", err, &stderr)
	}
	if want := int64(logLines * (len(logLine) + 1)); n != want {
		return 0, fmt.Errorf("docker logs: %d bytes, not %d", n, want)
	}
	return time.Since(begin), nil
}

// daemonImage gives dockerd busybox by the name that the server's layouts have it.
func (b *bench) daemonImage(ctx context.Context) error {
	image, err := busyboxImage()
	if err != nil {
		return err
	}
	return b.daemon.Load(ctx, "busybox:latest", image)
}

// A dockerServer is a running cradle-dockerapi.
type dockerServer struct {
	host string
	cmd  *exec.Cmd
}

func (b *bench) serveDockerAPI(ctx context.Context, c *nomadtest.Cluster) (*dockerServer, error) {
	program, err := programs.Path("cradle-dockerapi")
	if err != nil {
		return nil, err
	}
	busybox, err := programs.Image("busybox")
	if err != nil {
		return nil, err
	}
	socket := filepath.Join(b.dir, "api.sock")
	log, err := os.Create(filepath.Join(b.dir, "dockerapi.log"))
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd := c.Server().Command(context.WithoutCancel(ctx), program, "serve", "--socket", socket, "--image-layouts", filepath.Dir(busybox), "--pods", filepath.Join(c.Server().Dir, "cradle"))
	cmd.Env, cmd.Stderr = c.Env(), log
	if err := c.Server().Launch(cmd); err != nil {
		return nil, err
	}
	s := &dockerServer{host: "unix://" + socket, cmd: cmd}
	client := http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", socket)
	}, DisableKeepAlives: true}}
	ctx, cancel := context.WithTimeout(ctx, stepTimeout)
	defer cancel()
	for {
		answer, err := client.Get("http://docker/_ping")
		if err == nil {
			answer.Body.Close()
			return s, nil
		}
		if sleep(ctx, 20*time.Millisecond) != nil {
			text, _ := os.ReadFile(log.Name())
			return nil, errors.Join(fmt.Errorf("cradle-dockerapi does not answer: %w\n%s", err, text), s.cmd.Process.Kill(), s.cmd.Wait())
		}
	}
}

// close removes the containers that have been started, waits until their disks are gone, and ends the server.
func (s *dockerServer) close(c *nomadtest.Cluster) error {
	ctx, cancel := context.WithTimeout(context.Background(), nomadtest.Patience)
	defer cancel()
	out, err := exec.CommandContext(ctx, "docker", "-H", s.host, "ps", "-aq", "--filter", "name=^stays$", "--filter", "name=^says$", "--filter", "name=^kept$").Output()
	if ids := strings.Fields(string(out)); err == nil && len(ids) > 0 {
		_, err = docker(ctx, s.host, append([]string{"rm", "-f"}, ids...)...)
	}
	for left := 1; err == nil && left > 0; {
		var jobs []*api.JobListStub
		if jobs, _, err = c.API.Jobs().List(&api.QueryOptions{Prefix: "docker-"}); err == nil {
			if left = len(jobs); left > 0 {
				err = sleep(ctx, 100*time.Millisecond)
			}
		}
	}
	s.cmd.Process.Signal(os.Interrupt)
	return errors.Join(err, s.cmd.Wait())
}
