package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/hashicorp/nomad/api"

	"github.com/cradlestack/cradlestack/internal/nomadtest"
	"github.com/cradlestack/cradlestack/test/programs"
)

// planned is how many pods, and how many volumes, a plan is made over.
const planned = 100

// theirs is the provider that ours is compared with, as Terraform finds it: in a mirror of this machine's, or the registry.
const theirs = "registry.terraform.io/hashicorp/nomad"

// terraform: a plan over pods and volumes that changes nothing, beside one by Nomad's own provider over the same jobs and volumes.
func (b *bench) terraform(ctx context.Context) (err error) {
	program, err := exec.LookPath("terraform")
	if err != nil {
		return fmt.Errorf("%w: https://developer.hashicorp.com/terraform/install", err)
	}
	o := nomadtest.Options{Keep: []string{"volumes", "nomad/client/csi", "/run/cradle"}} // what the volumes' plugin has, and keeps
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
	if err := c.Volumes(ctx); err != nil {
		return err
	}

	rc, err := b.mirror()
	if err != nil {
		return err
	}
	cradle := &plans{program: program, dir: filepath.Join(b.dir, "cradle"), c: c, env: []string{"TF_CLI_CONFIG_FILE=" + rc}}
	if err := cradle.init(ctx, cradleHCL()); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, cradle.destroy()) }()
	if err := cradle.run(ctx, "apply", "-auto-approve", "-parallelism=20"); err != nil {
		return err
	}
	what := fmt.Sprintf("Terraform: a plan over %d pods and %[1]d volumes", planned)
	job, _, err := c.API.Jobs().Info("pod-0", nil)
	if err != nil {
		return err
	}
	hcl, err := nomadHCL(job)
	if err != nil {
		return err
	}
	nomad := &plans{program: program, dir: filepath.Join(b.dir, "nomad"), c: c}
	if err := nomad.init(ctx, hcl); err != nil { // not to be had here: what there is is told, and that it has nothing beside it
		fmt.Fprintf(b.log, "bench: terraform: %v\nput terraform-provider-nomad where terraform init finds it, such as ~/.terraform.d/plugins/%s/VERSION/OS_ARCH\n", err, theirs)
		m, err := b.interleave(ctx, cradle.plan)
		if err != nil {
			return err
		}
		b.table.report(what, seconds(m[0]), "terraform-provider-nomad is missing", "at most 1", true)
		return nil
	}
	version, err := nomad.version(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, nomad.destroy()) }()
	if err := nomad.run(ctx, "apply", "-auto-approve", "-parallelism=20"); err != nil {
		return err
	}
	m, err := b.interleave(ctx, cradle.plan, nomad.plan)
	if err != nil {
		return err
	}
	b.table.compare(what, seconds(m[0]), "terraform-provider-nomad "+version+" "+seconds(m[1]), ratio(m[0], m[1]), 1, 0)
	return nil
}

// mirror lays the built provider where a configuration, whose path is returned, has Terraform look for it.
func (b *bench) mirror() (rc string, err error) {
	provider, err := programs.Path("terraform-provider-cradle")
	if err != nil {
		return "", err
	}
	dir := filepath.Join(b.dir, "mirror")
	root, err := programs.Root()
	if err != nil {
		return "", err
	}
	if out, err := exec.Command("make", "-C", root, "-o", "build", "install-provider", "PROVIDERS="+dir).CombinedOutput(); err != nil {
		return "", fmt.Errorf("make install-provider of %s: %w: %s", provider, err, out)
	}
	rc = filepath.Join(b.dir, "terraformrc")
	return rc, os.WriteFile(rc, fmt.Appendf(nil, "provider_installation {\n  filesystem_mirror {\n    path = %q\n  }\n}\n", dir), 0o600)
}

// cradleHCL are pods of which none runs, and volumes.
func cradleHCL() string {
	return fmt.Sprintf(`
terraform {
  required_providers {
    cradle = { source = "cradlestack/cradle" }
  }
}
provider "cradle" {}
resource "cradle_volume" "many" {
  count = %[1]d
  name  = "volume-${count.index}"
  size  = "16MiB"
}
resource "cradle_pod" "many" {
  count    = %[1]d
  name     = "pod-${count.index}"
  replicas = 0
  container {
    name  = "main"
    image = "oci:/nowhere"
    env   = { NUMBER = count.index }
  }
  port {
    port = 80
  }
  service {
    name  = "pod-${count.index}"
    port  = 80
    check = { type = "http", path = "/" }
  }
}
`, planned)
}

// nomadHCL are the same jobs and volumes in the words of Nomad's provider.
func nomadHCL(job *api.Job) (string, error) {
	// What Nomad keeps of a job is no part of its text.
	job.Status, job.StatusDescription, job.Stable, job.Version, job.SubmitTime, job.CreateIndex, job.ModifyIndex, job.JobModifyIndex, job.VersionTag = nil, nil, nil, nil, nil, nil, nil, nil, nil
	text, err := json.Marshal(job)
	if err != nil {
		return "", err
	}
	quoted, err := json.Marshal(string(text))
	if err != nil {
		return "", err
	}
	spec := strings.NewReplacer("${", "$${", "%{", "%%{").Replace(string(quoted))
	return fmt.Sprintf(`
terraform {
  required_providers {
    nomad = { source = %[3]q }
  }
}
provider "nomad" {}
resource "nomad_csi_volume" "many" {
  count        = %[1]d
  plugin_id    = "cradle"
  volume_id    = "theirs-${count.index}"
  name         = "theirs-${count.index}"
  capacity_min = "16MiB"
  parameters   = { class = "nfs" }
  capability {
    access_mode     = "multi-node-multi-writer"
    attachment_mode = "file-system"
  }
}
resource "nomad_job" "many" {
  count            = %[1]d
  jobspec          = replace(%[2]s, "pod-0", "theirs-${count.index}")
  json             = true
  purge_on_destroy = true
}
`, planned, spec, theirs), nil
}

// plans is a folder of Terraform's whose commands run in the node of Nomad's server.
type plans struct {
	program, dir string
	c            *nomadtest.Cluster
	env          []string
}

// init gets the providers, outside of the node, as that reaches nothing.
func (p *plans) init(ctx context.Context, hcl string) error {
	if err := os.MkdirAll(p.dir, 0o700); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(p.dir, "main.tf"), []byte(hcl), 0o600); err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, p.program, "-chdir="+p.dir, "init", "-no-color", "-input=false")
	cmd.Env = append(os.Environ(), p.env...)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("terraform init: %w: %s", err, out)
	}
	return nil
}

// run is a command in the node.
func (p *plans) run(ctx context.Context, args ...string) error {
	cmd := p.c.Server().Command(ctx, p.program, append([]string{"-chdir=" + p.dir, args[0], "-no-color", "-input=false"}, args[1:]...)...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.Env = append(append(p.c.Env(), "PATH="+os.Getenv("PATH"), "HOME="+os.Getenv("HOME"), "CHECKPOINT_DISABLE=1"), p.env...)
	err := p.c.Server().Launch(cmd)
	if err == nil {
		err = cmd.Wait()
	}
	if err != nil {
		return fmt.Errorf("terraform %s: %w: %s", strings.Join(args, " "), err, &out)
	}
	return nil
}

// plan is one that changes nothing, which its exit code says.
func (p *plans) plan(ctx context.Context) (time.Duration, error) {
	begin := time.Now()
	err := p.run(ctx, "plan", "-detailed-exitcode")
	return time.Since(begin), err
}

func (p *plans) destroy() error {
	ctx, cancel := context.WithTimeout(context.Background(), nomadtest.Patience)
	defer cancel()
	return p.run(ctx, "destroy", "-auto-approve", "-parallelism=20")
}

// version is the provider's that init has chosen.
func (p *plans) version(ctx context.Context) (string, error) {
	out, err := exec.CommandContext(ctx, p.program, "-chdir="+p.dir, "version", "-json").Output()
	if err != nil {
		return "", fmt.Errorf("terraform version: %w", err)
	}
	var said struct {
		Selections map[string]string `json:"provider_selections"`
	}
	if err := json.Unmarshal(out, &said); err != nil {
		return "", err
	}
	return said.Selections[theirs], nil
}
