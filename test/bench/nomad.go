package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/hashicorp/nomad/api"

	"github.com/cradlestack/cradlestack/internal/nomadtest"
	"github.com/cradlestack/cradlestack/test/programs"
)

// nomad: pods as tasks of Nomad's, beside kcradle.
func (b *bench) nomad(ctx context.Context, crowd, many int) (err error) {
	o := nomadtest.Options{Client: "gc_max_allocs = 1000"}
	if err := o.Cradle(""); err != nil {
		return err
	}
	c, err := nomadtest.Open(ctx, o)
	if err != nil {
		return err
	}
	end, err := c.Mark()
	if err != nil {
		return errors.Join(err, c.Close())
	}
	defer func() { err = errors.Join(err, end(), c.Close()) }()
	jobs := 0
	echo := func(ctx context.Context) (time.Duration, error) {
		jobs++
		return b.firstLog(ctx, c, fmt.Sprintf("echo-%d", jobs), 1, "echo", "hello")
	}
	if _, err := echo(ctx); err != nil { // makes the template and converts the image
		return err
	}
	m, err := b.interleave(ctx, echo, func(ctx context.Context) (time.Duration, error) { return b.echoAs(ctx, asNomads, "auto", "") })
	if err != nil {
		return err
	}
	b.table.compare("Nomad: a job's registration to its first log byte", seconds(m[0]), "`kcradle run` "+seconds(m[1]), ratio(m[0], m[1]), 1.6, 0)

	stay := []string{"sh", "-c", "echo up; exec sleep 100000"}
	took, err := b.firstLog(ctx, c, "crowd", crowd, stay...)
	if err != nil {
		return err
	}
	if err := c.Settle(ctx); err != nil {
		return err
	}
	beside, pods, err := b.together(ctx, asNomads, crowd)
	if err := errors.Join(err, b.stopAll(pods)); err != nil {
		return err
	}
	b.table.compare(fmt.Sprintf("Nomad: %d jobs registered at once, to the last one's first log byte", crowd), seconds(took),
		fmt.Sprintf("%d × `kcradle run` %s", crowd, seconds(beside)), ratio(took, beside), 1.5, 0)

	without, err := driverMemory(c)
	if err != nil {
		return err
	}
	if _, err := b.firstLog(ctx, c, "many", many, stay...); err != nil {
		return err
	}
	with, err := driverMemory(c)
	if err != nil {
		return err
	}
	b.table.report(fmt.Sprintf("Nomad: the driver's proportional memory with %d pods", many), mib(with), "without "+mib(without), "", false)
	return nil
}

// firstLog registers jobs at once and waits for each one's output. The time is that from before the first registration to when the last log was first
// written, by the log files' own times: they are written once.
func (b *bench) firstLog(ctx context.Context, c *nomadtest.Cluster, name string, n int, command ...string) (time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, nomadtest.Patience)
	defer cancel()
	image, err := programs.Image("busybox")
	if err != nil {
		return 0, err
	}
	all := make([]*api.Job, n)
	for i := range all {
		all[i] = api.NewBatchJob(fmt.Sprintf("%s-%d", name, i), fmt.Sprintf("%s-%d", name, i), "global", 50).AddTaskGroup(
			api.NewTaskGroup("g", 1).AddTask(api.NewTask("t", "cradle").
				SetConfig("image", "oci:"+image).SetConfig("entrypoint", command[:1]).SetConfig("args", command[1:]).
				Require(&api.Resources{CPU: ptr(20), MemoryMB: ptr(64)})))
	}
	begin := time.Now()
	for _, job := range all {
		if _, _, err := c.API.Jobs().Register(job, (&api.WriteOptions{}).WithContext(ctx)); err != nil {
			return 0, err
		}
	}
	allocs := map[string]string{}
	err = c.Wait(ctx, fmt.Sprintf("%d jobs that run", n), func(s *nomadtest.State) bool {
		for _, job := range all {
			of := s.Of(*job.ID)
			if len(of) == 0 || of[0].ClientStatus == api.AllocClientStatusPending {
				return false
			}
			allocs[*job.ID] = of[0].ID
		}
		return true
	})
	if err != nil {
		return 0, err
	}
	var last time.Duration
	for _, id := range allocs {
		file := filepath.Join(c.Clients()[0].Dir, "nomad", "alloc", id, "alloc", "logs", "t.stdout.0")
		for {
			info, err := os.Stat(file)
			if err == nil && info.Size() > 0 {
				last = max(last, info.ModTime().Sub(begin))
				break
			}
			if err := sleep(ctx, 10*time.Millisecond); err != nil {
				return 0, fmt.Errorf("%s: no output: %w\n%s", file, err, c.Describe())
			}
		}
	}
	return last, nil
}

func ptr[T any](v T) *T { return &v }

// driverMemory is that of the plugin's process alone: machines are counted elsewhere.
func driverMemory(c *nomadtest.Cluster) (int64, error) {
	all, err := c.Clients()[0].Processes()
	if err != nil {
		return 0, err
	}
	for _, p := range all {
		if strings.HasSuffix(p.Args[0], "/nomad-driver-cradle") {
			return pss([]int{p.PID})
		}
	}
	return 0, errors.New("no plugin runs")
}
