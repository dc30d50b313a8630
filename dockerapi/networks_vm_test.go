//go:build vm

package main

import (
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/hashicorp/nomad/api"

	"github.com/cradlestack/cradlestack/internal/nomadtest"
)

// What is published is shown as it is, in every form, and answers on the node.
func TestVMPorts(t *testing.T) {
	h := openBeside(t)
	const page = "mkdir /www; echo a page >/www/index.html; echo here | nc -ul -p 5353 & exec httpd -f -p 80 -h /www"
	serve := func(args ...string) {
		h.t.Helper()
		h.run(slices.Concat([]string{"run", "-d"}, args, []string{"busybox", "sh", "-c", page})...)
	}
	serve("--name", "fixed", "-p", "8088:80", "-p", "127.0.0.1:8089:80", "-p", "5353:5353/udp", "-p", "5353:5353")
	h.want("0.0.0.0:5353->5353/tcp, 0.0.0.0:5353->5353/udp, 0.0.0.0:8088->80/tcp, 127.0.0.1:8089->80/tcp", "ps", "--format", "{{.Ports}}", "--filter", "name=fixed")
	h.want("80/tcp -> 0.0.0.0:8088\n80/tcp -> 127.0.0.1:8089\n5353/tcp -> 0.0.0.0:5353\n5353/udp -> 0.0.0.0:5353", "port", "fixed")
	serve("--name", "ranged1", "-p", "8090-8091:80")
	serve("--name", "ranged2", "-p", "8090-8091:80")
	h.want("0.0.0.0:8090", "port", "ranged1", "80")
	h.want("0.0.0.0:8091", "port", "ranged2", "80")
	h.wantError(125, "all ports of 8090-8091 are taken", "run", "--name", "ranged3", "-p", "8090-8091:80", "busybox", "true")
	h.wantError(125, "Bind for 0.0.0.0:8088 failed: port is already allocated", "run", "--name", "taken", "-p", "8088:80", "busybox", "true")
	serve("--name", "all", "-P", "--expose", "80")
	chosen := strings.TrimPrefix(h.run("port", "all", "80"), "0.0.0.0:")
	for _, at := range []string{"127.0.0.1:8088", "127.0.0.1:8089", "127.0.0.1:8090", "127.0.0.1:8091", "127.0.0.1:" + chosen} {
		if out, err := h.c.Server().Output(t.Context(), "curl", "-gsSf", "--retry", "120", "--retry-all-errors", "--retry-delay", "1", "http://"+at+"/"); err != nil || out != "a page\n" {
			t.Errorf("at %s: %q, %v", at, out, err)
		}
	}
	h.run("stop", "-t", "0", "fixed")
	h.want("", "ps", "-a", "--format", "{{.Ports}}", "--filter", "name=fixed")
	h.run("start", "fixed")
	h.want("0.0.0.0:8088\n127.0.0.1:8089", "port", "fixed", "80/tcp")
}

// Containers of a network find each other by their names there, and nobody else does.
func TestVMNetworks(t *testing.T) {
	h := openBeside(t)
	h.run("network", "create", "--label", "tier=back", "shop")
	h.run("network", "create", "other")
	t.Cleanup(func() { h.run("network", "prune", "-f") })
	h.want("bridge bridge\nnone null\nother bridge\nshop bridge", "network", "ls", "--format", "{{.Name}} {{.Driver}}")
	h.want("shop", "network", "ls", "--format", "{{.Name}}", "--filter", "label=tier=back", "--filter", "type=custom")
	h.wantError(1, "network with name shop already exists", "network", "create", "shop")
	h.wantError(1, "--subnet.* is not possible: addresses are the nodes'", "network", "create", "--subnet", "10.9.0.0/24", "third")
	h.wantError(1, "--internal is not possible", "network", "create", "--internal", "third")
	h.wantError(1, "operation is not permitted on predefined bridge network", "network", "create", "bridge")
	h.wantError(1, "bridge is a pre-defined network and cannot be removed", "network", "rm", "bridge")
	h.wantError(125, "network missing not found", "run", "--name", "nowhere", "--network", "missing", "busybox", "true")

	serve := func(name, network string, args ...string) {
		h.t.Helper()
		h.run(slices.Concat([]string{"run", "-d", "--name", name, "--network", network}, args,
			[]string{"busybox", "sh", "-c", "mkdir /www; echo " + name + " >/www/index.html; exec httpd -f -p 80 -h /www"})...)
	}
	serve("db", "shop", "--network-alias", "database", "-p", "8092:80")
	serve("inner", "shop", "-p", "127.0.0.1:8093:80")
	serve("cache1", "shop", "--network-alias", "cache")
	serve("cache2", "shop", "--network-alias", "cache")
	const mac = "02:32:1c:23:00:04"
	h.run("run", "-d", "--name", "client", "--network", "shop", "--mac-address", mac, "busybox", "sleep", "10000")
	h.want(mac, "exec", "client", "cat", "/sys/class/net/eth0/address")
	h.want(mac, "inspect", "-f", "{{.NetworkSettings.Networks.shop.MacAddress}}", "client")
	h.want(mac, "run", "--rm", "--mac-address", mac, "busybox", "cat", "/sys/class/net/eth0/address")
	h.run("run", "-d", "--name", "outsider", "--network", "other", "busybox", "sleep", "10000")
	h.run("run", "-d", "--name", "linked", "--network", "shop", "--link", "db:storage", "--link", "db", "busybox", "sleep", "10000")
	h.wantError(125, "cannot link to outsider: it is on none", "run", "--network", "shop", "--link", "outsider", "busybox", "true")
	h.wantError(125, "--link is not possible", "run", "--link", "db", "busybox", "true")
	reach := func(from, name string) string {
		out, err := h.try("", "exec", from, "wget", "-qO-", "http://"+name+"/")
		if err != nil {
			return err.Error()
		}
		return strings.TrimSpace(out)
	}
	h.until("db to answer", func() bool { return reach("client", "db") == "db" })
	for _, name := range []string{"db", "database", "DB", "db.shop", h.run("ps", "-q", "--filter", "name=db")} {
		if got := reach("client", name); got != "db" {
			t.Errorf("db as %s: %s", name, got)
		}
	}
	h.until("a link to answer", func() bool { return reach("linked", "storage") == "db" })
	if got := reach("client", "storage"); got == "db" {
		t.Error("a link of one container is a name to another one")
	}
	h.run("rm", "-f", "linked")
	addresses := strings.Fields(h.run("inspect", "-f", "{{.NetworkSettings.Networks.shop.IPAddress}}", "cache1", "cache2", "db", "client"))
	found := func(from, name string) string {
		out, _ := h.try("", "exec", from, "nslookup", name)
		_, out, _ = strings.Cut(out, "\n\n")
		var all []string
		for _, m := range regexp.MustCompile(`(?m)^Address[^:]*: (\S+)$`).FindAllStringSubmatch(out, -1) {
			all = append(all, m[1])
		}
		slices.Sort(all)
		return strings.Join(all, " ")
	}
	both := slices.Sorted(slices.Values(addresses[:2]))
	h.until("the name of both", func() bool { return found("client", "cache") == strings.Join(both, " ") })
	h.until("those who came first to know who came later", func() bool { return found("db", "client") == addresses[3] })
	if got := found("outsider", "db"); got != "" {
		t.Errorf("db is %s to a container of another network", got)
	}
	if out, err := h.c.Server().Output(t.Context(), "curl", "-gsSf", "http://127.0.0.1:8092/"); err != nil || out != "db\n" {
		t.Errorf("the published port: %q, %v", out, err)
	}
	// One at the node's loopback address is there alone, and the network's own containers find it as any.
	h.want("80/tcp -> 127.0.0.1:8093", "port", "inner")
	h.until("inner to answer", func() bool { return reach("client", "inner") == "inner" })
	if out, err := h.c.Server().Output(t.Context(), "curl", "-gsSf", "http://127.0.0.1:8093/"); err != nil || out != "inner\n" {
		t.Errorf("the port at 127.0.0.1: %q, %v", out, err)
	}
	for _, port := range []string{"8092", "8093"} {
		out, err := h.c.Server().Output(t.Context(), "curl", "-gsSf", "--connect-timeout", "5", "http://"+h.c.Server().IP.String()+":"+port+"/")
		if reached := err == nil; reached != (port == "8092") {
			t.Errorf("port %s at the node's other address: %q, %v", port, out, err)
		}
	}
	h.run("rm", "-f", "inner")
	on := strings.Fields(h.run("network", "inspect", "-f", "{{range .Containers}}{{.Name}}={{.IPv4Address}} {{end}}", "shop"))
	if slices.Sort(on); len(on) != 4 || !strings.HasPrefix(on[3], "db="+addresses[2]+"/") {
		t.Errorf("network inspect tells of %q", on)
	}
	h.wantError(1, "network shop has active endpoints", "network", "rm", "shop")

	// In another namespace a network of the same name on the same node is another one.
	if _, err := h.c.API.Namespaces().Register(&api.Namespace{Name: "neighbour"}, nil); err != nil {
		t.Fatal(err)
	}
	neighbour := h.second("--namespace", "neighbour")
	neighbour.run("network", "create", "shop")
	neighbour.run("run", "-d", "--name", "stranger", "--network", "shop", "busybox", "sleep", "10000")
	lookup := func(name string) string {
		out, _ := neighbour.try("", "exec", "stranger", "nslookup", name)
		return out
	}
	own := neighbour.run("inspect", "-f", "{{.NetworkSettings.Networks.shop.IPAddress}}", "stranger")
	h.until("the neighbour's own name", func() bool { return strings.Contains(lookup("stranger"), own) })
	for _, name := range []string{"db", "database", "db.shop", "cache"} {
		if out := lookup(name); slices.ContainsFunc(addresses, func(a string) bool { return strings.Contains(out, a) }) {
			t.Errorf("%s is known in another namespace: %s", name, out)
		}
	}
	if got := found("client", "stranger"); got != "" {
		t.Errorf("the neighbour's container is %s here", got)
	}
	neighbour.run("rm", "-f", "stranger")
	neighbour.run("network", "rm", "shop")

	// A container may be put on a network, taken off one, and get another name while it runs.
	h.run("network", "connect", "--alias", "guest", "shop", "outsider")
	h.until("a container that was connected to be found", func() bool { return found("client", "guest") != "" })
	h.until("it to find the others", func() bool { return reach("outsider", "db") == "db" })
	h.run("network", "disconnect", "shop", "outsider")
	h.until("it to find them no more", func() bool { return found("outsider", "db") == "" && found("client", "guest") == "" })
	h.run("rename", "cache1", "store")
	h.until("the new name", func() bool { return reach("client", "store") == "cache1" && found("client", "cache1") == "" })
	h.run("run", "-d", "--name", "plain", "busybox", "sleep", "10000")
	h.wantError(1, "stop it first", "network", "connect", "shop", "plain")

	// Names outlive the server, and follow a container to its new address.
	h.kill()
	h.serve()
	h.run("stop", "-t", "0", "db")
	h.until("its name to be gone", func() bool { return found("client", "db") == "" })
	h.run("start", "db")
	h.until("its name to be back", func() bool { return reach("client", "database") == "db" })
}

// Three nodes, and the server on a fourth.
func TestVMNodes(t *testing.T) {
	o := nomadtest.Options{Clients: 3, Keep: []string{"cradle"}, Client: `meta { zone = "{{.Name}}" }`, Server: `min_heartbeat_ttl = "5s"`}
	if err := o.Cradle(""); err != nil {
		t.Fatal(err)
	}
	t.Parallel()
	h := openHostOn(t, nomadtest.Start(t, o))
	t.Run("network", func(t *testing.T) { testNetworkNode(h.in(t)) })
	t.Run("lost", func(t *testing.T) { testNodeLost(h.in(t)) })
}

// testNetworkNode: a network is on one node, to which its containers go; what can't go there is told why.
func testNetworkNode(h *host) {
	h.run("network", "create", "shop")
	h.run("network", "create", "other")
	run := func(args ...string) []string {
		return slices.Concat([]string{"run", "-d"}, args, []string{"busybox", "sleep", "10000"})
	}
	h.run(run("--name", "first", "--network", "shop", "-l", "kr.zone=client1")...)
	h.run(run("--name", "elsewhere", "--network", "other", "-l", "kr.zone=client2")...)
	h.run(run("--name", "second", "--network", "shop")...)
	reaches := func(from, to string) {
		h.t.Helper()
		h.until(from+" to reach "+to, func() bool { _, err := h.try("", "exec", from, "ping", "-c", "1", "-w", "20", to); return err == nil })
	}
	reaches("second", "first")
	h.wantError(125, "no node takes the container.*its networks are on one node", run("--name", "third", "--network", "shop", "-l", "kr.zone=client2")...)
	h.wantError(1, "what is on it is on another node", "network", "connect", "shop", "elsewhere")
	h.run("create", "--name", "both", "--network", "shop", "busybox", "true")
	h.run("network", "connect", "other", "both")
	h.wantError(1, "they are on different nodes", "start", "both")
	h.run("rm", "-f", "first", "second", "both")
	h.run("start", "third")
	h.run("network", "connect", "shop", "elsewhere")
	reaches("third", "elsewhere") // on the other node
	h.run("rm", "-f", "third", "elsewhere")
	h.run("network", "prune", "-f")
}
