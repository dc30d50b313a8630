package seal

import (
	"encoding/json"
	"fmt"
	"path"
	"strings"
)

// ImagePath is where an image's description lies in it: always the second
// entry, after the folder.
const (
	ImageDir  = ".bali"
	ImagePath = ImageDir + "/image.json"
)

const (
	imageVersion  = 1
	maxImageBytes = 1 << 20
)

// Image says how the root file system beside it is started. Fields that a
// reader doesn't know are ignored; what can't be ignored raises Version.
type Image struct {
	Version      int    `json:"version"`      // 1
	OS           string `json:"os"`           // "linux"
	Architecture string `json:"architecture"` // Go's name: amd64, arm64
	// Variant of the architecture, as OCI has it: v7, v8.
	Variant    string   `json:"variant,omitempty"`
	Entrypoint []string `json:"entrypoint,omitempty"`
	Cmd        []string `json:"cmd,omitempty"`
	Env        []string `json:"env,omitempty"`     // NAME=VALUE
	Workdir    string   `json:"workdir,omitempty"` // absolute; empty is /
	// User is a name or number, with an optional :group, looked up in the
	// image's own passwd and group files; empty is root.
	User string `json:"user,omitempty"`
	// StopSignal is what systemd is told to stop the service with.
	StopSignal string            `json:"stopSignal,omitempty"`
	Labels     map[string]string `json:"labels,omitempty"`
	// Source is where the image was built from, for people.
	Source string `json:"source,omitempty"`
}

// Validate checks what the rest of the program relies on.
func (i *Image) Validate() error {
	if i.Version != imageVersion {
		return fmt.Errorf("%w: image version %d: this bali knows version %d, get a newer one", ErrFormat, i.Version, imageVersion)
	}
	if i.OS == "" || i.Architecture == "" {
		return fmt.Errorf("%w: no os or architecture in %s", ErrFormat, ImagePath)
	}
	for _, e := range i.Env {
		if k, _, ok := strings.Cut(e, "="); !ok || k == "" {
			return fmt.Errorf("%w: environment %q is not NAME=VALUE", ErrFormat, e)
		}
	}
	if i.Workdir != "" && !path.IsAbs(i.Workdir) {
		return fmt.Errorf("%w: working directory %q is not absolute", ErrFormat, i.Workdir)
	}
	texts := append([]string{i.OS, i.Architecture, i.Variant, i.Workdir, i.User, i.StopSignal}, i.Entrypoint...)
	texts = append(append(texts, i.Cmd...), i.Env...)
	for _, s := range texts {
		if strings.ContainsRune(s, 0) {
			return fmt.Errorf("%w: NUL in %q", ErrFormat, s)
		}
	}
	return nil
}

// marshal is the one encoding of an image: same image, same bytes.
func (i *Image) marshal() ([]byte, error) {
	b, err := json.MarshalIndent(i, "", "  ") // maps come sorted
	if err != nil {
		return nil, err
	}
	if b = append(b, '\n'); len(b) > maxImageBytes {
		return nil, fmt.Errorf("%s has %d bytes, at most %d fit: drop labels or environment", ImagePath, len(b), maxImageBytes)
	}
	return b, nil
}

func parseImage(b []byte) (*Image, error) {
	i := new(Image)
	if err := json.Unmarshal(b, i); err != nil {
		return nil, fmt.Errorf("%w: %s: %w", ErrFormat, ImagePath, err)
	}
	return i, i.Validate()
}
