//go:build vm

package nomad

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/hashicorp/nomad/api"

	"github.com/cradlestack/cradlestack/internal/nomadtest"
	"github.com/cradlestack/cradlestack/test/programs"
)

// dualNetwork is a network of the reference CNI plugins with both kinds of addresses.
const dualNetwork = `{
  "cniVersion": "0.4.0",
  "name": "dual",
  "plugins": [
    {"type": "loopback"},
    {
      "type": "bridge", "bridge": "dual0", "isGateway": true,
      "ipam": {
        "type": "host-local", "dataDir": %q,
        "ranges": [[{"subnet": "10.99.0.0/24"}], [{"subnet": "fd00:99::/64"}]],
        "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]
      }
    },
    {"type": "portmap", "capabilities": {"portMappings": true}}
  ]
}`

// TestVMNetworks runs a server in Nomad's bridge and in a network of CNI plugins, both of which have IPv6; and a group whose tasks start one after another.
func TestVMNetworks(t *testing.T) {
	image, err := programs.Image("busybox")
	if err != nil {
		t.Fatal(err)
	}
	cni := t.TempDir()
	if err := os.WriteFile(filepath.Join(cni, "dual.conflist"), fmt.Appendf(nil, dualNetwork, filepath.Join(cni, "leases")), 0o644); err != nil {
		t.Fatal(err)
	}
	o := nomadtest.Options{
		Client:   fmt.Sprintf("bridge_network_subnet_ipv6 = \"fd00:26::/64\"\ncni_config_dir = %q", cni),
		Tolerate: regexp.MustCompile("network interface dual0 "), // CNI's plugin leaves its bridge, as Nomad does its own
	}
	if err := o.Cradle(""); err != nil {
		t.Fatal(err)
	}
	c := nomadtest.Start(t, o)
	node := c.Clients()[0]
	jobs := map[string]netip.Prefix{}
	for mode, subnet := range map[string]string{"bridge": "fd00:26::/64", "cni/dual": "fd00:99::/64"} {
		jobs[c.Run(t, fmt.Sprintf(`
job %q {
  group "g" {
    network {
      mode = %q
      port "http" {
        to = 80
      }
      dns {
        servers  = ["192.0.2.53"]
        searches = ["example.org"]
        options  = ["ndots:2"]
      }
    }
    task "main" {
      driver       = "cradle"
      kill_timeout = "1s"
      config {
        image    = "oci:%s"
        hostname = "named"
        command  = "sh"
        args     = ["-c", "mkdir /www; echo a page >/www/index.html; ip -o addr show eth0; ip -6 route; echo $(cat /etc/resolv.conf); cat /etc/hosts; echo up; exec httpd -f -p '[::]:80' -h /www"]
      }
      resources {
        cpu    = 100
        memory = 64
      }
    }
  }
}`, strings.ReplaceAll(mode, "/", "-"), mode, image))] = netip.MustParsePrefix(subnet)
	}
	for job, subnet := range jobs {
		a := c.UntilRunning(t, job)
		text := c.UntilLogsHave(t, a.ID, "main", "stdout", "up\n")
		var own, own4 netip.Addr
		for _, word := range strings.Fields(text) {
			p, err := netip.ParsePrefix(word)
			switch {
			case err != nil:
			case subnet.Contains(p.Addr()) && p.Addr() != subnet.Addr() && p.Bits() == subnet.Bits():
				own = p.Addr()
			case p.Addr().Is4() && p.Addr().IsPrivate():
				own4 = p.Addr()
			}
		}
		if !own.IsValid() || !own4.IsValid() {
			t.Errorf("job %s: the pod has no address in %v, or none of IPv4:\n%s", job, subnet, text)
			continue
		}
		if !regexp.MustCompile(`(?m)^` + regexp.QuoteMeta(own4.String()) + `\s+named$`).MatchString(text) {
			t.Errorf("job %s: /etc/hosts does not have the pod's address:\n%s", job, text)
		}
		if !strings.Contains(text, "nameserver 192.0.2.53 search example.org options ndots:2\n") {
			t.Errorf("job %s: resolv.conf is not the group's:\n%s", job, text)
		}
		full, _, err := c.API.Allocations().Info(a.ID, nil)
		if err != nil {
			t.Fatal(err)
		}
		port := full.AllocatedResources.Shared.Ports[0]
		for _, at := range []string{
			fmt.Sprintf("[%v]:80", own), fmt.Sprintf("%v:80", own4), fmt.Sprintf("%s:%d", port.HostIP, port.Value),
		} {
			out, err := node.Output(t.Context(), "curl", "-gsSf", "--retry", "100", "--retry-all-errors", "--retry-delay", "1", "--max-time", "60", "http://"+at+"/")
			if err != nil || out != "a page\n" {
				t.Errorf("job %s: at %s: %q, %v", job, at, out, err)
			}
		}
		// Out of the pod, and back to itself.
		gateway := subnet.Addr().Next()
		for _, to := range []netip.Addr{gateway, own, netip.IPv6Loopback()} {
			if out, stderr, code := c.TryCLI(t, "", "alloc", "exec", a.ID, "ping", "-c", "1", "-w", "120", to.String()); code != 0 {
				t.Errorf("job %s: ping %v: %s%s", job, to, out, stderr)
			}
		}
		if out, stderr, code := c.TryCLI(t, "", "alloc", "exec", a.ID, "wget", "-qO-", "http://[::1]/"); out != "a page\n" {
			t.Errorf("job %s: at ::1: exit code %d, %q, %s", job, code, out, stderr)
		}
	}
	// One pod after the other has a group's network.
	job := c.Run(t, fmt.Sprintf(steps, image))
	a := c.UntilAlloc(t, job, "begun", func(a *api.AllocationListStub) bool {
		return a.TaskStates["main"] != nil && a.TaskStates["main"].State == "running"
	})
	c.UntilLogsHave(t, a.ID, "main", "stdout", "the same\n")
	c.Stop(t, job)
	c.UntilLogsHave(t, a.ID, "after", "stdout", "still the same\n")
}

// steps is a group whose tasks have its network in turn: one before the main task, and one after it.
const steps = `
job "steps" {
  group "g" {
    network {
      mode = "bridge"
    }
    restart {
      attempts = 0
      mode     = "fail"
    }
    task "before" {
      driver = "cradle"
      lifecycle {
        hook = "prestart"
      }
      config {
        image   = "oci:%[1]s"
        command = "sh"
        args    = ["-c", "ip -o -4 addr show eth0 >/alloc/before"]
      }
      resources {
        cpu    = 50
        memory = 64
      }
    }
    task "main" {
      driver       = "cradle"
      kill_timeout = "1s"
      config {
        image   = "oci:%[1]s"
        command = "sh"
        args    = ["-c", "ip -o -4 addr show eth0 | cmp - /alloc/before && echo the same; exec sleep 100000"]
      }
      resources {
        cpu    = 50
        memory = 64
      }
    }
    task "after" {
      driver = "cradle"
      lifecycle {
        hook = "poststop"
      }
      config {
        image   = "oci:%[1]s"
        command = "sh"
        args    = ["-c", "ip -o -4 addr show eth0 | cmp - /alloc/before && echo still the same"]
      }
      resources {
        cpu    = 50
        memory = 64
      }
    }
  }
}`
