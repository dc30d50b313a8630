package image

import (
	"context"
	"fmt"

	cerrdefs "github.com/containerd/errdefs"
	"github.com/moby/moby/client"
)

// A daemonSource is an image of the docker daemon that DOCKER_HOST names, or of the local one.
type daemonSource struct {
	name    string
	session *session // takes the exported image
	limit   int64    // of its size
	docker  *client.Client
}

func newDaemonSource(name string, x *session, limit int64) (*daemonSource, error) {
	docker, err := client.New(client.FromEnv)
	if err != nil {
		return nil, fmt.Errorf("docker daemon: %w", err)
	}
	x.closers = append(x.closers, docker)
	return &daemonSource{name, x, limit, docker}, nil
}

// id asks the daemon what the name means now. It is docker's image id: the configuration's digest, or, where docker keeps
// its images in containerd, a manifest's.
func (s *daemonSource) id(ctx context.Context) (string, error) {
	img, err := s.docker.ImageInspect(ctx, s.name)
	switch {
	case cerrdefs.IsNotFound(err):
		return "", fmt.Errorf("%w at the docker daemon: run docker pull %s, or docker build -t %s", ErrNotFound, s.name, s.name)
	case client.IsErrConnectionFailed(err):
		return "", fmt.Errorf("%w: the docker daemon doesn't answer at %s: start it, or set DOCKER_HOST", ErrUnreachable, s.docker.DaemonHost())
	case err != nil:
		return "", fmt.Errorf("docker daemon: %w", err)
	}
	return img.ID, nil
}

func (s *daemonSource) resolve(ctx context.Context, platform string) (*resolved, error) {
	stream, err := s.docker.ImageSave(ctx, []string{s.name})
	if err != nil {
		return nil, fmt.Errorf("docker daemon: %w", err)
	}
	defer stream.Close()
	a, err := spoolArchive(ctx, stream, s.session, s.limit)
	if err != nil {
		return nil, fmt.Errorf("docker daemon: %w", err)
	}
	return archiveSource{fsys: a}.resolve(ctx, platform)
}
