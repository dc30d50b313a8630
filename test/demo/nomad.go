package main

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"

	"github.com/cradlestack/cradlestack/internal/stack"
	"github.com/cradlestack/cradlestack/test/programs"
)

// nomad runs the jobs of examples/nomad on a stack that is up for as long as that.
func (d *demo) nomad(ctx context.Context) error {
	d.title("a stack: Consul, Nomad, and pods as its jobs (make up keeps one)")
	d.stack = filepath.Join(d.dir, "s")
	if err := os.Setenv("DOCKER_CONFIG", filepath.Join(d.dir, "docker")); err != nil {
		return err
	}
	if _, err := stack.Up(ctx, d.stack); err != nil {
		return err
	}
	exports, err := stack.Env(d.stack)
	if err != nil {
		return err
	}
	for line := range strings.Lines(exports) {
		name, value, _ := strings.Cut(strings.TrimPrefix(strings.TrimSpace(line), "export "), "=")
		if err := os.Setenv(name, os.ExpandEnv(value)); err != nil {
			return err
		}
	}
	root, err := programs.Root()
	if err != nil {
		return err
	}
	if err := os.Symlink(filepath.Join(root, "examples", "nomad"), filepath.Join(d.dir, "jobs")); err != nil {
		return err
	}
	if _, err := d.command(ctx, "nomad", "node", "status"); err != nil {
		return err
	}
	for _, part := range []func(context.Context) error{d.web, d.terraform, d.batch, d.update, d.docker, d.files} {
		if err := part(ctx); err != nil {
			return err
		}
	}
	d.title("what runs now, and where it is found")
	if _, err := d.command(ctx, "nomad", "job", "status"); err != nil {
		return err
	}
	_, err = d.command(ctx, "consul", "catalog", "services")
	return err
}

// job runs an example. Nomad says much meanwhile; what counts is when it is healthy.
func (d *demo) job(ctx context.Context, args ...string) error {
	return d.timed(ctx, append([]string{"nomad", "job", "run"}, args...)...)
}

func (d *demo) web(ctx context.Context) error {
	d.title("nginx with a sidecar in one pod; healthy when Consul says so")
	if err := d.job(ctx, "jobs/web.nomad.hcl"); err != nil {
		return err
	}
	if err := d.expect(ctx, "in the pod", "nomad", "alloc", "exec", "-job", "web", "cat", "/usr/share/nginx/html/clock.html"); err != nil {
		return err
	}
	return d.expect(ctx, "GET /", "nomad", "alloc", "logs", "-job", "web")
}

func (d *demo) batch(ctx context.Context) error {
	d.title("a computation, and its output")
	if err := d.job(ctx, "jobs/batch.nomad.hcl"); err != nil {
		return err
	}
	if err := d.until(ctx, "", "sh", "-c", "nomad alloc logs -job batch | grep -x 47"); err != nil {
		return err
	}
	if err := d.job(ctx, "jobs/periodic.nomad.hcl"); err != nil {
		return err
	}
	_, err := d.command(ctx, "nomad", "job", "periodic", "force", "periodic")
	return err
}

func (d *demo) docker(ctx context.Context) error {
	d.title("docker, pointed here by a context")
	docker := func(args ...string) []string { return append([]string{"docker", "--context", "cradle"}, args...) }
	if err := d.expect(ctx, "in a microVM", docker("run", "--rm", "busybox", "sh", "-c", "echo $(uname -r) in a microVM")...); err != nil {
		return err
	}
	d.title("docker compose: a web server, an application, a database on a volume, a cache")
	port, err := freePort()
	if err != nil {
		return err
	}
	for name, value := range map[string]string{"SHOP_PORT": port, "SHOP_PASSWORD": "secret"} {
		if err := os.Setenv(name, value); err != nil {
			return err
		}
	}
	if err := d.plugin(); err != nil {
		return err
	}
	if _, err := d.command(ctx, docker("compose", "--progress", "quiet", "--file", "shop/compose.yaml", "up", "--detach")...); err != nil {
		return err
	}
	page := []string{"curl", "--silent", "--show-error", "--fail", "--max-time", "30", "http://127.0.0.1:" + port + "/"}
	if err := d.until(ctx, "", page...); err != nil {
		return err
	}
	if err := d.expect(ctx, "chair, lamp", page...); err != nil {
		return err
	}
	_, err = d.command(ctx, docker("ps")...)
	return err
}

// files shows a volume that a pod has mounted by NFS, back to its snapshot, and the same file by WebDAV and S3.
func (d *demo) files(ctx context.Context) error {
	d.title("cradle-filer: a pod mounts a volume by NFS; a snapshot, and back to it")
	docker := func(args ...string) []string { return append([]string{"docker", "--context", "cradle"}, args...) }
	desk := func(args ...string) []string { return append(docker("exec", "desk"), args...) }
	for _, args := range [][]string{
		docker("volume", "create", "--driver", "nfs", "-o", "attach=direct", "-o", "size=64M", "letters"), docker("run", "-d", "--name", "desk", "-v", "letters:/letters", "busybox", "sleep", "1d"),
	} {
		if _, err := d.command(ctx, args...); err != nil {
			return err
		}
	}
	if err := d.expect(ctx, "/letters nfs", desk("grep", "/letters", "/proc/mounts")...); err != nil {
		return err
	}
	for _, args := range [][]string{
		desk("sh", "-c", "echo 'Dear bank' >/letters/first"),
		{"cradle-filer", "snapshot", "letters", "before"},
		desk("sh", "-c", "echo oops >/letters/first"),
		{"cradle-filer", "diff", "letters", "before"},
		{"cradle-filer", "rollback", "letters", "before"},
	} {
		if _, err := d.command(ctx, args...); err != nil {
			return err
		}
	}
	if err := d.expect(ctx, "Dear bank", desk("cat", "/letters/first")...); err != nil {
		return err
	}
	d.title("cradle-filer: the same file by WebDAV and S3, which are for those who have a grant")
	if _, err := d.command(ctx, "cradle-filer", "grant", "letters", "--id", "me"); err != nil {
		return err
	}
	var login []string
	for _, item := range []string{"user", "secret"} {
		value, err := d.command(ctx, "nomad", "var", "get", "-item", item, "cradle-filer/me")
		if err != nil {
			return err
		}
		login = append(login, strings.TrimSpace(value))
	}
	curl := func(args ...string) []string {
		return append([]string{"curl", "--silent", "--show-error", "--fail", "--max-time", "60", "--user", strings.Join(login, ":")}, args...)
	}
	webdav, s3 := os.Getenv("CRADLE_FILER_WEBDAV")+"/default.letters/", os.Getenv("CRADLE_FILER_S3")+"/default.letters/"
	if err := d.expect(ctx, "Dear bank", curl(webdav+"first")...); err != nil {
		return err
	}
	if err := d.expect(ctx, "Dear bank", curl("--aws-sigv4", "aws:amz:us-east-1:s3", "--header", "x-amz-content-sha256: UNSIGNED-PAYLOAD", s3+"first")...); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(d.dir, "answer"), []byte("Dear customer\n"), 0o600); err != nil {
		return err
	}
	if _, err := d.command(ctx, curl("--upload-file", "answer", webdav)...); err != nil {
		return err
	}
	return d.expect(ctx, "Dear customer", desk("cat", "/letters/answer")...)
}

// plugin gives docker its compose, and the demo's directory the example.
func (d *demo) plugin() error {
	for _, name := range []string{"nginx", "postgres", "redis"} {
		if _, err := programs.Image(name); err != nil {
			return err
		}
	}
	compose, err := programs.Tool("compose")
	if err != nil {
		return err
	}
	root, err := programs.Root()
	if err != nil {
		return err
	}
	plugins := filepath.Join(os.Getenv("DOCKER_CONFIG"), "cli-plugins")
	if err := os.MkdirAll(plugins, 0o700); err != nil {
		return err
	}
	return errors.Join(os.Symlink(compose, filepath.Join(plugins, "docker-compose")), os.Symlink(filepath.Join(root, "examples", "compose"), filepath.Join(d.dir, "shop")))
}

func (d *demo) update(ctx context.Context) error {
	d.title("an update with a canary")
	if err := d.job(ctx, "jobs/canary.nomad.hcl"); err != nil {
		return err
	}
	if err := d.job(ctx, "-detach", "-var", "greeting=new", "jobs/canary.nomad.hcl"); err != nil {
		return err
	}
	return d.until(ctx, "", "nomad", "job", "promote", "-detach", "canary") // refused until the canary is healthy
}
