package stack

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/hashicorp/nomad/api"

	"github.com/cradlestack/cradlestack/internal/agents"
	"github.com/cradlestack/cradlestack/test/programs"
)

// The jobs of examples/nomad/volumes that are the volumes' plugin and their filer, and the plugin's id.
const (
	volumesJob    = "cradle-csi"
	filerJob      = "cradle-filer"
	volumesPlugin = "cradle"
)

// filerSocket is what the filer is controlled by; it has the volumes mounted beside it.
func (s *Stack) filerSocket() string { return filepath.Join(s.runDir(), "filer", "api.sock") }

// nfsPort is the filer's.
func (s *Stack) nfsPort() int { return 2049 + s.record.Offset }

// runDir is gone while the stack is down.
func (s *Stack) runDir() string { return filepath.Join(s.dir, "run") }

// upVolumes runs the volumes' plugin and their filer, as their examples do, and waits until volumes can be made and served.
func (s *Stack) upVolumes(ctx context.Context, _ agents.Config) error {
	client, err := s.API()
	if err != nil {
		return err
	}
	for _, name := range []string{filerJob, volumesJob} {
		if err := s.runExample(ctx, client, name); err != nil {
			return fmt.Errorf("job %s: %w", name, err)
		}
	}
	filer, err := programs.Path("cradle-filer")
	if err != nil {
		return err
	}
	if err := agents.Retry(ctx, fmt.Sprintf("the filer, which serves at port %d", s.nfsPort()), func() error {
		out, err := exec.CommandContext(ctx, filer, "status", "--socket", s.filerSocket()).CombinedOutput()
		if err != nil {
			err = fmt.Errorf("%w: %s", err, out)
		}
		return err
	}); err != nil {
		return err
	}
	return agents.Retry(ctx, "the volumes' plugin", func() error {
		p, _, err := client.CSIPlugins().Info(volumesPlugin, (&api.QueryOptions{}).WithContext(ctx))
		if err == nil && (p.ControllersHealthy == 0 || p.NodesHealthy == 0) {
			err = errors.New("it is not healthy yet")
		}
		return err
	})
}

// runExample runs a job of examples/nomad/volumes, with this stack's programs and folders. The job has the program's name.
func (s *Stack) runExample(ctx context.Context, client *api.Client, name string) error {
	root, err := programs.Root()
	if err != nil {
		return err
	}
	program, err := programs.Path(name)
	if err != nil {
		return err
	}
	text, err := os.ReadFile(filepath.Join(root, "examples", "nomad", "volumes", name+".nomad.hcl"))
	if err != nil {
		return err
	}
	here := strings.NewReplacer("/usr/local/bin/"+name, program, "/var/lib/cradle/volumes", filepath.Join(s.dir, "volumes"),
		"/var/lib/cradle/filer", filepath.Join(s.dir, "filer"), "/var/lib/nomad", filepath.Join(s.dir, "nomad"),
		"/run/cradle/filer/api.sock", s.filerSocket(), `"serve",`, fmt.Sprintf(`"serve", "--socket", %q, "--listen", ":%d",`, s.filerSocket(), s.nfsPort()))
	job, err := client.Jobs().ParseHCL(here.Replace(string(text)), false)
	if err != nil {
		return err
	}
	_, _, err = client.Jobs().Register(job, (&api.WriteOptions{}).WithContext(ctx))
	return err
}

// endVolumes ends the volumes' plugin when nobody has a volume any more.
func (s *Stack) endVolumes(ctx context.Context, client *api.Client, node string) error {
	if err := agents.Retry(ctx, "end of the jobs with volumes", func() error {
		allocs, _, err := client.Nodes().Allocations(node, (&api.QueryOptions{}).WithContext(ctx))
		if err != nil {
			return err
		}
		for _, a := range allocs {
			if a.JobID != volumesJob && a.JobID != filerJob && !a.ClientTerminalStatus() {
				return fmt.Errorf("%s is %s", a.Name, a.ClientStatus)
			}
		}
		mounts, err := os.ReadFile("/proc/self/mountinfo")
		for _, dir := range []string{filepath.Join(s.dir, "nomad", "client", "csi"), filepath.Dir(s.filerSocket())} {
			if err == nil && strings.Contains(string(mounts), dir+"/") {
				err = fmt.Errorf("volumes are still mounted in %s", dir)
			}
		}
		return err
	}); err != nil {
		return err
	}
	for _, name := range []string{volumesJob, filerJob} {
		if _, _, err := client.Jobs().Deregister(name, false, (&api.WriteOptions{}).WithContext(ctx)); err != nil {
			return err
		}
	}
	return nil
}
