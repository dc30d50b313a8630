package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/cradlestack/cradlestack/driver-cradle/pod"
	"github.com/cradlestack/cradlestack/driver-cradle/vmm"
	"github.com/cradlestack/cradlestack/driver-cradle/wire"
	"github.com/cradlestack/cradlestack/spec"
)

// A podStatus is what status shows; as JSON it is stable.
type podStatus struct {
	Directory  string                 `json:"directory"`
	ID         string                 `json:"id"`
	Name       string                 `json:"name"`
	State      string                 `json:"state"`              // created, starting, running, exited
	Attendant  int                    `json:"attendant,omitzero"` // process id of the kcradle that attends to it
	ExitCode   *int                   `json:"exitCode,omitempty"` // once it has exited
	Error      string                 `json:"error,omitempty"`
	Filling    *wire.Filling          `json:"filling,omitempty"` // what a start that takes its time is busy with
	StartedAt  time.Time              `json:"startedAt,omitzero"`
	EndedAt    time.Time              `json:"endedAt,omitzero"`
	Machine    *vmm.Info              `json:"machine,omitempty"`
	Containers []wire.ContainerStatus `json:"containers"`

	launch *spec.Launch
}

func (c *cli) statusCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:               "status DIR…",
		Aliases:           []string{"ps"},
		Short:             "show what a pod and its containers are doing",
		Args:              cobra.MinimumNArgs(1),
		ValidArgsFunction: completePods,
	}
	asJSON := outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		wantJSON, err := asJSON()
		if err != nil {
			return err
		}
		ctx, cancel := interruptible(cmd)
		defer cancel()
		var all []*podStatus
		for _, dir := range args {
			d, err := c.open(dir)
			if err != nil {
				return err
			}
			s, err := c.status(ctx, d)
			if err != nil {
				return err
			}
			all = append(all, s)
		}
		switch {
		case wantJSON && len(all) == 1:
			return c.printJSON(all[0])
		case wantJSON:
			return c.printJSON(all)
		}
		for i, s := range all {
			if i > 0 {
				fmt.Fprintln(c.stdout)
			}
			if err := c.printStatus(s); err != nil {
				return err
			}
		}
		return nil
	}
	return cmd
}

func (c *cli) status(ctx context.Context, d *pod.Dir) (*podStatus, error) {
	launch, err := d.Launch()
	if err != nil {
		return nil, err
	}
	s := &podStatus{Directory: d.Path(), ID: launch.ID, Name: launch.Name, State: wire.StateCreated, Containers: []wire.ContainerStatus{}, launch: launch}
	running, err := d.Running()
	if err != nil {
		return nil, err
	}
	if running {
		if err := c.liveStatus(ctx, d, s); err != nil || s.State != wire.StateCreated {
			return s, err
		}
	}
	r, err := d.Report()
	if errors.Is(err, pod.ErrNotStarted) {
		return s, nil
	}
	if err != nil {
		return nil, err
	}
	s.State, s.Containers, s.ExitCode = r.Status.State, r.Status.Containers, &r.Status.ExitCode
	s.Error, s.StartedAt, s.EndedAt = r.Status.Error, r.StartedAt, r.EndedAt
	if r.Failure != "" {
		s.Error = r.Failure
	}
	if r.Machine.PID != 0 {
		s.Machine = &r.Machine
	}
	return s, nil
}

// stateStarting is that of a pod whose guest has no containers yet: its volumes are being filled, or it takes its time.
const stateStarting = "starting"

// answerTimeout bounds how long a guest may take to say how it is.
const answerTimeout = 10 * time.Second

// liveStatus asks the guest. It leaves s as it is when the pod has ended, and is brought home.
func (c *cli) liveStatus(ctx context.Context, d *pod.Dir, s *podStatus) (err error) {
	pid, err := d.Attendant()
	if err != nil {
		return err
	}
	if pid != 0 {
		switch s.Filling, err = d.AwaitStart(ctx); {
		case errors.Is(err, pod.ErrNotRunning):
			return nil
		case errors.Is(err, pod.ErrUnsettled):
			if _, rerr := d.Report(); rerr == nil {
				return nil // it has ended, all but its clearing up
			}
			fallthrough
		case s.Filling != nil:
			s.State = stateStarting
			s.Attendant, err = d.Attendant()
			return err
		case err != nil:
			return err
		}
	}
	g, err := c.guestOf(ctx, d)
	if errors.Is(err, pod.ErrNotRunning) {
		return nil
	}
	if err != nil {
		return err
	}
	asked, cancel := context.WithTimeoutCause(ctx, answerTimeout,
		fmt.Errorf("the guest does not answer within %v: kcradle kill %s ends it", answerTimeout, d.Path()))
	defer cancel()
	var w wire.Status
	err = g.Call(asked, http.MethodGet, wire.PathStatus, nil, nil, &w)
	if err != nil {
		if !errors.Is(d.AwaitSettled(ctx), pod.ErrNotRunning) { // else it has ended just now
			return errors.Join(append([]error{fmt.Errorf("status of %s: %w", d.Path(), err)}, diskErrors(d)...)...)
		}
	}
	if err != nil || w.State == wire.StateExited {
		ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
		defer cancel()
		if err := d.AwaitEnd(ctx); err != nil {
			return fmt.Errorf("end of %s: %w", d.Path(), err)
		}
		return nil
	}
	s.State, s.Containers = wire.StateRunning, w.Containers
	if s.Attendant, err = d.Attendant(); err != nil {
		return err
	}
	if info, err := d.Machine(); err == nil {
		s.Machine, s.StartedAt = info, info.StartedAt
	}
	return nil
}

// diskErrors may be why a guest does not answer.
func diskErrors(d *pod.Dir) (errs []error) {
	info, err := d.Machine()
	if err != nil {
		return nil
	}
	for _, e := range info.DiskErrors {
		errs = append(errs, e)
	}
	return errs
}

func (c *cli) printStatus(s *podStatus) error {
	fmt.Fprintf(c.stdout, "pod %s (%s): %s", s.Name, s.ID[:12], s.State)
	switch {
	case s.ExitCode != nil:
		fmt.Fprintf(c.stdout, " %s ago with exit code %d", since0(s.EndedAt), *s.ExitCode)
	case s.State == wire.StateRunning:
		fmt.Fprintf(c.stdout, " for %s", since0(s.StartedAt))
	case s.Filling != nil:
		fmt.Fprintf(c.stdout, ": copying the image's content into volume %s, %v", s.Filling.Volume, mebibytes(s.Filling.Done))
		if s.Filling.Total > 0 {
			fmt.Fprintf(c.stdout, " of about %v", mebibytes(s.Filling.Total))
		}
	}
	fmt.Fprintln(c.stdout)
	if s.Error != "" {
		fmt.Fprintf(c.stdout, "error: %s\n", s.Error)
	}
	if m := s.Machine; m != nil {
		fmt.Fprintf(c.stdout, "machine: %v, %d cpu, %s, %s%s", m.Memory, m.CPUs, m.Accel, startWord(m.Start), reason(m.StartWhy))
		if s.State == wire.StateRunning {
			fmt.Fprintf(c.stdout, ", qemu %d, attended by %d", m.PID, s.Attendant)
		}
		fmt.Fprintln(c.stdout)
		for _, e := range m.DiskErrors {
			fmt.Fprintf(c.stdout, "%s ago: %v\n", since0(e.At), e)
		}
		for _, p := range m.Publish {
			fmt.Fprintf(c.stdout, "port: %s -> %d/%s\n", hostPort(p), p.Port, protocol(p))
		}
	}
	w := tabwriter.NewWriter(c.stdout, 0, 8, 3, ' ', 0)
	fmt.Fprintln(w, "CONTAINER\tID\tIMAGE\tSTATE\tSTARTS\tHEALTH\tEXIT CODE")
	for _, container := range s.launch.Containers {
		st := wire.ContainerStatus{State: wire.StateCreated}
		for _, o := range s.Containers {
			if o.Name == container.Name {
				st = o
			}
		}
		code := ""
		if st.State == wire.StateExited || st.State == wire.StateDead {
			code = strconv.Itoa(st.ExitCode)
			if st.OOMKilled {
				code += " (out of memory)"
			}
		}
		if st.Error != "" {
			code = strings.TrimSpace(code + " (" + st.Error + ")")
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%d\t%s\t%s\n", container.Name, container.ID[:12], container.Image.Reference, st.State, st.Starts, st.Health, code)
	}
	return w.Flush()
}

// mebibytes leaves out what nobody reads.
func mebibytes(n int64) spec.Bytes { return spec.Bytes(n >> 20 << 20) }

func startWord(start string) string {
	if start == vmm.Template {
		return "from a template"
	}
	return "cold boot"
}

func reason(s string) string {
	if s == "" {
		return ""
	}
	return " (" + s + ")"
}

func since0(t time.Time) string {
	d := time.Since(t)
	if d < time.Minute {
		return d.Round(time.Second).String()
	}
	return strings.TrimSuffix(d.Round(time.Minute).String(), "0s")
}

func hostPort(p spec.Publish) string {
	ip := p.HostIP
	if ip == "" {
		ip = "0.0.0.0"
	}
	if a, err := netip.ParseAddr(ip); err == nil {
		return netip.AddrPortFrom(a, p.HostPort).String()
	}
	return fmt.Sprintf("%s:%d", ip, p.HostPort)
}

func protocol(p spec.Publish) string {
	if p.Protocol == "" {
		return "tcp"
	}
	return p.Protocol
}
