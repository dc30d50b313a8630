//go:build vm

package server

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/hashicorp/nomad/api"

	"github.com/cradlestack/cradlestack/dockerapi/registry"
	"github.com/cradlestack/cradlestack/internal/nomadtest"
	"github.com/cradlestack/cradlestack/test/dockerd"
)

// imageSteps are commands of docker's, in this order, on both sides. HOST is the registry that both use. What differs from dockerd says why.
var imageSteps = []struct{ command, differs string }{
	{"docker pull HOST/app:1", ""},
	{"docker pull HOST/app:1", ""},
	{"docker pull -q HOST/multi:1", ""},
	{"docker pull HOST/none:1", "dockerd passes the registry's own words on"},
	{"docker pull -a HOST/several", ""},
	{"docker images --format '{{.Repository}} {{.Tag}} {{.ID}} {{.Size}}'", ""},
	{"docker images --digests --no-trunc --format '{{.Repository}} {{.Tag}} {{.Digest}} {{.ID}}'", ""},
	{"docker images -q HOST/app", ""},
	{"docker images -q --filter label=text=two", ""},
	{"docker images --filter reference='HOST/*:1' --format '{{.Repository}}:{{.Tag}}'", ""},
	{"docker images --filter before=HOST/multi:1 --format '{{.Repository}}:{{.Tag}}'", ""},
	{"docker images --filter since=HOST/app:1 --format '{{.Repository}}:{{.Tag}}'", ""},
	{"docker images --filter nonsense=1", "the wording of later versions"},
	{"docker image inspect --format '{{.Id}} {{.RepoTags}} {{.RepoDigests}} {{.Size}} {{.Created}} {{.Author}} {{.Os}}/{{.Architecture}} {{json .Config.Cmd}} {{json .Config.Env}} {{json .Config.Labels}} {{.RootFS}}' HOST/app:1 HOST/multi:1", ""},
	{"docker image inspect none", "the wording of later versions"},
	{"docker inspect --type image --format '{{.Comment}}' HOST/app:1", ""},
	{"docker history --no-trunc --human=false --format '{{.ID}} {{.CreatedAt}} {{.CreatedBy}} {{.Size}} {{.Comment}}' HOST/app:1", ""},
	{"docker tag HOST/app:1 mine:1", ""},
	{"docker tag mine:1 HOST/mine:2", ""},
	{"docker tag none mine:3", ""},
	{"docker tag mine:1 MINE", ""},
	{"docker images --format '{{.Repository}}:{{.Tag}}' | sort", ""}, // the client shows the names of one image in no order
	{"docker push HOST/mine:2", "dockerd makes another manifest when it pushes: here an image keeps the one that it came with"},
	{"docker push HOST/mine:2", "dockerd makes another manifest when it pushes: here an image keeps the one that it came with"},
	{"docker push HOST/absent", ""},
	{"docker push -q HOST/mine:2", ""},
	{"docker images --digests --format '{{.Repository}} {{.Tag}} {{.Digest}}' HOST/mine", "dockerd makes another manifest when it pushes: here an image keeps the one that it came with"},
	{"docker save -o saved.tar mine:1 HOST/multi:1", ""},
	{"docker save mine:1 | tar -xOf - manifest.json | tr , '\\n' | grep -c layer", "dockerd names layers otherwise in its archives"},
	{"docker rmi HOST/app:1", ""},
	{"docker rmi mine:1 HOST/mine:2", "dockerd makes another manifest when it pushes: here an image keeps the one that it came with"},
	{"docker rmi HOST/multi:1", ""},
	{"docker rmi none", ""},
	{"docker load -i saved.tar", ""},
	{"docker load -q -i saved.tar", ""},
	{"docker images --digests --format '{{.Repository}} {{.Tag}} {{.Digest}} {{.ID}} {{.Size}}'", ""},
	{"docker load -i broken.tar", "each has its own words for a broken archive"},
	{"docker tag HOST/multi:1 moving:1", ""},
	{"docker load -i moving.tar", "dockerd tells that the old image has no name any more"},
	{"docker rmi HOST/multi:1", ""},
	{"docker images --format '{{.Repository}}:{{.Tag}} {{.ID}}'", ""},
	{"docker images -f dangling=true -q", ""},
	{"docker rmi $(docker images -q moving) $(docker images -q none)", ""},
	{"docker import --change 'CMD [\"x\"]' --change 'ENV A=b' -m note layer.tar imported:1 >/dev/null", ""},
	{"docker image inspect --format '{{.RepoTags}} {{.Comment}} {{json .Config.Cmd}} {{.Config.Env}} {{.RootFS}} {{.Size}} {{.Os}}' imported:1", ""},
	{"docker image prune -f", ""},
	{"docker tag imported:1 second:1", ""},
	{"docker rmi $(docker images -q imported)", "the id is that of an image made at another time"},
	{"docker rmi -f $(docker images -q imported)", "the id is that of an image made at another time"},
	{"docker image prune -a -f --filter until=1h", ""},
	{"docker system df --format '{{.Type}} {{.TotalCount}} {{.Active}} {{.Size}} {{.Reclaimable}}' | grep Images", ""},
	{"docker pull HOST/moved:1", ""},
	{"move", ""}, // another image is HOST/moved:1 then
	{"docker pull HOST/moved:1", ""},
	{"docker images --digests --format '{{.Repository}} {{.Tag}} {{.Digest}} {{.ID}}' HOST/moved", ""},
	{"docker image prune -f", ""},
	{"docker search x", "searching is not supported"},
	{"docker image prune -a -f", ""},
	{"docker images -a", ""},
}

// TestVMImagesAsDocker gives docker's CLI the same commands about images here and on Debian's dockerd.
func TestVMImagesAsDocker(t *testing.T) {
	for _, tool := range []string{"docker", "tar"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Fatalf("%v: apt-get install --no-install-recommends docker.io tar", err)
		}
	}
	dir, err := os.MkdirTemp("", "dv")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	daemon := startDockerd(t, dir)
	sides := map[string]*imageSide{"dockerd": {daemon.Host, otherRegistry(t), t.TempDir()}}
	own := otherRegistry(t)
	sides["cradle"] = &imageSide{dockerHost(t, openRegistry(t, own), "default"), own, t.TempDir()}
	for _, s := range sides {
		s.prepare(t)
	}
	for _, step := range imageSteps {
		if step.command == "move" {
			for _, s := range sides {
				push(t, s.registry+"/moved:1", textImage(t, "base", "moved to this"))
			}
			continue
		}
		want, got := sides["dockerd"].run(t, step.command), sides["cradle"].run(t, step.command)
		switch {
		case want != got && step.differs == "":
			t.Errorf("%s\ndockerd %s\ncradle  %s", step.command, want, got)
		case want == got && step.differs != "":
			t.Errorf("%s: no difference any more: %s", step.command, step.differs)
		}
	}
}

func startDockerd(t *testing.T, dir string) *dockerd.Daemon {
	t.Helper()
	home := filepath.Join(dir, "d")
	if err := os.Mkdir(home, 0o700); err != nil {
		t.Fatal(err)
	}
	return dockerd.ForTest(t, home)
}

// A build machine's dockerd pushes with what docker login through the server has left.
func TestVMPushFromElsewhere(t *testing.T) {
	dir, err := os.MkdirTemp("", "dv")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	elsewhere := &imageSide{startDockerd(t, dir).Host, "", t.TempDir()}
	r := openRegistry(t)
	front := httptest.NewServer(r.Handler())
	t.Cleanup(front.Close)
	own := strings.TrimPrefix(front.URL, "http://")
	cradle := &imageSide{"unix://" + startUnix(t, Config{Version: "test", Nomad: emptyNomad(t), Registry: r, RegistryHost: own, Local: Access{Namespace: "team-a"}}), own, elsewhere.dir}
	elsewhere.registry = own
	if err := os.WriteFile(filepath.Join(elsewhere.dir, "image.tar"), savedImage(t, "app:1", textImage(t, "one")), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, step := range []struct {
		side          *imageSide
		command, want string
		code          string
	}{
		{elsewhere, "docker load -q -i image.tar && docker tag app:1 HOST/team-a/docker.io/library/app:1 && docker tag app:1 HOST/team-b/docker.io/library/app:1", "Loaded image: app:1", "0"},
		{elsewhere, "docker push -q HOST/team-a/docker.io/library/app:1 >/dev/null 2>&1", "", "1"},
		{cradle, "docker login -u me -p any HOST 2>&1 | grep Succeeded", "Login Succeeded", "0"},
		{elsewhere, "docker push -q HOST/team-a/docker.io/library/app:1", "HOST/team-a/docker.io/library/app:1", "0"},
		{elsewhere, "docker push -q HOST/team-b/docker.io/library/app:1 >/dev/null 2>&1", "", "1"},
		{cradle, "docker images --format '{{.Repository}}:{{.Tag}}'", "app:1", "0"},
		{cradle, "docker logout HOST", "Removing login credentials for HOST", "0"},
		{elsewhere, "docker push -q HOST/team-a/docker.io/library/app:1 >/dev/null 2>&1", "", "1"},
	} {
		if got := step.side.run(t, step.command); !strings.Contains(got, step.want) || !strings.HasSuffix(got, "exit code "+step.code) {
			t.Errorf("%s: %q, want %q and exit code %s", step.command, got, step.want, step.code)
		}
	}
}

// An imageSide is one of the two, with a registry and a folder of its own.
type imageSide struct{ host, registry, dir string }

func (s *imageSide) prepare(t *testing.T) {
	t.Helper()
	push(t, s.registry+"/app:1", textImage(t, "base", "one"))
	push(t, s.registry+"/moved:1", textImage(t, "base", "to be moved"))
	for _, tag := range []string{"a", "b"} {
		push(t, s.registry+"/several:"+tag, textImage(t, "base", "several "+tag))
	}
	idx := mutate.AppendManifests(empty.Index,
		mutate.IndexAddendum{Add: textImage(t, "for another machine"), Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: "s390x"}}},
		mutate.IndexAddendum{Add: textImage(t, "base", "two"), Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: "amd64"}}})
	ref, err := name.NewTag(s.registry+"/multi:1", name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.WriteIndex(ref, idx); err != nil {
		t.Fatal(err)
	}
	for file, data := range map[string][]byte{
		"broken.tar": []byte(strings.Repeat("no archive", 100)), "layer.tar": tarFile(t, "file", "content"), "moving.tar": savedImage(t, "moving:1", textImage(t, "base", "three")),
	} {
		if err := os.WriteFile(filepath.Join(s.dir, file), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// run gives a shell the command and returns what it shows, with this side's names as HOST.
func (s *imageSide) run(t *testing.T, command string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), nomadtest.Patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, "sh", "-c", strings.ReplaceAll(command, "HOST", s.registry))
	cmd.Dir = s.dir
	cmd.Env = append(os.Environ(), "DOCKER_HOST="+s.host, "DOCKER_CONFIG="+s.dir, "DOCKER_CLI_HINTS=false")
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	code := 0
	if err := cmd.Run(); err != nil {
		var exit *exec.ExitError
		if !errors.As(err, &exit) {
			t.Fatalf("%s: %v", command, err)
		}
		code = exit.ExitCode()
	}
	text := strings.ReplaceAll(out.String(), s.registry, "HOST")
	for _, unordered := range []string{"docker pull", "docker push", "docker load", "docker image prune"} { // layers come and go at once, and so on
		if strings.HasPrefix(command, unordered) {
			text = sortedLines(text)
		}
	}
	return text + "exit code " + string(rune('0'+code))
}

// sortedLines leaves out the states of layers that dockerd tells of only when it has time to before the next one.
func sortedLines(s string) string {
	lines := slices.DeleteFunc(strings.Split(s, "\n"), func(line string) bool {
		return slices.ContainsFunc([]string{"Verifying Checksum", "Download complete", "Waiting", "Preparing"}, func(state string) bool { return strings.HasSuffix(line, ": "+state) })
	})
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

// identityJob tells the identity that a node gives to the registry, as nomadjob's jobs give it to their driver.
const identityJob = `
job "identity" {
  type = "batch"
  group "g" {
    task "t" {
      driver = "raw_exec"
      config {
        command = "/bin/echo"
        args    = ["identity ${NOMAD_TOKEN_registry} end"]
      }
      identity {
        name = "registry"
        aud  = ["cradlestack-registry/docker.io/library/app"]
        env  = true
        ttl  = "1h"
      }
    }
  }
}`

// TestVMWorkloadIdentity gives the registry what a real Nomad signs for a task.
func TestVMWorkloadIdentity(t *testing.T) {
	c := nomadtest.Start(t, nomadtest.Options{Drivers: []string{"raw_exec"}})
	r, err := registry.Open(t.Context(), registry.Config{Folder: t.TempDir(), WorkloadKeys: WorkloadKeys(c.API), Log: slog.New(slog.NewTextHandler(t.Output(), nil))})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	front := httptest.NewServer(r.Handler())
	t.Cleanup(front.Close)
	images, err := r.Images("default")
	if err != nil {
		t.Fatal(err)
	}
	for _, ref := range []string{"app:1", "other:1"} {
		if _, err := images.Load(t.Context(), bytes.NewReader(savedImage(t, ref, textImage(t, ref)))); err != nil {
			t.Fatal(err)
		}
	}
	job := c.Run(t, identityJob)
	a := c.UntilAlloc(t, job, "has ended", func(a *api.AllocationListStub) bool { return a.ClientStatus == api.AllocClientStatusComplete })
	said := strings.Fields(c.UntilLogsHave(t, a.ID, "t", "stdout", " end"))
	if len(said) != 3 {
		t.Fatalf("Nomad has given the task no identity: %q", said)
	}
	c.Stop(t, job)
	auth := remote.WithAuth(&authn.Basic{Username: "workload", Password: said[1]})
	for ref, allowed := range map[string]bool{"app:1": true, "other:1": false} {
		i, err := images.Resolve(t.Context(), ref)
		if err != nil {
			t.Fatal(err)
		}
		node, err := name.NewDigest(i.NodeReference(strings.TrimPrefix(front.URL, "http://")), name.Insecure)
		if err != nil {
			t.Fatal(err)
		}
		img, err := remote.Image(node, auth)
		if (err == nil) != allowed {
			t.Errorf("pull %s: %v", ref, err)
		}
		if err == nil {
			if _, err := img.ConfigFile(); err != nil {
				t.Error(err)
			}
		}
	}
}
