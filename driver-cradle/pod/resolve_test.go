package pod

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cradlestack/cradlestack/driver-cradle/image"
	"github.com/cradlestack/cradlestack/internal/golden"
	"github.com/cradlestack/cradlestack/spec"
)

const testID = "5f0c1b2a5f0c1b2a5f0c1b2a5f0c1b2a5f0c1b2a5f0c1b2a5f0c1b2a5f0c1b2a"

// Each testdata/resolve/NAME.json holds a pod and the images it names (as the configurations of an image); NAME.golden is its Launch.
func TestResolve(t *testing.T) {
	inputs, err := filepath.Glob("testdata/resolve/*.json")
	if err != nil || len(inputs) == 0 {
		t.Fatal("no inputs:", err)
	}
	for _, input := range inputs {
		name := strings.TrimSuffix(filepath.Base(input), ".json")
		t.Run(name, func(t *testing.T) {
			data, err := os.ReadFile(input)
			if err != nil {
				t.Fatal(err)
			}
			var in struct {
				Pod    json.RawMessage          `json:"pod"`
				Images map[string]*image.Config `json:"images"`
			}
			if err := json.Unmarshal(data, &in); err != nil {
				t.Fatal(err)
			}
			p, err := spec.ParsePod(input, in.Pod)
			if err != nil {
				t.Fatal(err)
			}
			images := map[string]*image.Image{}
			for ref, config := range in.Images {
				img := &image.Image{Reference: ref, ID: "sha256:" + derive("id", ref), Digest: "sha256:" + derive("digest", ref), Config: *config}
				for _, id := range config.RootFS.DiffIDs {
					img.Layers = append(img.Layers, image.Layer{DiffID: "sha256:" + derive("layer", id.Encoded())})
				}
				images[ref] = img
			}
			var got []byte
			l, err := Resolve(p, testID, images)
			if err != nil {
				got = []byte("error: " + err.Error() + "\n")
			} else if got, err = json.MarshalIndent(l, "", "  "); err != nil {
				t.Fatal(err)
			} else if got = append(got, '\n'); true {
				if _, err := spec.ParseLaunch("launch.json", got); err != nil {
					t.Errorf("what Resolve gives does not parse: %v", err)
				}
			}
			golden.Compare(t, strings.TrimSuffix(input, ".json")+".golden", got)
		})
	}
}
