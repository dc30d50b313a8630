package stack

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/hashicorp/nomad/api"

	"github.com/cradlestack/cradlestack/internal/agents"
	"github.com/cradlestack/cradlestack/test/programs"
)

// volumesJob is the job of examples/nomad/volumes that is the volumes' plugin, and the plugin's id.
const (
	volumesJob    = "cradle-csi"
	volumesPlugin = "cradle"
)

// upVolumes runs the volumes' plugin, as its example does, and waits until volumes can be made.
func (s *Stack) upVolumes(ctx context.Context, _ agents.Config) error {
	root, err := programs.Root()
	if err != nil {
		return err
	}
	program, err := programs.Path("cradle-csi")
	if err != nil {
		return err
	}
	text, err := os.ReadFile(filepath.Join(root, "examples", "nomad", "volumes", "cradle-csi.nomad.hcl"))
	if err != nil {
		return err
	}
	client, err := s.API()
	if err != nil {
		return err
	}
	here := strings.NewReplacer("/usr/local/bin/cradle-csi", program, "/var/lib/cradle/volumes", filepath.Join(s.dir, "volumes"), "/var/lib/nomad", filepath.Join(s.dir, "nomad"))
	job, err := client.Jobs().ParseHCL(here.Replace(string(text)), false)
	if err != nil {
		return fmt.Errorf("job %s: %w", volumesJob, err)
	}
	if _, _, err := client.Jobs().Register(job, (&api.WriteOptions{}).WithContext(ctx)); err != nil {
		return fmt.Errorf("job %s: %w", volumesJob, err)
	}
	return agents.Retry(ctx, "the volumes' plugin", func() error {
		p, _, err := client.CSIPlugins().Info(volumesPlugin, (&api.QueryOptions{}).WithContext(ctx))
		if err == nil && (p.ControllersHealthy == 0 || p.NodesHealthy == 0) {
			err = errors.New("it is not healthy yet")
		}
		return err
	})
}

// endVolumes ends the volumes' plugin when nobody has a volume any more.
func (s *Stack) endVolumes(ctx context.Context, client *api.Client, node string) error {
	if err := agents.Retry(ctx, "end of the jobs with volumes", func() error {
		allocs, _, err := client.Nodes().Allocations(node, (&api.QueryOptions{}).WithContext(ctx))
		if err != nil {
			return err
		}
		for _, a := range allocs {
			if a.JobID != volumesJob && !a.ClientTerminalStatus() {
				return fmt.Errorf("%s is %s", a.Name, a.ClientStatus)
			}
		}
		mounts, err := os.ReadFile("/proc/self/mountinfo")
		if err == nil && strings.Contains(string(mounts), filepath.Join(s.dir, "nomad", "client", "csi")+"/") {
			err = errors.New("volumes are still mounted")
		}
		return err
	}); err != nil {
		return err
	}
	_, _, err := client.Jobs().Deregister(volumesJob, false, (&api.WriteOptions{}).WithContext(ctx))
	return err
}
