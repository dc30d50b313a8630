package server

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/url"
	"strings"

	"github.com/distribution/reference"
	"github.com/moby/moby/api/types/common"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"
	"github.com/opencontainers/go-digest"

	"github.com/cradlestack/cradlestack/dockerapi/registry"
	"github.com/cradlestack/cradlestack/dockerapi/translate"
	"github.com/cradlestack/cradlestack/internal/dockerhttp"
)

// commitContainer makes an image of a container: what it has changed becomes a layer on top of its image's. Volumes are no part of it.
func (s *Server) commitContainer(w http.ResponseWriter, r *http.Request, t *tenant) error {
	images, err := s.images(t)
	if err != nil {
		return err
	}
	name, err := optionalName(dockerhttp.Parameter(r, "repo"), dockerhttp.Parameter(r, "tag"))
	if err != nil {
		return imageError(err)
	}
	var asked container.Config
	if err := dockerhttp.Decode(w, r, &asked); err != nil {
		return err
	}
	config := translate.ImageConfig(&asked)
	if err := registry.Change(&config, r.URL.Query()["changes"]); err != nil {
		return imageError(err)
	}
	ctx := r.Context()
	c, err := t.find(ctx, dockerhttp.Parameter(r, "container"))
	if err != nil {
		return err
	}
	if config, err = translate.Commit(config, c.Config); err != nil {
		return err
	}
	parent, err := images.Resolve(ctx, c.Image.ID)
	if errors.Is(err, registry.ErrNotFound) {
		return dockerhttp.Errorf(http.StatusConflict, "container %s is made from an image that is not in the registry, %s: only nodes have it, and nothing can be put on top of it", c.ID, c.Config.Image)
	}
	if err != nil {
		return imageError(err)
	}
	if err := t.watch.ready(ctx); err != nil {
		return err
	}
	made := registry.Commit{
		Author: dockerhttp.Parameter(r, "author"), Comment: dockerhttp.Parameter(r, "comment"), CreatedBy: strings.Join(c.Config.Cmd, " "), Config: config,
	}
	pause := !r.URL.Query().Has("pause") || dockerhttp.Truth(r, "pause")
	var id digest.Digest
	err = t.readLayer(ctx, c, pause, func(layer io.Reader) error {
		id, err = images.Commit(ctx, parent, layer, made, name)
		return err
	})
	if err != nil {
		return imageError(err)
	}
	more := map[string]string{"comment": made.Comment, "imageID": id.String()}
	if name != nil {
		more["imageRef"] = reference.FamiliarString(name)
		t.emitImage(events.ActionTag, id.String(), more["imageRef"])
	}
	t.emitContainer(c, events.ActionCommit, more)
	return dockerhttp.Answer(w, http.StatusCreated, common.IDResponse{ID: id.String()})
}

// readLayer gives what a container has changed to read. One that runs is paused meanwhile, if pause says so.
func (t *tenant) readLayer(ctx context.Context, c *record, pause bool, read func(io.Reader) error) error {
	p, done, err := t.disk(ctx, c)
	if err != nil {
		return err
	}
	defer done()
	if pause && t.isRunning(c) {
		if err := p.call(ctx, http.MethodPost, p.inside("/pause"), nil, nil, nil); err == nil {
			defer func() {
				if err := p.call(context.WithoutCancel(ctx), http.MethodPost, p.inside("/unpause"), nil, nil, nil); err != nil && !t.over(c) {
					t.server.Log.Error("let a container go on after a commit", "container", c.ID, "error", err)
				}
			}()
		} else if !isTaken(err) { // it is paused already, or between two runs
			return err
		}
	}
	layer, err := p.read(ctx, p.inside("/export"), url.Values{"layer": {"1"}})
	if err != nil {
		return err
	}
	defer layer.Close()
	body := &brokenReader{Reader: layer}
	err = read(body)
	if body.err != nil {
		return dockerhttp.Errorf(http.StatusInternalServerError, "the files of container %s: the pod has stopped sending them: %v", c.ID, body.err)
	}
	return err
}

// A brokenReader remembers why reading has failed.
type brokenReader struct {
	io.Reader
	err error
}

func (r *brokenReader) Read(p []byte) (int, error) {
	n, err := r.Reader.Read(p)
	if err != nil && err != io.EOF {
		r.err = err
	}
	return n, err
}
