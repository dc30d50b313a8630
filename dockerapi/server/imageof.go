package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"

	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/cradlestack/cradlestack/dockerapi/registry"
	"github.com/cradlestack/cradlestack/dockerapi/translate"
	"github.com/cradlestack/cradlestack/internal/dockerhttp"
)

// imageOf finds the image that a client names: one of its namespace's, or one that each node has as an OCI layout.
func (s *Server) imageOf(ctx context.Context, t *tenant, ref string) (*translate.Image, error) {
	if ref == "" {
		return nil, dockerhttp.Invalid("no image specified")
	}
	if s.Registry != nil {
		i, err := s.registryImage(ctx, t, ref)
		if s.Layouts == "" || !isNotFound(err) {
			return i, err
		}
	}
	return s.layoutOf(ref)
}

// layoutOf finds an image among those that each node has as an OCI layout.
func (s *Server) layoutOf(ref string) (*translate.Image, error) {
	name, tag, _ := strings.Cut(ref, ":")
	if s.Layouts == "" || !filepath.IsLocal(name) || strings.ContainsAny(name, "/@") || tag != "" && tag != "latest" {
		return nil, noImage(ref)
	}
	return layoutImage(filepath.Join(s.Layouts, name), ref)
}

func (s *Server) registryImage(ctx context.Context, t *tenant, ref string) (*translate.Image, error) {
	images, err := s.images(t)
	if err != nil {
		return nil, err
	}
	i, err := images.Resolve(ctx, ref)
	if err != nil {
		return nil, imageError(err)
	}
	if s.RegistryHost == "" {
		return nil, dockerhttp.NewError(http.StatusServiceUnavailable, "nodes don't find the images of this server: its operator has to start it with --registry-listen")
	}
	image := &translate.Image{Reference: i.NodeReference(s.RegistryHost), Audience: i.WorkloadAudience(), ID: i.ID.String(), Config: i.Config.Config}
	if os, architecture := i.Config.OS, i.Config.Architecture; os+"/"+architecture != translate.Platform && architecture != "" {
		image.Platform = strings.TrimSuffix(os+"/"+architecture+"/"+i.Config.Variant, "/")
	}
	return image, nil
}

// nodeReference is what a node pulls to run a container: where its image was found when the container was made, and from where nodes find the registry now.
func (s *Server) nodeReference(i imageRef) string {
	if _, path, ok := strings.Cut(i.Reference, "/"); ok && i.Audience != "" && s.RegistryHost != "" {
		return s.RegistryHost + "/" + path
	}
	return i.Reference
}

// containersOfImages tells which containers are made from which images.
func (s *Server) containersOfImages(ctx context.Context, t *tenant) ([]registry.Use, error) {
	if err := t.watch.ready(ctx); err != nil {
		return nil, err
	}
	all, err := t.list(ctx)
	if err != nil {
		return nil, err
	}
	var uses []registry.Use
	for _, c := range all {
		uses = append(uses, registry.Use{Container: c.ID, Image: digest.Digest(c.Image.ID), Running: t.statusOf(c).Running})
	}
	return uses, nil
}

// ancestors tells the containers that are made from one of the images that a filter names: what the names mean now. That of a layout is its name alone.
func (s *Server) ancestors(ctx context.Context, t *tenant, refs []string) (func(*record) bool, error) {
	if len(refs) == 0 {
		return func(*record) bool { return true }, nil
	}
	ids, layouts := map[string]bool{}, map[string]bool{}
	for _, ref := range refs {
		layouts[strings.TrimSuffix(ref, ":latest")] = true
		images, err := s.images(t)
		if isNotFound(err) {
			continue
		}
		if err != nil {
			return nil, err
		}
		i, err := images.Resolve(ctx, ref)
		switch {
		case err == nil:
			ids[i.ID.String()] = true
		case !errors.Is(err, registry.ErrNotFound) && !errors.Is(err, registry.ErrInvalid):
			return nil, imageError(err)
		}
	}
	return func(c *record) bool {
		return ids[c.Image.ID] || c.Image.Audience == "" && layouts[strings.TrimSuffix(c.Config.Image, ":latest")]
	}, nil
}

// imageShown is how a list shows a container's image: by the name that it was made with where that means the image still, else by its id.
func (s *Server) imageShown(t *tenant) func(context.Context, *record) string {
	means := map[string]string{}
	return func(ctx context.Context, c *record) string {
		name := c.Config.Image
		if c.Image.Audience == "" { // of a layout
			return name
		}
		id, known := means[name]
		if !known {
			if images, err := s.images(t); err == nil {
				if i, err := images.Resolve(ctx, name); err == nil {
					id = i.ID.String()
				}
			}
			means[name] = id
		}
		if id != c.Image.ID {
			return c.Image.ID
		}
		return name
	}
}

func noImage(ref string) error {
	if !strings.ContainsAny(ref, ":@") {
		ref += ":latest"
	}
	return dockerhttp.Errorf(http.StatusNotFound, "No such image: %s", ref)
}

// layoutImage reads the only image of an OCI layout.
func layoutImage(dir, ref string) (*translate.Image, error) {
	root, err := os.OpenRoot(dir)
	if os.IsNotExist(err) {
		return nil, noImage(ref)
	}
	if err != nil {
		return nil, err
	}
	defer root.Close()
	read := func(d digest.Digest, v any) error {
		data, err := root.ReadFile(filepath.Join("blobs", d.Algorithm().String(), d.Encoded()))
		if err != nil {
			return err
		}
		return json.Unmarshal(data, v)
	}
	data, err := root.ReadFile("index.json")
	if err != nil {
		return nil, err
	}
	var index ocispec.Index
	if err := json.Unmarshal(data, &index); err != nil {
		return nil, err
	}
	if len(index.Manifests) != 1 {
		return nil, fmt.Errorf("%s has %d images", dir, len(index.Manifests))
	}
	var manifest ocispec.Manifest
	if err := read(index.Manifests[0].Digest, &manifest); err != nil {
		return nil, err
	}
	var image dockerspec.DockerOCIImage
	if err := read(manifest.Config.Digest, &image); err != nil {
		return nil, err
	}
	return &translate.Image{Reference: "oci:" + dir, ID: manifest.Config.Digest.String(), Config: image.Config}, nil
}
