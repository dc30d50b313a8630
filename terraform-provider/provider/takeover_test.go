package provider

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/hashicorp/nomad/api"

	"github.com/cradlestack/cradlestack/internal/nomadjob"
	"github.com/cradlestack/cradlestack/spec"
)

var containerID = strings.Repeat("0123456789abcdef", 4)

// dockerPod is a container's as docker makes its job.
func dockerPod(t *testing.T, name string, networks ...nomadjob.Network) *foundPod {
	t.Helper()
	command := []string{"sleep", "1"}
	p := &spec.Pod{Name: name, Hostname: containerID[:12], Resources: spec.Resources{Memory: 128 << 20}, Containers: []spec.PodContainer{{Name: "main", Image: "oci:/nowhere", Command: &command, Env: []string{"B=2", "A=1"}}}}
	p.Containers[0].ShmSize = spec.DefaultShmSize
	p.Containers[0].Lifecycle = spec.Lifecycle{Critical: true, Hold: spec.Duration(1e10)}
	o := nomadjob.Options{
		ID: nomadjob.DockerPrefix + containerID, Namespace: "default", PodID: containerID, DiskID: containerID, Bare: true, Networks: networks, Bridge: len(networks) > 0,
		Meta: map[string]string{nomadjob.ContainerMeta: containerID, "run": "2", "try": "0"},
	}
	job, err := nomadjob.Job(p, o)
	if err != nil {
		t.Fatal(err)
	}
	f := &foundPod{job: job}
	env, _ := nomadjob.EnvItems(p, nil)
	if f.pod, f.options, err = nomadjob.Pod(job, env); err != nil {
		t.Fatal(err)
	}
	return f
}

// A container that can't be taken over is refused with the reason, and one that is goes by check-and-set, before its name.
func TestTakesOver(t *testing.T) {
	const other = "other"
	record := func(edit map[string]any) string {
		r := map[string]any{
			"version": 1, "id": containerID, "name": "web", "hostConfig": map[string]any{"AutoRemove": false}, "want": "running", "run": 2, "last": map[string]any{"number": 1},
		}
		for name, v := range edit {
			r[name] = v
		}
		text, _ := json.Marshal(r)
		return string(text)
	}
	for name, c := range map[string]struct {
		record, other, owner string
		networks             []nomadjob.Network
		conflict             bool
		want                 string // of the error
		removed              []string
	}{
		"as it runs":            {record: record(nil), owner: containerID, removed: []string{"docker/containers/" + containerID, "docker/names/web"}},
		"killed in between":     {owner: containerID, removed: []string{"docker/names/web"}},
		"its name is another's": {record: record(nil), owner: other, removed: []string{"docker/containers/" + containerID}},
		"nothing is left":       {},
		"docker was quicker":    {record: record(nil), owner: containerID, conflict: true, want: "at the same time"},
		"stopped":               {record: record(map[string]any{"want": "stopped"}), want: "docker start web first"},
		"ended":                 {record: record(map[string]any{"last": map[string]any{"number": 2}}), want: "docker start web first"},
		"removed":               {record: record(map[string]any{"want": "removed"}), want: "about to remove it"},
		"started anew":          {record: record(map[string]any{"run": 3}), want: "just starting"},
		"tried again":           {record: record(map[string]any{"try": 1}), want: "just starting"},
		"--rm":                  {record: record(map[string]any{"hostConfig": map[string]any{"AutoRemove": true}}), want: "--rm"},
		"joins":                 {record: record(map[string]any{"joins": other}), want: "--network container:"},
		"is joined": {
			record: record(nil), other: record(map[string]any{"id": other, "name": "beside", "joins": containerID}), want: "docker rm -f beside first",
		},
		"on networks":    {record: record(nil), networks: []nomadjob.Network{{Service: "net-1", Names: []string{"web"}}}, want: "it is on networks"},
		"another format": {record: record(map[string]any{"version": 2}), want: "no record that this version reads"},
	} {
		t.Run(name, func(t *testing.T) {
			vars := map[string]api.Variable{}
			put := func(path, item, text string) {
				if text != "" {
					vars[path] = api.Variable{Path: path, ModifyIndex: 7, Items: api.VariableItems{item: text}}
				}
			}
			put("docker/containers/"+containerID, "record", c.record)
			put("docker/containers/"+other, "record", c.other)
			put("docker/names/web", "id", c.owner)
			var removed []string
			s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if r.URL.Path == "/v1/vars" {
					all := []api.VariableMetadata{}
					for path := range vars {
						if strings.HasPrefix(path, r.URL.Query().Get("prefix")) {
							all = append(all, api.VariableMetadata{Path: path})
						}
					}
					json.NewEncoder(w).Encode(all)
					return
				}
				path := strings.TrimPrefix(r.URL.Path, "/v1/var/")
				v, ok := vars[path]
				switch {
				case r.Method == http.MethodDelete && (c.conflict || r.URL.Query().Get("cas") != "7"):
					w.WriteHeader(http.StatusConflict)
					json.NewEncoder(w).Encode(v)
				case r.Method == http.MethodDelete:
					removed = append(removed, path)
					w.WriteHeader(http.StatusNoContent)
				case !ok:
					http.Error(w, "variable not found", http.StatusNotFound)
				default:
					json.NewEncoder(w).Encode(v)
				}
			}))
			defer s.Close()
			nomad, err := api.NewClient(&api.Config{Address: s.URL})
			if err != nil {
				t.Fatal(err)
			}
			err = (&cluster{nomad: nomad}).take(context.Background(), dockerPod(t, "web", c.networks...))
			if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
				t.Errorf("got %v, want %q", err, c.want)
			}
			if fmt.Sprint(removed) != fmt.Sprint(c.removed) {
				t.Errorf("removed %v, want %v", removed, c.removed)
			}
		})
	}
}

// A container runs on where nothing else changes, and is started anew, without what docker alone needs, where something does.
func TestGoesOn(t *testing.T) {
	for name, edit := range map[string]func(*spec.Pod){"runs on": func(*spec.Pod) {}, "started anew": func(p *spec.Pod) { p.Containers[0].User = "1" }} {
		f := dockerPod(t, "web")
		if !f.isDocker() {
			t.Fatal("it is not docker's")
		}
		p := *f.pod
		p.Name, p.Containers = f.options.ID, []spec.PodContainer{f.pod.Containers[0]}
		p.Containers[0].ShmSize, p.Containers[0].Lifecycle.Hold, p.Containers[0].Env = 0, 0, []string{"A=1", "B=2"}
		edit(&p)
		w := &wish{pod: &p, options: nomadjob.Options{ID: f.options.ID, Namespace: f.options.Namespace}}
		w.keep(f.options)
		w.goOn(f)
		job, err := nomadjob.Job(w.pod, w.options)
		if err != nil {
			t.Fatal(err)
		}
		if !nomadjob.TakenOver(job) {
			t.Errorf("%s: the job is docker's", name)
		}
		was, _ := json.Marshal([]any{f.job.TaskGroups, f.job.Meta})
		is, _ := json.Marshal([]any{job.TaskGroups, job.Meta})
		if same := string(was) == string(is); same != (name == "runs on") {
			t.Errorf("%s: the pod is\n%s\nand was\n%s", name, is, was)
		}
		if held := w.pod.Containers[0].Lifecycle.Hold != 0; held != (name == "runs on") {
			t.Errorf("%s: held: %v", name, held)
		}
	}
}
