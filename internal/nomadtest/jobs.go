package nomadtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/hashicorp/nomad/api"

	"github.com/cradlestack/cradlestack/internal/agents"
	"github.com/cradlestack/cradlestack/test/programs"
)

// Run registers a job that is written in HCL and returns its id.
func (c *Cluster) Run(t testing.TB, hcl string) string {
	t.Helper()
	ctx, cancel := patient(t)
	defer cancel()
	id, err := c.run(ctx, hcl)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func (c *Cluster) run(ctx context.Context, hcl string) (id string, err error) {
	job, err := c.API.Jobs().ParseHCL(hcl, true)
	if err != nil {
		return "", fmt.Errorf("%w\n%s", err, hcl)
	}
	if _, _, err := c.API.Jobs().Register(job, (&api.WriteOptions{}).WithContext(ctx)); err != nil {
		return "", fmt.Errorf("register job %s: %w", *job.ID, err)
	}
	q := (&api.QueryOptions{}).WithContext(ctx)
	if job.Namespace != nil {
		q.Namespace = *job.Namespace
	}
	made, _, err := c.API.Jobs().Info(*job.ID, q)
	if err != nil {
		return "", fmt.Errorf("read job %s: %w", *job.ID, err)
	}
	c.made.Store(*job.ID, *made.CreateIndex)
	return *job.ID, nil
}

// of are a job's allocations without those of an earlier job by that name, which was purged, and of whose end the watch may not have heard yet.
func (c *Cluster) of(s *State, job string) []*api.AllocationListStub {
	since, _ := c.made.Load(job)
	index, _ := since.(uint64)
	return slices.DeleteFunc(s.Of(job), func(a *api.AllocationListStub) bool { return a.CreateIndex < index })
}

// RunVolumes is Volumes for a test.
func (c *Cluster) RunVolumes(t testing.TB) {
	t.Helper()
	ctx, cancel := patient(t)
	defer cancel()
	if err := c.Volumes(ctx); err != nil {
		t.Fatal(err)
	}
}

// Volumes runs the volumes' plugin on the server's node as its example says, and returns when volumes can be made.
func (c *Cluster) Volumes(ctx context.Context) error {
	root, err := programs.Root()
	if err != nil {
		return err
	}
	text, err := os.ReadFile(filepath.Join(root, "examples/nomad/volumes/cradle-csi.nomad.hcl"))
	if err != nil {
		return err
	}
	dir := c.Server().Dir
	if _, err := c.run(ctx, strings.NewReplacer("/usr/local/bin/cradle-csi", filepath.Join(root, "bin/cradle-csi"),
		"/var/lib/cradle/volumes", filepath.Join(dir, "volumes"), "/var/lib/nomad", filepath.Join(dir, "nomad")).Replace(string(text))); err != nil {
		return err
	}
	return agents.Retry(ctx, "a healthy plugin of volumes", func() error {
		p, _, err := c.API.CSIPlugins().Info("cradle", (&api.QueryOptions{}).WithContext(ctx))
		if err == nil && (p.ControllersHealthy != 1 || p.NodesHealthy != 1) {
			err = fmt.Errorf("%d controllers, %d nodes", p.ControllersHealthy, p.NodesHealthy)
		}
		return err
	})
}

// Stop stops a job and waits until all of it has ended.
func (c *Cluster) Stop(t testing.TB, job string) {
	t.Helper()
	if _, _, err := c.API.Jobs().Deregister(job, false, nil); err != nil {
		t.Fatalf("stop job %s: %v", job, err)
	}
	c.Until(t, "the end of job "+job, func(s *State) bool {
		for _, a := range s.Of(job) {
			if !Ended(a) && !neverBegun(a) {
				return false
			}
		}
		return true
	})
}

// neverBegun says whether an allocation was called off before its client had heard of it.
func neverBegun(a *api.AllocationListStub) bool {
	return a.ClientStatus == api.AllocClientStatusPending && a.DesiredStatus != api.AllocDesiredStatusRun && len(a.TaskStates) == 0
}

// CLI runs Nomad's command line, which has to succeed, and returns what it prints on standard output.
func (c *Cluster) CLI(t testing.TB, args ...string) string {
	t.Helper()
	stdout, stderr, code := c.TryCLI(t, "", args...)
	if code != 0 {
		t.Fatalf("nomad %s: exit code %d\n%s%s\n%s", strings.Join(args, " "), code, stdout, stderr, c.Describe())
	}
	return stdout
}

// TryCLI runs Nomad's command line with some standard input.
func (c *Cluster) TryCLI(t testing.TB, stdin string, args ...string) (stdout, stderr string, code int) {
	t.Helper()
	ctx, cancel := patient(t)
	defer cancel()
	cmd := c.Server().Command(ctx, c.nomad, args...)
	cmd.Env = c.Env()
	cmd.Stdin = strings.NewReader(stdin)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := c.Server().Launch(cmd)
	if err == nil {
		err = cmd.Wait()
	}
	if err != nil && !errors.As(err, new(*exec.ExitError)) {
		t.Fatalf("nomad %s: %v\n%s%s", strings.Join(args, " "), err, &out, &errs)
	}
	if ctx.Err() != nil {
		t.Fatalf("nomad %s does not end\n%s%s", strings.Join(args, " "), &out, &errs)
	}
	return out.String(), errs.String(), cmd.ProcessState.ExitCode()
}

// UntilAnswers waits until the server can ask an allocation's client, which may have just been started again.
func (c *Cluster) UntilAnswers(t testing.TB, alloc string) {
	t.Helper()
	ctx, cancel := patient(t)
	defer cancel()
	err := agents.Retry(ctx, "an answer from the client", func() error {
		_, _, err := c.API.AllocFS().List(&api.Allocation{ID: alloc}, "/", (&api.QueryOptions{}).WithContext(ctx))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// Logs is all that a task has written so far, kind being stdout or stderr.
func (c *Cluster) Logs(t testing.TB, alloc, task, kind string) string {
	t.Helper()
	return c.logs(t, alloc, task, kind, false, func(string) bool { return false })
}

// UntilLogs follows a task's output until f holds of all of it.
func (c *Cluster) UntilLogs(t testing.TB, alloc, task, kind string, f func(string) bool) string {
	t.Helper()
	return c.logs(t, alloc, task, kind, true, f)
}

// UntilLogsHave follows a task's output until it contains a text.
func (c *Cluster) UntilLogsHave(t testing.TB, alloc, task, kind, text string) string {
	t.Helper()
	return c.UntilLogs(t, alloc, task, kind, func(all string) bool { return strings.Contains(all, text) })
}

func (c *Cluster) logs(t testing.TB, alloc, task, kind string, follow bool, enough func(string) bool) string {
	t.Helper()
	ctx, cancel := patient(t)
	defer cancel()
	a, _, err := c.API.Allocations().Info(alloc, nil)
	if err != nil {
		t.Fatal(err)
	}
	frames, errs := c.API.AllocFS().Logs(a, follow, task, kind, api.OriginStart, 0, ctx.Done(), (&api.QueryOptions{}).WithContext(ctx))
	var all strings.Builder
	for !enough(all.String()) {
		select {
		case f, ok := <-frames:
			if !ok {
				if follow {
					t.Fatalf("the %s of task %s ended with\n%s", kind, task, &all)
				}
				return all.String()
			}
			all.Write(f.Data)
		case err := <-errs:
			if err == nil || errors.Is(err, io.EOF) {
				errs = nil
				continue
			}
			t.Fatalf("%s of task %s: %v", kind, task, err)
		case <-ctx.Done():
			t.Fatalf("the %s of task %s is still\n%s\n%s", kind, task, &all, c.Describe())
		}
	}
	return all.String()
}

// Begin takes down what is there; when the test has ended, so have all jobs, and what is left of them fails it. Start does it for its test.
func (c *Cluster) Begin(t testing.TB) {
	t.Helper()
	end, err := c.Mark()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() { // while there is something to be seen
			t.Log(c.Describe())
		}
		if err := end(); err != nil {
			t.Error(err)
		}
	})
}

// Mark takes down what is there. end ends all jobs and, once Nomad has had the time to clear away, tells what is left of them. To close the cluster at
// once would stop Nomad in the middle of that.
func (c *Cluster) Mark() (end func() error, err error) {
	before := make([]inventory, len(c.Nodes))
	for i, n := range c.Nodes {
		if before[i], err = n.inventory(); err != nil {
			return nil, err
		}
	}
	return func() error {
		ctx, cancel := context.WithTimeout(context.Background(), Patience)
		defer cancel()
		if err := c.Settle(ctx); err != nil {
			return fmt.Errorf("end of jobs: %w", err)
		}
		var errs []error
		for i, n := range c.Nodes {
			errs = append(errs, n.remains(before[i]))
		}
		return errors.Join(errs...)
	}, nil
}

// Settle ends every job, starts agents that are down, and lets Nomad collect its garbage.
func (c *Cluster) Settle(ctx context.Context) error {
	for _, n := range c.Nodes {
		select {
		case <-n.gone:
			if err := n.Boot(); err != nil {
				return err
			}
		default:
			if err := n.startAgents(ctx); err != nil {
				return err
			}
		}
	}
	q := (&api.QueryOptions{Namespace: api.AllNamespacesNamespace}).WithContext(ctx)
	var jobs []*api.JobListStub
	if err := agents.Retry(ctx, "list jobs", func() (err error) { jobs, _, err = c.API.Jobs().List(q); return err }); err != nil {
		return err
	}
	if err := c.watch.reopen(ctx); err != nil {
		return err
	}
	// Purging forgets allocations before they have ended.
	if err := c.deregister(ctx, jobs, false); err != nil {
		return err
	}
	err := c.Wait(ctx, "ready nodes and the end of all allocations", func(s *State) bool {
		for _, n := range c.Clients() {
			if !s.ready(n, nil) {
				return false
			}
		}
		for _, a := range s.Allocs {
			if !Ended(a) && !neverBegun(a) {
				return false
			}
		}
		return true
	})
	if err != nil {
		return err
	}
	if err := c.deregister(ctx, jobs, true); err != nil {
		return err
	}
	var ids []string
	c.watch.look(func(s *State) bool {
		for _, n := range c.Clients() {
			ids = append(ids, s.Node(n.Name).ID)
		}
		return true
	})
	for _, id := range ids {
		err := agents.Retry(ctx, "garbage collection of node "+id, func() error { // the server may not have heard of a client that was just started again
			if err := c.API.Nodes().GC(id, nil); !errors.Is(err, io.EOF) { // the answer is empty
				return err
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return c.API.System().GarbageCollect()
}

func (c *Cluster) deregister(ctx context.Context, jobs []*api.JobListStub, purge bool) error {
	for _, j := range jobs {
		if _, _, err := c.API.Jobs().Deregister(j.ID, purge, (&api.WriteOptions{Namespace: j.Namespace}).WithContext(ctx)); err != nil {
			return fmt.Errorf("stop job %s: %w", j.ID, err)
		}
	}
	return nil
}
