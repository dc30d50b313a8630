package registry

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"regexp"
	"strings"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
)

// Docker's names and namespaces of Nomad's in the grammar of repositories (lower case, no colon, 255 bytes): team-a's localhost:5000/app is
// team-a/localhost_5000/app, its busybox team-a/docker.io/library/busybox. What does not fit is written in hexadecimal.

// dangling is the repository, in each namespace, of images without a name. No domain of docker's is spelled so: they have a dot or a port, or are localhost.
const dangling = "none"

var (
	plainNamespace = regexp.MustCompile(`^[a-z0-9]+(-+[a-z0-9]+)*$`)
	plainDomain    = regexp.MustCompile(`^[a-z0-9]+((\.|-+)[a-z0-9]+)*(:[0-9]+)?$`)
	// namespaceName is Nomad's rule, nomad/structs: validNamespaceName.
	namespaceName = regexp.MustCompile(`^[a-zA-Z0-9-]{1,128}$`)
)

// root is the namespace's folder of repositories. No two namespaces share one: a plain name has no dot.
func root(namespace string) (string, error) {
	if !namespaceName.MatchString(namespace) {
		return "", errorf(ErrInvalid, "%.150q is no name of a namespace", namespace)
	}
	if len(namespace) <= 40 && plainNamespace.MatchString(namespace) {
		return namespace, nil
	}
	sum := sha256.Sum256([]byte(namespace))
	return "x." + hex.EncodeToString(sum[:20]), nil
}

// repository is where a name's images are.
func repository(root string, name reference.Named) (reference.Named, error) {
	domain, path := reference.Domain(name), reference.Path(name)
	if plainDomain.MatchString(domain) {
		domain = strings.Replace(domain, ":", "_", 1)
	} else {
		domain = "x__" + hex.EncodeToString([]byte(domain))
	}
	full := root + "/" + domain + "/" + path
	if more := len(full) - reference.RepositoryNameTotalLengthMax; more > 0 {
		return nil, errorf(ErrInvalid, "the name %.50s… is too long here: leave %d characters out", reference.FamiliarName(name), more)
	}
	repo, err := reference.WithName(full)
	if err != nil {
		return nil, errorf(ErrInvalid, "name %.300q: %v", name.Name(), err)
	}
	return repo, nil
}

// nameOf is repository's inverse for a path below the namespace's root; false where nothing of docker's is called so.
func nameOf(root, below string) (reference.Named, bool) {
	domain, path, ok := strings.Cut(below, "/")
	if !ok {
		return nil, false
	}
	if encoded, ok := strings.CutPrefix(domain, "x__"); ok {
		data, err := hex.DecodeString(encoded)
		if err != nil {
			return nil, false
		}
		domain = string(data)
	} else {
		domain = strings.Replace(domain, "_", ":", 1)
	}
	name, err := reference.ParseNormalizedNamed(domain + "/" + path)
	if err != nil || !reference.IsNameOnly(name) {
		return nil, false
	}
	repo, err := repository(root, name)
	if err != nil || repo.Name() != root+"/"+below { // what was pushed under another spelling of a name
		return nil, false
	}
	return name, true
}

// ParseName reads a name as docker does: busybox is docker.io/library/busybox:latest. An id of an image is none.
func ParseName(s string) (reference.Named, error) {
	if len(s) > 4096 {
		return nil, errorf(ErrInvalid, "invalid reference format: it has %d bytes", len(s))
	}
	name, err := reference.ParseNormalizedNamed(s)
	if err != nil {
		return nil, errorf(ErrInvalid, "%v", err)
	}
	if d, ok := name.(reference.Digested); ok && d.Digest().Algorithm() != digest.SHA256 {
		return nil, errorf(ErrInvalid, "invalid reference format: only sha256 digests are supported")
	}
	return reference.TagNameOnly(name), nil
}

// imageID tells whether s is an image's id or begins as one does, and returns its hexadecimal digits.
func imageID(s string) (hexadecimal string, ok bool) {
	s = strings.TrimPrefix(s, "sha256:")
	if len(s) == 0 || len(s) > 64 || strings.Trim(s, "0123456789abcdef") != "" {
		return "", false
	}
	return s, true
}

// An error's kind: every error that is somebody else's business wraps one of these.
var (
	ErrInvalid      = errors.New("invalid")
	ErrNotFound     = errors.New("not found")
	ErrConflict     = errors.New("conflict")
	ErrUnauthorized = errors.New("unauthorized")
	ErrUnavailable  = errors.New("unavailable")
)

// A kindError says exactly its text, as docker's clients expect some of them, and is of a kind.
type kindError struct {
	kind error
	text string
}

func (e *kindError) Error() string { return e.text }
func (e *kindError) Unwrap() error { return e.kind }

// errorf is an error of a kind whose text has nothing in front.
func errorf(kind error, format string, args ...any) error {
	return &kindError{kind, fmt.Sprintf(format, args...)}
}
