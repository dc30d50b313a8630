package registry

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/distribution/reference"
	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// A Commit is what an image made here says of itself.
type Commit struct {
	Author    string
	Comment   string
	CreatedBy string // of the step
	Config    dockerspec.DockerOCIImageConfig
}

// Commit makes an image of another one with a layer on top: what a container has changed, a tar as docker's layers are (image-spec layer.md). It is named n unless
// that is nil.
func (s *Images) Commit(ctx context.Context, parent *Image, layer io.Reader, c Commit, n reference.NamedTagged) (digest.Digest, error) {
	if len(parent.Layers) >= maxLayers {
		return "", errorf(ErrInvalid, "max depth exceeded: image %s has %d layers already", short(parent.ID), len(parent.Layers))
	}
	from := s.root + "/" + dangling
	var layers []storedLayer
	for _, l := range parent.Layers {
		if err := s.link(ctx, parent.repo, from, l.Digest); err != nil {
			return "", err
		}
		layers = append(layers, storedLayer{l.Descriptor, fact{diffID: l.DiffID}})
	}
	top, err := s.putLayer(ctx, from, layer)
	if err != nil {
		return "", fmt.Errorf("commit: %w", err)
	}
	image := parent.Config
	image.History = slices.Clone(image.History)
	if top.diffID != emptyLayer {
		layers = append(layers, top)
	}
	return s.create(ctx, image, layers, c, n)
}

// emptyLayer is the diff id of a tar with nothing in it. An image has a step in its history for it, and no layer.
const emptyLayer = digest.Digest("sha256:5f70bf18a086007016e948b04aed3b82103a36bea41755b6cddfaf10ace3c6ef")

// Import makes an image of one layer, a tar with everything that is in it.
func (s *Images) Import(ctx context.Context, layer io.Reader, platformName string, c Commit, n reference.NamedTagged) (digest.Digest, error) {
	p := s.platform
	if platformName != "" {
		var err error
		if p, err = parsePlatform(platformName); err != nil {
			return "", err
		}
	}
	plain, err := decompress(layer)
	if err != nil {
		return "", err
	}
	defer plain.Close()
	l, err := s.putLayer(ctx, s.root+"/"+dangling, plain)
	if err != nil {
		return "", fmt.Errorf("import: %w", err)
	}
	var image dockerspec.DockerOCIImage
	image.OS, image.Architecture, image.Variant = p.os, p.architecture, p.variant
	return s.create(ctx, image, []storedLayer{l}, c, n)
}

func (s *Images) create(ctx context.Context, image dockerspec.DockerOCIImage, layers []storedLayer, c Commit, n reference.NamedTagged) (digest.Digest, error) {
	now := time.Now().UTC()
	image.Created, image.Author, image.Config = &now, c.Author, c.Config
	before := len(image.RootFS.DiffIDs)
	image.RootFS = ocispec.RootFS{Type: "layers"}
	for _, l := range layers {
		image.RootFS.DiffIDs = append(image.RootFS.DiffIDs, l.diffID)
	}
	image.History = append(image.History, ocispec.History{Created: &now, Author: c.Author, CreatedBy: c.CreatedBy, Comment: c.Comment, EmptyLayer: len(layers) == before})
	data, err := json.Marshal(image)
	if err != nil {
		return "", err
	}
	if len(data) > maxConfig {
		return "", errorf(ErrInvalid, "the image's configuration has %d bytes, at most %d are taken", len(data), maxConfig)
	}
	return digest.FromBytes(data), s.put(ctx, data, layers, n)
}

var instruction = regexp.MustCompile(`^(?s)\s*([A-Za-z]+)(?:\s+(.*))?$`)

// Change applies instructions of a Dockerfile to a configuration: what docker commit and docker import take with --change.
func Change(c *dockerspec.DockerOCIImageConfig, changes []string) error {
	for _, change := range changes {
		m := instruction.FindStringSubmatch(change)
		if m == nil {
			return errorf(ErrInvalid, "%.200q is no instruction of a Dockerfile", change)
		}
		name, rest := strings.ToUpper(m[1]), strings.TrimSpace(m[2])
		if rest == "" {
			return errorf(ErrInvalid, "%s requires an argument", name)
		}
		if err := apply(c, name, rest); err != nil {
			return err
		}
	}
	return nil
}

func apply(c *dockerspec.DockerOCIImageConfig, name, rest string) error {
	words, isJSON := jsonWords(rest)
	command := words
	if !isJSON {
		command = []string{"/bin/sh", "-c", rest}
		if len(c.Shell) > 0 {
			command = append(slices.Clone(c.Shell), rest)
		}
		words = strings.Fields(rest)
	}
	switch name {
	case "CMD":
		c.Cmd = command
	case "ENTRYPOINT":
		c.Entrypoint = command
	case "ENV":
		pairs, err := keyValues(rest)
		if err != nil {
			return err
		}
		for _, p := range pairs {
			c.Env = slices.DeleteFunc(slices.Clone(c.Env), func(e string) bool { return strings.HasPrefix(e, p[0]+"=") })
			c.Env = append(c.Env, p[0]+"="+p[1])
		}
	case "LABEL":
		pairs, err := keyValues(rest)
		if err != nil {
			return err
		}
		c.Labels = maps.Clone(c.Labels)
		for _, p := range pairs {
			if c.Labels == nil {
				c.Labels = map[string]string{}
			}
			c.Labels[p[0]] = p[1]
		}
	case "EXPOSE":
		c.ExposedPorts = maps.Clone(c.ExposedPorts)
		for _, w := range words {
			port, err := exposed(w)
			if err != nil {
				return err
			}
			if c.ExposedPorts == nil {
				c.ExposedPorts = map[string]struct{}{}
			}
			c.ExposedPorts[port] = struct{}{}
		}
	case "VOLUME":
		c.Volumes = maps.Clone(c.Volumes)
		for _, w := range words {
			if c.Volumes == nil {
				c.Volumes = map[string]struct{}{}
			}
			c.Volumes[w] = struct{}{}
		}
	case "USER":
		c.User = rest
	case "WORKDIR":
		c.WorkingDir = rest
	case "STOPSIGNAL":
		c.StopSignal = rest
	case "ONBUILD":
		c.OnBuild = append(slices.Clone(c.OnBuild), rest)
	default:
		return errorf(ErrInvalid, "%s is not a valid change command: use CMD, ENTRYPOINT, ENV, EXPOSE, LABEL, ONBUILD, STOPSIGNAL, USER, VOLUME or WORKDIR", name)
	}
	return nil
}

func jsonWords(s string) ([]string, bool) {
	var words []string
	if !strings.HasPrefix(s, "[") || json.Unmarshal([]byte(s), &words) != nil {
		return nil, false
	}
	return words, true
}

// exposed is 80, 80/tcp or 8000-8010/udp as the configuration has it.
func exposed(s string) (string, error) {
	port, proto, ok := strings.Cut(s, "/")
	if !ok {
		proto = "tcp"
	}
	first, last, isRange := strings.Cut(port, "-")
	numbers := []string{first}
	if isRange {
		numbers = append(numbers, last)
	}
	for _, n := range numbers {
		if _, err := strconv.ParseUint(n, 10, 16); err != nil {
			return "", errorf(ErrInvalid, "invalid containerPort: %.100s", s)
		}
	}
	switch proto {
	case "tcp", "udp", "sctp":
		return port + "/" + proto, nil
	}
	return "", errorf(ErrInvalid, "invalid proto: %.100s", proto)
}

// keyValues splits KEY=VALUE …, values in quotes too, or the old form KEY VALUE.
func keyValues(s string) ([][2]string, error) {
	if first := strings.Fields(s)[0]; !strings.Contains(first, "=") {
		key, value, _ := strings.Cut(s, " ")
		if value = strings.TrimSpace(value); value == "" {
			return nil, errorf(ErrInvalid, "%.200q: write KEY=VALUE", s)
		}
		return [][2]string{{key, value}}, nil
	}
	var all [][2]string
	var word strings.Builder
	var quote rune
	escaped, begun := false, false
	end := func() error {
		if !begun {
			return nil
		}
		key, value, ok := strings.Cut(word.String(), "=")
		if !ok || key == "" {
			return errorf(ErrInvalid, "%.200q: write KEY=VALUE", word.String())
		}
		all = append(all, [2]string{key, value})
		word.Reset()
		begun = false
		return nil
	}
	for _, r := range s {
		switch {
		case escaped:
			word.WriteRune(r)
			escaped = false
		case r == '\\' && quote != '\'':
			escaped, begun = true, true
		case quote != 0 && r == quote:
			quote = 0
		case quote != 0:
			word.WriteRune(r)
		case r == '"' || r == '\'':
			quote, begun = r, true
		case r == ' ' || r == '\t' || r == '\n':
			if err := end(); err != nil {
				return nil, err
			}
		default:
			word.WriteRune(r)
			begun = true
		}
	}
	if quote != 0 || escaped {
		return nil, errorf(ErrInvalid, "%.200q: a quote is not closed", s)
	}
	return all, end()
}
