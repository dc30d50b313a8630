package image

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
)

// A reference says where an image comes from.
type reference struct {
	kind string // "" for a registry, docker-daemon, docker-archive, oci
	name string // docker-daemon: the image; docker-archive and oci: name or tag in it, or ""
	file string // docker-archive and oci: absolute path
	repo name.Reference
}

// parseReference understands what Pull takes. Registries in insecure may be asked over HTTP.
func parseReference(s string, insecure []string) (reference, error) {
	kind, rest, found := strings.Cut(s, ":")
	if found {
		switch kind {
		case "docker-daemon":
			if rest == "" {
				return reference{}, fmt.Errorf("image %q: give a name: docker-daemon:NAME[:TAG]", s)
			}
			return reference{kind: kind, name: rest}, nil
		case "docker-archive", "oci":
			file, name := splitPath(rest)
			if file == "" {
				return reference{}, fmt.Errorf("image %q: give a path: %s:PATH[:NAME]", s, kind)
			}
			file, err := filepath.Abs(file)
			if err != nil {
				return reference{}, fmt.Errorf("image %q: %w", s, err)
			}
			return reference{kind: kind, file: file, name: name}, nil
		}
	}
	ref, err := name.ParseReference(s, name.WeakValidation)
	if err != nil {
		return reference{}, fmt.Errorf("image %q is no valid reference: %w", s, err)
	}
	if slices.Contains(insecure, ref.Context().RegistryStr()) {
		if ref, err = name.ParseReference(s, name.WeakValidation, name.Insecure); err != nil {
			return reference{}, err
		}
	}
	return reference{repo: ref}, nil
}

// splitPath separates PATH[:NAME]. A colon belongs to the path where a file of that name exists.
func splitPath(s string) (path, name string) {
	if _, err := os.Lstat(s); err == nil {
		return s, ""
	}
	for i, c := range s {
		if c != ':' {
			continue
		}
		if _, err := os.Lstat(s[:i]); err == nil {
			return s[:i], s[i+1:]
		}
	}
	path, name, _ = strings.Cut(s, ":")
	return path, name
}

// String is the reference in its only spelling, for a registry as docker shows it: debian:12.
func (r reference) String() string {
	switch r.kind {
	case "":
		s := r.repo.Name()
		if hub, ok := strings.CutPrefix(s, name.DefaultRegistry+"/"); ok {
			return strings.TrimPrefix(hub, "library/")
		}
		return s
	case "docker-daemon":
		if isDigest(r.name) {
			return r.kind + ":" + r.name
		}
		return r.kind + ":" + familiar(r.name)
	}
	s := r.kind + ":" + r.file
	if r.name != "" {
		s += ":" + r.name
	}
	return s
}

// familiar spells a registry name as docker does, whatever of registry, library and tag is left out.
func familiar(s string) string {
	ref, err := name.ParseReference(s, name.WeakValidation)
	if err != nil {
		return s
	}
	return reference{repo: ref}.String()
}
