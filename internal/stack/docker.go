package stack

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/cradlestack/cradlestack/internal/agents"
	"github.com/cradlestack/cradlestack/test/programs"
)

const (
	dockerAPI     = "dockerapi" // the process
	dockerContext = "cradle"    // by which docker finds it
)

func (s *Stack) socket() string { return filepath.Join(s.dir, "docker.sock") }

// upDockerAPI starts docker's API. Its socket is root's, as the whole node is who may use it.
func (s *Stack) upDockerAPI(ctx context.Context, config agents.Config) error {
	program, err := programs.Path("cradle-dockerapi")
	if err != nil {
		return err
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		return err
	}
	argv := []string{
		program, "serve", "--socket", s.socket(), "--token-file", s.tokenFile(), "--host-paths", "--pods", filepath.Join(s.dir, "pods"),
		"--images", filepath.Join(s.dir, "images"), "--registry-listen", fmt.Sprintf("127.0.0.1:%d", config.Ports.Registry),
		"--image-layouts", filepath.Join(cache, "cradlestack", "images"),
	}
	alive, err := s.upProcess(config, dockerAPI, argv, nil)
	if err != nil {
		return err
	}
	return agents.Retry(ctx, "docker's API", func() error {
		if err := alive(); err != nil {
			return err
		}
		conn, err := net.Dial("unix", s.socket())
		if err != nil {
			return err
		}
		return conn.Close()
	})
}

// addContext tells docker of the stack, by a context. Which one the user has chosen stays as it is. Without the docker CLI there is none.
func (s *Stack) addContext(ctx context.Context) error {
	if _, err := exec.LookPath("docker"); err != nil {
		return nil //nolint:nilerr // there is nobody to tell
	}
	dir := os.Getenv("DOCKER_CONFIG")
	if dir == "" {
		home, err := os.UserHomeDir()
		if err != nil {
			return err
		}
		dir = filepath.Join(home, ".docker")
	}
	host := "unix://" + s.socket()
	leads, err := docker(ctx, dir, "context", "inspect", dockerContext, "--format", "{{.Endpoints.docker.Host}}")
	switch {
	case err == nil && strings.TrimSpace(leads) != host:
		return fmt.Errorf("docker's context %s is there already and leads to %s: docker context rm %[1]s, and make up again", dockerContext, strings.TrimSpace(leads))
	case err != nil:
		if _, err := docker(ctx, dir, "context", "create", dockerContext, "--description", "microVM pods in Nomad (make up)", "--docker", "host="+host); err != nil {
			return err
		}
	}
	if s.record.Docker != "" && s.record.Docker != dir {
		if err := s.removeContext(ctx); err != nil {
			return err
		}
	}
	s.record.Docker = dir
	return s.save()
}

// removeContext removes it where addContext has put it, if it is still the stack's.
func (s *Stack) removeContext(ctx context.Context) error {
	dir := s.record.Docker
	if dir == "" {
		return nil
	}
	leads, err := docker(ctx, dir, "context", "inspect", dockerContext, "--format", "{{.Endpoints.docker.Host}}")
	if err == nil && strings.TrimSpace(leads) == "unix://"+s.socket() {
		if _, err := docker(ctx, dir, "context", "rm", "--force", dockerContext); err != nil {
			return err
		}
	}
	s.record.Docker = ""
	return nil
}

// docker runs its command line with a folder of configurations.
func docker(ctx context.Context, dir string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, "docker", append([]string{"--config", dir}, args...)...)
	cmd.Env = append(os.Environ(), "DOCKER_HOST=", "DOCKER_CONTEXT=")
	out, err := cmd.Output()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		err = fmt.Errorf("docker %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(string(exit.Stderr)))
	}
	return string(out), err
}
