package driver

import (
	"encoding/json"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/hashicorp/nomad/api"
	"github.com/hashicorp/nomad/plugins/drivers"

	"github.com/cradlestack/cradlestack/internal/nomadjob"
	"github.com/cradlestack/cradlestack/spec"
)

// What nomadjob writes into jobs is what this driver reads out of them: no key is missing, and no text is changed on the way.
func TestJobsOfNomadjob(t *testing.T) {
	files, err := filepath.Glob("../../internal/nomadjob/testdata/*.json")
	if err != nil || len(files) == 0 {
		t.Fatal(err, files)
	}
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			data, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			var job api.Job
			if err := json.Unmarshal(data, &job); err != nil {
				t.Fatal(err)
			}
			want, _, err := nomadjob.Pod(&job, nil)
			if err != nil {
				t.Fatal(err)
			}
			task := job.TaskGroups[0].Tasks[0]
			if auth, ok := task.Config["auth"].(map[string]any); ok { // Nomad puts the token of the task's identity in its place
				auth["password"] = "token"
			}
			var encoded drivers.TaskConfig
			var c taskConfig
			if err := decode(t, taskSchema(), task.Config, &encoded); err != nil {
				t.Fatal(err)
			}
			if err := encoded.DecodeDriverConfig(&c); err != nil {
				t.Fatal(err)
			}
			c.DiskID, c.Copied, c.NotCopied, c.Subpaths = "", nil, nil, nil // tests of their own
			nomads := aTask(task)
			nomads.Resources.Ports = nil
			if len(job.TaskGroups[0].Networks) > 0 {
				c.Ports, c.HostIPs = nil, nil // they are Nomad's to allocate
			}
			h := aHost()
			h.readEnv = func(string, string) ([]string, error) { return nil, nil }
			got, err := podOf(nomads, &c, h)
			if err != nil {
				t.Fatal(err)
			}
			for i := range want.Containers {
				if w, g := comparable(want.Containers[i]), comparable(got.Containers[i]); !reflect.DeepEqual(w, g) {
					t.Errorf("container %s is\n%s\nwant\n%s", want.Containers[i].Name, asText(t, g), asText(t, w))
				}
			}
			if want.Hostname != got.Hostname || !reflect.DeepEqual(want.Network.ExtraHosts, got.Network.ExtraHosts) || !reflect.DeepEqual(want.Network.DNS, got.Network.DNS) {
				t.Errorf("the pod is\n%s\nwant\n%s", asText(t, got), asText(t, want))
			}
		})
	}
}

// comparable leaves out what Nomad and the client add, or say themselves.
func comparable(c spec.PodContainer) spec.PodContainer {
	var env []string
	for _, e := range c.Env {
		if !strings.HasPrefix(e, "NOMAD_") {
			env = append(env, e)
		}
	}
	c.Env, c.Mounts, c.Resources.Memory, c.StopSignal, c.StopTimeout = env, nil, 0, "", nil
	if c.Command != nil && len(*c.Command) == 0 {
		c.Command = nil
	}
	return c
}

func asText(t *testing.T, v any) string {
	t.Helper()
	data, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}
