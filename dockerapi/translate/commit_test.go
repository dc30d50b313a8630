package translate

import (
	"encoding/json"
	"testing"

	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/network"
)

// What a commit is asked to have stands before what the container has; an entrypoint comes without the container's command.
func TestCommit(t *testing.T) {
	of := &container.Config{
		Hostname: "host", User: "1", Env: []string{"A=container", "B=container"}, Entrypoint: []string{"/entry"}, Cmd: []string{"serve"}, WorkingDir: "/srv",
		Labels: map[string]string{"a": "container", "b": "container"}, Volumes: map[string]struct{}{"/data": {}}, StopSignal: "SIGQUIT",
		ExposedPorts: network.PortSet{network.MustParsePort("80/tcp"): {}}, Healthcheck: &container.HealthConfig{Test: []string{"CMD", "check"}},
	}
	for asked, want := range map[string]string{
		`{}`: `{"User":"1","ExposedPorts":{"80/tcp":{}},"Env":["A=container","B=container"],"Entrypoint":["/entry"],"Cmd":["serve"],"Volumes":{"/data":{}},"WorkingDir":"/srv","Labels":{"a":"container","b":"container"},"StopSignal":"SIGQUIT","Healthcheck":{"Test":["CMD","check"]}}`,
		`{"Env":["A=asked"],"Cmd":["other"],"Labels":{"a":"asked"},"ExposedPorts":{"53/udp":{}},"User":"2"}`: `{"User":"2","ExposedPorts":{"53/udp":{},"80/tcp":{}},"Env":["A=asked","B=container"],"Entrypoint":["/entry"],"Cmd":["other"],"Volumes":{"/data":{}},"WorkingDir":"/srv","Labels":{"a":"asked","b":"container"},"StopSignal":"SIGQUIT","Healthcheck":{"Test":["CMD","check"]}}`,
		`{"Entrypoint":["/other"],"Healthcheck":{"Test":["NONE"]}}`:                                          `{"User":"1","ExposedPorts":{"80/tcp":{}},"Env":["A=container","B=container"],"Entrypoint":["/other"],"Volumes":{"/data":{}},"WorkingDir":"/srv","Labels":{"a":"container","b":"container"},"StopSignal":"SIGQUIT","Healthcheck":{"Test":["NONE"]}}`,
	} {
		var c dockerspec.DockerOCIImageConfig
		if err := json.Unmarshal([]byte(asked), &c); err != nil {
			t.Fatal(err)
		}
		made, err := Commit(c, of)
		if err != nil {
			t.Errorf("%s: %v", asked, err)
			continue
		}
		if got, _ := json.Marshal(made); string(got) != want {
			t.Errorf("%s becomes\n%s\nwant\n%s", asked, got, want)
		}
	}
}
