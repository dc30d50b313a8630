//go:build vm && soak

package main

import (
	"bytes"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/nomad/api"

	"github.com/cradlestack/cradlestack/internal/nomadtest"
	"github.com/cradlestack/cradlestack/test/programs"
)

// nodePod is a pod that sleeps, with more of what it says.
func nodePod(name, image, more string) string {
	return fmt.Sprintf(`
resource "cradle_pod" %q {
  name    = %[1]q
  memory  = "64MiB"
  rollout = { min_healthy = "100ms" }
  container {
    name        = "main"
    image       = "oci:%s"
    command     = ["sleep", "100000"]
    stop_signal = "SIGKILL"
  }
  %s
}
`, name, image, more)
}

// nodesSeen is what another configuration sees of nodes and of where pods are.
const nodesSeen = `
provider "cradle" {}
data "cradle_nodes" "all" {}
data "cradle_pods" "all" {}
output "nodes" {
  value = join(" ", [for n in data.cradle_nodes.all.nodes : "${n.name}=${n.status},${n.eligible},${n.runs_pods},${n.variant}"])
}
output "pods" {
  value = join(" ", [for p in data.cradle_pods.all.pods : "${p.name}=${p.status}:${join(",", sort(p.instances[*].node))}"])
}
`

// Pods are on the nodes that their configuration says, and a plan changes nothing when Nomad moves those that it may, or can't.
func TestSoakTerraformNodes(t *testing.T) {
	image, err := programs.Image("busybox")
	if err != nil {
		t.Fatal(err)
	}
	o := nomadtest.Options{Clients: 2, ACL: true, Client: `meta { zone = "{{.Name}}" }`, Server: `min_heartbeat_ttl = "5s"`}
	if err := o.Cradle(""); err != nil {
		t.Fatal(err)
	}
	c := nomadtest.Start(t, o)
	one, two := c.Clients()[0], c.Clients()[1]
	w, eyes := openWorkspace(t, c), openWorkspace(t, c)
	eyes.write(nodesSeen)
	seen := func(output string) string {
		t.Helper()
		eyes.run("apply", "-auto-approve", "-no-color")
		return eyes.output(output)
	}
	var names []string
	hcl := func(zone string, more ...string) string {
		pods := map[string]string{
			"zoned":       `zone = "` + zone + `"`,
			"bound":       `node = local.nodes["client2"]`,
			"constrained": "constraint {\n    attribute = \"$${node.unique.name}\"\n    value     = \"client2\"\n  }",
			"spread":      "replicas = 2\n  constraint {\n    operator = \"distinct_hosts\"\n  }",
			"free":        "",
			"shop-a":      `networks = { (cradle_network.shop.name) = {} }`,
			"shop-b":      `networks = { (cradle_network.shop.name) = {} }`,
		}
		names = slices.Sorted(maps.Keys(pods))
		text := "provider \"cradle\" {}\ndata \"cradle_nodes\" \"all\" {}\nlocals {\n  nodes = { for n in data.cradle_nodes.all.nodes : n.name => n.id }\n}\nresource \"cradle_network\" \"shop\" {\n  name = \"shop\"\n}\n"
		for _, name := range names {
			text += nodePod(name, image, pods[name])
		}
		return text + strings.Join(more, "")
	}
	// where are the nodes of pods, by these.
	where := func() map[string]string {
		t.Helper()
		all := map[string]string{}
		for _, p := range strings.Fields(seen("pods")) {
			name, is, _ := strings.Cut(p, "=")
			all[name] = is
		}
		return all
	}
	expect := func(what string, want map[string]string) {
		t.Helper()
		last := map[string]string{}
		eventually(t, c, what, func() bool {
			last = where()
			t.Logf("%s: %v", what, last)
			for name, is := range want {
				if last[name] != is {
					return false
				}
			}
			return len(last) == len(names)
		})
	}
	w.apply(hcl("client2"))
	w.unchanged()
	expect("all pods", map[string]string{"zoned": "running:client2", "bound": "running:client2", "constrained": "running:client2", "spread": "running:client1,client2"})
	is := where()
	if is["shop-a"] != is["shop-b"] || !strings.HasPrefix(is["free"], "running:") {
		t.Errorf("the pods are %v", is)
	}
	if got, want := seen("nodes"), "client1=ready,true,true,default client2=ready,true,true,default"; got != want {
		t.Errorf("the nodes are %q, want %q", got, want)
	}

	// What no node takes is told of all of them; another zone moves a pod, in place.
	w.write(hcl("client2", nodePod("nowhere", image, `zone = "nowhere"`)))
	w.fails([]string{"2 of 2: ${meta.zone} = nowhere"}, "apply", "-auto-approve", "-no-color")
	w.write(hcl("client1"))
	all, said := w.plan()
	if z := all["cradle_pod.zoned"]; z.onlyIn("zone") != nil || z.actions() != string(inPlace) || all["cradle_pod.nowhere"].actions() != "delete" || len(all) != 2 {
		t.Errorf("another zone is %v:\n%s", all, said)
	}
	w.run("apply", "-auto-approve", "-no-color")
	w.unchanged()
	expect("the move", map[string]string{"zoned": "running:client1"})

	// Equal pods are changed one after another: there is always one.
	var out bytes.Buffer
	w.write(strings.Replace(hcl("client1"), `name    = "spread"`, "name    = \"spread\"\n  hostname = \"other\"", 1))
	cmd := w.start(&out, "apply", "-auto-approve", "-no-color")
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	least := 2
	for over := false; !over; {
		select {
		case err := <-ended:
			if over = true; err != nil {
				t.Fatalf("apply: %v\n%s", err, &out)
			}
		case <-time.After(20 * time.Millisecond):
			allocs, _, err := c.API.Jobs().Allocations("spread", false, nil)
			if err != nil {
				t.Fatal(err)
			}
			n := 0
			for _, a := range allocs {
				if nomadtest.Running(a) {
					n++
				}
			}
			least = min(least, n)
		}
	}
	if least != 1 {
		t.Errorf("while two pods were changed, at least %d ran, want 1", least)
	}
	w.apply(hcl("client1"))
	w.unchanged()

	// A node is drained: what may go elsewhere goes, what may not waits, and nothing of that is a change.
	node := func(n *nomadtest.Node) (found *api.NodeListStub) {
		t.Helper()
		nodes, _, err := c.API.Nodes().List(nil)
		if err != nil {
			t.Fatal(err)
		}
		i := slices.IndexFunc(nodes, func(s *api.NodeListStub) bool { return s.Name == n.Name })
		if i < 0 {
			t.Fatalf("there is no node %s", n.Name)
		}
		return nodes[i]
	}
	drain := func(o *api.DrainOptions) {
		t.Helper()
		if _, err := c.API.Nodes().UpdateDrainOpts(node(one).ID, o, nil); err != nil {
			t.Fatal(err)
		}
	}
	drain(&api.DrainOptions{DrainSpec: &api.DrainSpec{Deadline: -1}})
	expect("the drain", map[string]string{"zoned": "pending:", "spread": "pending:client2", "free": "running:client2", "bound": "running:client2"})
	if got := seen("nodes"); !strings.HasPrefix(got, "client1=ready,false,true,") {
		t.Errorf("the nodes are %q", got)
	}
	w.unchanged()
	drain(&api.DrainOptions{MarkEligible: true})
	expect("what waited", map[string]string{"zoned": "running:client1", "spread": "running:client1,client2"})
	w.unchanged()

	// A node is lost: a plan changes nothing, also before Nomad knows; what can run elsewhere does, and goes on being changed.
	if err := two.Crash(); err != nil {
		t.Fatal(err)
	}
	w.unchanged()
	c.Until(t, "the loss of "+two.Name, func(s *nomadtest.State) bool { return s.Node(two.Name).Status == api.NodeStatusDown })
	expect("the loss", map[string]string{"free": "running:client1", "zoned": "running:client1", "bound": "pending:", "constrained": "pending:", "spread": "pending:client1"})
	if got := seen("nodes"); !strings.Contains(got, "client2=down,") {
		t.Errorf("the nodes are %q", got)
	}
	w.unchanged()
	w.write(strings.Replace(hcl("client1"), `name    = "zoned"`, "name    = \"zoned\"\n  hostname = \"other\"", 1))
	w.run("apply", "-auto-approve", "-no-color")
	w.unchanged()

	if err := two.Boot(); err != nil {
		t.Fatal(err)
	}
	expect("its return", map[string]string{"bound": "running:client2", "constrained": "running:client2", "spread": "running:client1,client2"})
	w.unchanged()
	w.run("destroy", "-auto-approve", "-no-color")
	for _, prefix := range []string{"docker/networks/", "nomad/jobs/"} {
		if left, _, err := c.API.Variables().PrefixList(prefix, nil); err != nil || len(left) > 0 {
			t.Errorf("left at %s: %v, %v", prefix, left, err)
		}
	}
}
