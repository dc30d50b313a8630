package stack

import (
	"context"
	"encoding/json"
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

// The filer's ports. All but the first are on the loopback interface, as secrets go there in clear text.
func (s *Stack) nfsPort() int      { return 2049 + s.record.Offset }
func (s *Stack) filerAPIPort() int { return 2050 + s.record.Offset }
func (s *Stack) webdavPort() int   { return 2051 + s.record.Offset }
func (s *Stack) s3Port() int       { return 2052 + s.record.Offset }

// filerURL is where one of those is reached.
func filerURL(port int) string { return fmt.Sprintf("http://127.0.0.1:%d", port) }

// runDir is gone while the stack is down.
func (s *Stack) runDir() string { return filepath.Join(s.dir, "run") }

// upVolumes runs the volumes' plugin and their filer, as their examples do, and waits until volumes can be made and served.
func (s *Stack) upVolumes(ctx context.Context, config agents.Config) error {
	client, err := s.API()
	if err != nil {
		return err
	}
	for _, name := range []string{filerJob, volumesJob} {
		if err := s.runExample(ctx, client, config, name); err != nil {
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
func (s *Stack) runExample(ctx context.Context, client *api.Client, config agents.Config, name string) error {
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
		"/run/cradle/filer/api.sock", s.filerSocket(), `"serve",`, fmt.Sprintf(`"serve", "--socket", %q, "--listen", ":%d", "--api", "127.0.0.1:%d", "--nomad", %q, "--webdav", "127.0.0.1:%d", "--s3", "127.0.0.1:%d",`,
			s.filerSocket(), s.nfsPort(), s.filerAPIPort(), config.NomadAddr(), s.webdavPort(), s.s3Port()))
	job, err := client.Jobs().ParseHCL(here.Replace(string(text)), false)
	if err != nil {
		return err
	}
	_, _, err = client.Jobs().Register(job, (&api.WriteOptions{}).WithContext(ctx))
	return err
}

// granted are where the filer has volumes that somebody may use over WebDAV or S3: as long as it runs, and again after the next Up.
func (s *Stack) granted(ctx context.Context) (map[string]bool, error) {
	filer, err := programs.Path("cradle-filer")
	if err != nil {
		return nil, err
	}
	out, err := exec.CommandContext(ctx, filer, "grants", "-o", "json", "--socket", s.filerSocket()).Output()
	if err != nil {
		return nil, fmt.Errorf("cradle-filer grants: %w", err)
	}
	var grants []struct{ Volume string }
	if err := json.Unmarshal(out, &grants); err != nil {
		return nil, err
	}
	all := map[string]bool{}
	for _, g := range grants {
		all[filepath.Join(filepath.Dir(s.filerSocket()), "volumes", g.Volume)] = true
	}
	return all, nil
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
		granted, err := s.granted(ctx)
		if err != nil {
			return err
		}
		points, err := s.mounts()
		for _, p := range points {
			for _, dir := range []string{filepath.Join(s.dir, "nomad", "client", "csi"), filepath.Dir(s.filerSocket())} {
				if strings.HasPrefix(p, dir+"/") && !granted[p] {
					err = fmt.Errorf("%s is still mounted", p)
				}
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
