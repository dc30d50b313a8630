//go:build vm

package nomad

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/nomad/api"

	"github.com/cradlestack/cradlestack/internal/nomadtest"
	"github.com/cradlestack/cradlestack/test/programs"
)

// A shop is a cluster with the examples at hand.
type shop struct {
	*nomadtest.Cluster
	t        *testing.T
	examples string
	images   string
}

// TestVMExamples runs every job of examples/nomad as it stands.
func TestVMExamples(t *testing.T) {
	root, err := programs.Root()
	if err != nil {
		t.Fatal(err)
	}
	image, err := programs.Image("mariadb")
	if err != nil {
		t.Fatal(err)
	}
	o := nomadtest.Options{Clients: 3, Consul: true, Client: "gc_max_allocs = 100"}
	if err := o.Cradle(""); err != nil {
		t.Fatal(err)
	}
	s := &shop{t: t, examples: filepath.Join(root, "examples/nomad"), images: "oci:" + filepath.Dir(image)}
	s.Cluster = nomadtest.Start(t, o)
	for name, test := range map[string]func(*shop){
		"batch": (*shop).batch, "periodic": (*shop).periodic, "web": (*shop).web, "canary and drain": (*shop).canary, "mariadb": (*shop).mariadb, "nodes die": (*shop).nodesDie,
	} {
		t.Run(name, func(t *testing.T) {
			s := *s
			s.t = t
			s.Begin(t)
			test(&s)
		})
	}
	files, err := filepath.Glob(filepath.Join(s.examples, "*.nomad.hcl"))
	if err != nil || len(files) != 5 {
		t.Errorf("there are the examples %v, %v: each needs a test", files, err)
	}
}

// run runs an example; it returns when its deployment is healthy.
func (s *shop) run(name string, more ...string) {
	s.t.Helper()
	s.CLI(s.t, slices.Concat([]string{"job", "run", "-var", "images=" + s.images}, more, []string{filepath.Join(s.examples, name+".nomad.hcl")})...)
}

func (s *shop) batch() {
	s.run("batch")
	a := s.UntilEnded(s.t, "batch")
	if got := s.CLI(s.t, "alloc", "logs", a.ID); strings.Join(strings.Fields(got), " ") != "2 3 5 7 11 13 17 19 23 29 31 37 41 43 47" {
		s.t.Errorf("primes: %q", got)
	}
	if a.ClientStatus != api.AllocClientStatusComplete {
		s.t.Errorf("it is %s", a.ClientStatus)
	}
}

func (s *shop) periodic() {
	s.run("periodic")
	s.CLI(s.t, "job", "periodic", "force", "periodic")
	var a *api.AllocationListStub
	s.Until(s.t, "a run of job periodic", func(st *nomadtest.State) bool {
		for _, one := range st.Allocs {
			if strings.HasPrefix(one.JobID, "periodic/periodic-") && one.ClientStatus == api.AllocClientStatusComplete {
				a = one
				return true
			}
		}
		return false
	})
	s.UntilWritten(s.t, a)
	if got := s.CLI(s.t, "alloc", "logs", a.ID); !strings.Contains(got, "UTC") {
		s.t.Errorf("date: %q", got)
	}
}

func (s *shop) web() {
	s.run("web")
	a := s.UntilRunning(s.t, "web")
	if got := s.CLI(s.t, "alloc", "exec", "-job", "web", "cat", "/usr/share/nginx/html/index.html"); !strings.Contains(got, "nginx") {
		s.t.Errorf("alloc exec: %q", got)
	}
	if page := s.page(a, "http", "/clock.html"); !strings.Contains(page, "in the pod") {
		s.t.Errorf("the sidecar's page is %q", page)
	}
	for _, service := range []string{"web", "web-inside"} {
		s.healthy(service)
	}
	s.UntilLogsHave(s.t, a.ID, "nginx", "stdout", "GET /")
}

// healthy waits until Consul calls a service's checks passing.
func (s *shop) healthy(service string) {
	s.t.Helper()
	client := s.Server().HTTP()
	defer client.CloseIdleConnections()
	var last string
	for begin := time.Now(); time.Since(begin) < nomadtest.Patience; time.Sleep(200 * time.Millisecond) {
		resp, err := client.Get("http://127.0.0.1:8500/v1/health/service/" + service)
		if err != nil {
			s.t.Fatal(err)
		}
		var found []struct {
			Checks []struct{ Name, Status, Output string }
		}
		err = json.NewDecoder(resp.Body).Decode(&found)
		resp.Body.Close()
		if err != nil {
			s.t.Fatal(err)
		}
		passing := 0
		for _, f := range found {
			for _, c := range f.Checks {
				if c.Name != "Serf Health Status" && c.Status == "passing" {
					passing++
				}
			}
		}
		if len(found) > 0 && passing >= len(found) {
			return
		}
		last = fmt.Sprintf("%+v", found)
	}
	s.t.Errorf("service %s is not healthy: %s", service, last)
}

// page gets a page of an allocation through its published port, as another node does.
func (s *shop) page(a *api.AllocationListStub, label, path string) string {
	s.t.Helper()
	text, err := s.Server().Output(s.t.Context(), "curl", "-sSf", "--retry", "100", "--retry-all-errors", "--retry-delay", "1", "--max-time", "60", "http://"+s.port(a, label)+path)
	if err != nil {
		s.t.Fatal(err)
	}
	return text
}

func (s *shop) port(a *api.AllocationListStub, label string) string {
	s.t.Helper()
	full, _, err := s.API.Allocations().Info(a.ID, nil)
	if err != nil {
		s.t.Fatal(err)
	}
	for _, p := range full.AllocatedResources.Shared.Ports {
		if p.Label == label {
			return fmt.Sprintf("%s:%d", p.HostIP, p.Value)
		}
	}
	s.t.Fatalf("allocation %s has no port %s", a.ID, label)
	return ""
}

// live waits until so many allocations of job canary run, no more and no less.
func (s *shop) live(count int) (all []*api.AllocationListStub) {
	s.t.Helper()
	s.Until(s.t, fmt.Sprintf("%d allocations that run", count), func(st *nomadtest.State) bool {
		all = all[:0]
		for _, a := range st.Of("canary") {
			if nomadtest.Running(a) {
				all = append(all, a)
			}
		}
		return len(all) == count
	})
	return all
}

// deployment waits for one of job canary.
func (s *shop) deployment(what string, f func(*api.Deployment) bool) {
	s.t.Helper()
	s.Until(s.t, what, func(st *nomadtest.State) bool {
		for _, d := range st.Deployments {
			if d.JobID == "canary" && f(d) {
				return true
			}
		}
		return false
	})
}

func (s *shop) canary() {
	s.run("canary")
	for _, a := range s.live(2) {
		if got := s.page(a, "http", "/"); got != "old\n" {
			s.t.Errorf("page: %q", got)
		}
	}
	s.run("canary", "-detach", "-var", "greeting=new")
	s.deployment("a healthy canary", func(d *api.Deployment) bool {
		g := d.TaskGroups["canary"]
		return d.JobVersion == 1 && g != nil && len(g.PlacedCanaries) == 1 && g.HealthyAllocs == 1
	})
	s.live(3)
	s.CLI(s.t, "job", "promote", "canary")
	s.deployment("a whole new version", func(d *api.Deployment) bool { return d.JobVersion == 1 && d.Status == api.DeploymentStatusSuccessful })
	for _, a := range s.live(2) {
		if got := s.page(a, "http", "/"); got != "new\n" {
			s.t.Errorf("page: %q", got)
		}
	}

	// A node is drained: what runs there moves, and comes back to life elsewhere.
	first := s.live(2)[0]
	s.CLI(s.t, "node", "drain", "-enable", "-yes", first.NodeID) // returns when the node is empty
	s.Until(s.t, "two allocations elsewhere", func(st *nomadtest.State) bool {
		n := 0
		for _, a := range st.Of("canary") {
			if nomadtest.Running(a) {
				n++
				if a.NodeID == first.NodeID {
					return false
				}
			}
		}
		return n == 2
	})
	s.CLI(s.t, "node", "drain", "-disable", first.NodeID)
	for _, a := range s.live(2) {
		if got := s.page(a, "http", "/"); got != "new\n" {
			s.t.Errorf("page: %q", got)
		}
	}
}

// stays is a job of one pod on one node.
const stays = `
job "stays" {
  constraint {
    attribute = "${node.unique.name}"
    value     = %q
  }
  group "g" {
    %s
    task "t" {
      driver       = "cradle"
      kill_timeout = "1s"
      config {
        image   = "%s/busybox"
        command = "sh"
        args    = ["-c", "echo up; exec sleep 100000"]
      }
      resources {
        cpu    = 50
        memory = 64
      }
    }
  }
}`

// nodesDie cuts a node's power. Where it is back at once, its pods are started anew; where it stays away, they are elsewhere, and it comes back empty.
func (s *shop) nodesDie() {
	node := s.Clients()[0]
	s.Run(s.t, fmt.Sprintf(stays, node.Name, "", s.images))
	a := s.UntilRunning(s.t, "stays")
	s.UntilLogsHave(s.t, a.ID, "t", "stdout", "up\n")
	if err := errors.Join(node.Crash(), node.Boot()); err != nil {
		s.t.Fatal(err)
	}
	s.UntilAnswers(s.t, a.ID)
	s.UntilLogs(s.t, a.ID, "t", "stdout", func(out string) bool { return out == "up\nup\n" })
	if log, err := os.ReadFile(filepath.Join(node.Dir, "client.log")); err != nil || !strings.Contains(string(log), "the node was rebooted, which has ended the pod") {
		s.t.Errorf("the client's log does not tell of the reboot: %v", err)
	}
	s.Stop(s.t, "stays")

	s.run("canary", "-var", "greeting=alive")
	lost := s.live(2)[0]
	for _, n := range s.Clients() {
		if n.Name == lost.NodeName {
			node = n
		}
	}
	if err := node.Crash(); err != nil {
		s.t.Fatal(err)
	}
	s.Until(s.t, "two allocations on other nodes", func(st *nomadtest.State) bool {
		n := 0
		for _, a := range st.Of("canary") {
			if nomadtest.Running(a) && a.NodeID != lost.NodeID {
				n++
			}
		}
		return n == 2 && st.Node(node.Name).Status == api.NodeStatusDown
	})
	if err := node.Boot(); err != nil {
		s.t.Fatal(err)
	}
	s.Until(s.t, "the node, without pods", func(st *nomadtest.State) bool {
		for _, a := range st.Of("canary") {
			if a.NodeID == lost.NodeID && !nomadtest.Ended(a) {
				return false
			}
		}
		return st.Node(node.Name).Status == api.NodeStatusReady
	})
	for _, a := range s.live(2) {
		if got := s.page(a, "http", "/"); got != "alive\n" {
			s.t.Errorf("page: %q", got)
		}
	}
	s.Run(s.t, fmt.Sprintf(stays, node.Name, "network {\n      mode = \"bridge\"\n    }", s.images))
	s.UntilLogsHave(s.t, s.UntilRunning(s.t, "stays").ID, "t", "stdout", "up\n")
}

func (s *shop) mariadb() {
	s.CLI(s.t, "volume", "create", filepath.Join(s.examples, "mariadb.volume.hcl"))
	defer func() {
		s.Stop(s.t, "mariadb")
		volumes, _, err := s.API.HostVolumes().List(&api.HostVolumeListRequest{}, nil)
		if err != nil || len(volumes) != 1 {
			s.t.Errorf("volumes: %v, %v", volumes, err)
			return
		}
		if _, _, err := s.API.HostVolumes().Delete(&api.HostVolumeDeleteRequest{ID: volumes[0].ID}, nil); err != nil {
			s.t.Error(err)
		}
	}()
	sql := func(statement string) string {
		s.t.Helper()
		return s.CLI(s.t, "alloc", "exec", "-job", "mariadb", "mariadb", "-psecret", "--skip-column-names", "--batch", "shop", "-e", statement)
	}
	s.run("mariadb")
	a := s.UntilRunning(s.t, "mariadb")
	s.answers(a, "sql")
	sql("CREATE TABLE goods (name TEXT, amount INT); INSERT INTO goods VALUES ('cradle', 42)")
	s.Stop(s.t, "mariadb")
	s.run("mariadb")
	b := s.UntilRunning(s.t, "mariadb")
	if a.ID == b.ID {
		s.t.Error("the second run has the first one's allocation")
	}
	s.answers(b, "sql")
	if got := sql("SELECT * FROM goods"); got != "cradle\t42\n" {
		s.t.Errorf("the table has %q", got)
	}
	// What it prints is its log, apart from the errors.
	if got := s.CLI(s.t, "alloc", "logs", "-stderr", b.ID) + s.CLI(s.t, "alloc", "logs", b.ID); !strings.Contains(got, "ready for connections") {
		s.t.Errorf("mariadb logs %q", got)
	}
}

// answers waits for a database that is coming up, by its own client from another node.
func (s *shop) answers(a *api.AllocationListStub, label string) {
	s.t.Helper()
	host, port, _ := strings.Cut(s.port(a, label), ":")
	var err error
	for begin := time.Now(); time.Since(begin) < 2*nomadtest.Patience; time.Sleep(500 * time.Millisecond) {
		if _, err = s.Server().Output(s.t.Context(), "mariadb", "--host="+host, "--port="+port, "--user=root", "--password=secret", "--connect-timeout=5", "-e", "SELECT 1", "shop"); err == nil {
			return
		}
	}
	s.t.Fatalf("%v\n%s", err, s.Logs(s.t, a.ID, "mariadb", "stderr"))
}
