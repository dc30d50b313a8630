//go:build vm

package nomadtest

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/nomad/api"
	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/internal/agents"
	"github.com/cradlestack/cradlestack/test/programs"
)

// A service of the host's own programs, which needs no image: it answers with its address.
const service = `
job "hello" {
  group "g" {
    count = %d
    %s
    task "t" {
      driver = "raw_exec"
      config {
        command = "/bin/sh"
        args    = ["-c", "echo up; exec sleep 100000"]
      }
    }
  }
}`

const consulNetwork = `
    network {
      mode = "bridge"
      port "http" {
        static = 8080
        to     = 80
      }
    }
    service {
      name     = "hello"
      port     = "http"
      provider = "consul"
    }`

func TestRootOneNode(t *testing.T) {
	c := Start(t, Options{Drivers: []string{"raw_exec"}})
	n := c.Clients()[0]
	job := c.Run(t, fmt.Sprintf(service, 1, ""))
	a := c.UntilRunning(t, job)
	c.UntilLogsHave(t, a.ID, "t", "stdout", "up")
	if got := c.CLI(t, "alloc", "exec", a.ID, "sh", "-c", "echo $NOMAD_TASK_NAME"); got != "t\n" {
		t.Errorf("alloc exec: %q", got)
	}
	if _, stderr, code := c.TryCLI(t, "", "alloc", "status", "abcdef"); code != 1 || !strings.Contains(stderr, "abcdef") {
		t.Errorf("alloc status of nonsense: %d, %q", code, stderr)
	}

	// The client is killed and comes back; the task goes on.
	before := pidOf(t, n, "sleep")
	if err := n.KillClient(); err != nil {
		t.Fatal(err)
	}
	if n.ClientPID() != 0 {
		t.Error("the client runs after it has been killed")
	}
	if err := n.StartAgents(); err != nil {
		t.Fatal(err)
	}
	c.UntilAnswers(t, a.ID)
	c.CLI(t, "job", "eval", job)
	if got := c.CLI(t, "alloc", "exec", a.ID, "echo", "still here"); got != "still here\n" {
		t.Errorf("alloc exec after the client's restart: %q", got)
	}
	if after := pidOf(t, n, "sleep"); after != before {
		t.Errorf("the task was process %d and is %d", before, after)
	}

	// The server is killed; what has happened is still known.
	if err := n.KillServer(); err != nil {
		t.Fatal(err)
	}
	if err := n.StartAgents(); err != nil {
		t.Fatal(err)
	}
	c.Stop(t, job)
	if found, err := n.Processes(); err != nil || contains(found, "sleep") {
		t.Errorf("after the job's end there are %v, %v", found, err)
	}
}

func contains(list []Process, name string) bool {
	for _, p := range list {
		if p.Name() == name {
			return true
		}
	}
	return false
}

func pidOf(t *testing.T, n *Node, name string) int {
	t.Helper()
	list, err := n.Processes()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range list {
		if p.Name() == name {
			return p.PID
		}
	}
	t.Fatalf("no %s in %v", name, list)
	return 0
}

func TestRootCluster(t *testing.T) {
	c := Start(t, Options{Clients: 3, Consul: true, ACL: true, Drivers: []string{"raw_exec"}})
	job := c.Run(t, fmt.Sprintf(service, 3, consulNetwork))
	c.Until(t, "one allocation on each client", func(s *State) bool {
		nodes := map[string]bool{}
		for _, a := range s.Of(job) {
			if Running(a) {
				nodes[a.NodeName] = true
			}
		}
		return len(nodes) == 3
	})
	client := c.Server().HTTP()
	defer client.CloseIdleConnections()
	ctx, cancel := context.WithTimeout(t.Context(), Patience)
	defer cancel()
	if err := agents.Retry(ctx, "three services in Consul", func() error { // each node's Consul tells the server's in its own time
		resp, err := client.Get("http://127.0.0.1:8500/v1/catalog/service/hello")
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		var entries []struct{ Address string }
		if err := json.NewDecoder(resp.Body).Decode(&entries); err != nil {
			return err
		}
		if len(entries) != 3 {
			return fmt.Errorf("it knows %v", entries)
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
	// Nodes reach each other, and the test reaches them.
	two := c.Clients()[1]
	l, err := two.Listen("tcp", net.JoinHostPort(two.IP.String(), "9000"))
	if err != nil {
		t.Fatal(err)
	}
	s := http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, r.RemoteAddr) })}
	go s.Serve(l)
	defer s.Close()
	from := c.Clients()[0].HTTP()
	defer from.CloseIdleConnections()
	resp, err := from.Get("http://" + l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if text, _ := io.ReadAll(resp.Body); !strings.HasPrefix(string(text), c.Clients()[0].IP.String()+":") {
		t.Errorf("the first client calls the second from %s", text)
	}

	// A power cut: the node is lost, another boot id comes up in its place, the job is whole again.
	id := func() string {
		text, err := two.Output(t.Context(), "cat", "/proc/sys/kernel/random/boot_id")
		if err != nil {
			t.Fatal(err)
		}
		return text
	}
	before := id()
	if err := two.Crash(); err != nil {
		t.Fatal(err)
	}
	if err := two.Boot(); err != nil {
		t.Fatal(err)
	}
	if after := id(); after == before || len(after) != len(before) {
		t.Errorf("boot id %s after %s", after, before)
	}
	c.Until(t, "an allocation on the node that was away", func(s *State) bool {
		for _, a := range s.Of(job) {
			if a.NodeName == two.Name && Running(a) && restarted(a) {
				return true
			}
		}
		return false
	})
}

// restarted says whether an allocation's task was started again, or is new since its node was away.
func restarted(a *api.AllocationListStub) bool {
	for _, t := range a.TaskStates {
		if t.Restarts > 0 || len(t.Events) < 5 {
			return true
		}
	}
	return false
}

// Pods run in nodes as they do on hosts.
func TestVMCradle(t *testing.T) {
	var o Options
	if err := o.Cradle(""); err != nil {
		t.Fatal(err)
	}
	image, err := programs.Image("busybox")
	if err != nil {
		t.Fatal(err)
	}
	c := Start(t, o)
	job := c.Run(t, fmt.Sprintf(`
job "page" {
  group "g" {
    network {
      mode = "bridge"
      port "http" {
        static = 8080
        to     = 80
      }
    }
    task "t" {
      driver = "cradle"
      config {
        image   = "oci:%s"
        command = "sh"
        args    = ["-c", "echo up; mkdir /www; echo a page >/www/index.html; exec httpd -f -p 80 -h /www"]
      }
    }
  }
}`, image))
	a := c.UntilRunning(t, job)
	c.UntilLogsHave(t, a.ID, "t", "stdout", "up")
	n := c.Clients()[0]
	if page, err := n.Output(t.Context(), "curl", "-sSf", "--retry", "100", "--retry-all-errors", "--retry-delay", "1", "http://"+n.IP.String()+":8080/"); err != nil || page != "a page\n" {
		t.Errorf("the page is %q, %v", page, err)
	}
	if got := c.CLI(t, "alloc", "exec", a.ID, "cat", "/proc/1/comm"); got != "httpd\n" {
		t.Errorf("alloc exec: %q", got)
	}
}

// Every kind of thing that a job might leave behind is found.
func TestRootLeaksAreFound(t *testing.T) {
	c := Start(t, Options{Drivers: []string{"raw_exec"}})
	n := c.Clients()[0]
	before, err := n.inventory()
	if err != nil {
		t.Fatal(err)
	}
	if err := n.remains(before); err != nil {
		t.Fatal(err)
	}
	all, err := hierarchies()
	if err != nil {
		t.Fatal(err)
	}
	sh := func(script string) {
		t.Helper()
		if _, err := n.Output(t.Context(), "sh", "-ec", script); err != nil {
			t.Fatal(err)
		}
	}
	for name, leak := range map[string]struct{ make, want, remove string }{
		"process":          {`setsid sleep 4711 >/dev/null 2>&1 & while ! pidof sleep; do sleep 0.01; done`, `process \d+ of \d+: sleep 4711`, `kill $(pidof sleep)`},
		"deep process":     {`setsid unshare --pid --fork --kill-child sleep 4711 >/dev/null 2>&1 & while ! pidof sleep; do sleep 0.01; done`, `process \d+ of \d+: sleep 4711`, `kill -9 $(pidof unshare)`},
		"mount":            {`mkdir m; mount -t tmpfs leak m`, `mount tmpfs at .*/m`, `umount m; rmdir m`},
		"network space":    {`ip netns add leak`, `mount nsfs at /run/netns/leak`, `ip netns del leak`},
		"tap":              {`ip tuntap add leak0 mode tap`, `network interface leak0 \(tuntap\)`, `ip link del leak0`},
		"veth":             {`ip link add leak0 type veth peer name leak1`, `network interface leak0 \(veth\)`, `ip link del leak0`},
		"cgroup":           {`mkdir ` + all[0].path + `/leak`, `cgroup .*/leak`, `rmdir ` + all[0].path + `/leak`},
		"firewall rule":    {`iptables -t nat -N CNI-DN-0123456789abcdef01234`, `firewall rule :CNI-DN-0123456789abcdef01234 .*`, `iptables -t nat -X CNI-DN-0123456789abcdef01234`},
		"file":             {`touch nomad/client/leak`, `file nomad/client/leak`, `rm nomad/client/leak`},
		"file in /run":     {`mkdir /run/leak`, `file /run/leak`, `rmdir /run/leak`},
		"allocation":       {`mkdir nomad/alloc/leak`, `file nomad/alloc/leak`, `rmdir nomad/alloc/leak`},
		"loop device":      {`truncate -s 1M tmp/leak; losetup -f tmp/leak`, `loop device /dev/loop\d+ of .*/tmp/leak`, `losetup -d $(losetup -n -O NAME -j tmp/leak); rm tmp/leak`},
		"TCP socket":       {`setsid python3 -c 'import socket, time; s = socket.create_server(("127.0.0.11", 53)); open("ready", "w"); time.sleep(1000)' >/dev/null 2>&1 & while [ ! -e ready ]; do sleep 0.01; done`, `socket tcp 127.0.0.11:53`, `kill $(pidof python3); rm ready`},
		"Unix socket":      {`setsid python3 -c 'import socket, time; s = socket.socket(socket.AF_UNIX); s.bind("leak.sock"); s.listen(); open("ready", "w"); time.sleep(1000)' >/dev/null 2>&1 & while [ ! -e ready ]; do sleep 0.01; done`, `socket leak.sock`, `kill $(pidof python3); rm ready leak.sock`},
		"UDP socket, IPv6": {`setsid python3 -c 'import socket, time; s = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM); s.bind(("::1", 5300)); open("ready", "w"); time.sleep(1000)' >/dev/null 2>&1 & while [ ! -e ready ]; do sleep 0.01; done`, `socket udp6 \[::1\]:5300`, `kill $(pidof python3); rm ready`},
	} {
		t.Run(name, func(t *testing.T) {
			sh(leak.make)
			now, err := n.inventory()
			if err != nil {
				t.Fatal(err)
			}
			want := regexp.MustCompile("^" + leak.want + "$")
			found := false
			for thing := range now {
				found = found || !before[thing] && want.MatchString(thing)
			}
			if !found {
				t.Errorf("%s is not found", leak.want)
			}
			sh(leak.remove)
			if err := n.remains(before); err != nil {
				t.Error(err)
			}
		})
	}
	// Who looks for leaks keeps nothing from being unmounted: Nomad tries that once.
	t.Run("looking disturbs nobody", func(t *testing.T) {
		sh(`mkdir m; mount -t tmpfs secrets m; cd m; seq 20000 | xargs touch`)
		ctx, cancel := context.WithCancel(t.Context())
		looked, ended := make(chan struct{}), make(chan error)
		go func() {
			for first := true; ctx.Err() == nil; first = false {
				if _, err := n.inventory(); err != nil {
					ended <- err
				}
				if first {
					close(looked)
				}
			}
			close(ended)
		}()
		select {
		case <-looked:
			sh(`umount m; rmdir m`)
		case err := <-ended:
			t.Error(err)
		}
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
}

// A test that is killed takes everything along.
func TestRootKilledTest(t *testing.T) {
	if os.Getenv("NOMADTEST_VICTIM") != "" {
		c := Start(t, Options{Drivers: []string{"raw_exec"}})
		c.UntilRunning(t, c.Run(t, fmt.Sprintf(service, 1, "")))
		fmt.Printf("VICTIM %s\n", c.id)
		time.Sleep(Patience)
		return
	}
	ctx, cancel := context.WithTimeout(t.Context(), Patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, os.Args[0], "-test.run", "^TestRootKilledTest$")
	cmd.Env = append(os.Environ(), "NOMADTEST_VICTIM=1")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var id string
	var said strings.Builder
	for lines := bufio.NewScanner(out); id == "" && lines.Scan(); {
		fmt.Fprintln(&said, lines.Text())
		id, _ = strings.CutPrefix(lines.Text(), "VICTIM ")
	}
	if !strings.HasPrefix(id, "nt-") {
		cmd.Process.Kill()
		t.Fatalf("the victim says %s", &said)
	}
	root, err := unified()
	if err != nil {
		t.Fatal(err)
	}
	if got := cgroupProcesses(filepath.Join(root, id)); len(got) < 4 {
		t.Errorf("the victim's cluster has the processes %v", got)
	}
	if err := cmd.Process.Signal(unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	cmd.Wait()
	remains := func() (left []string) {
		left, _ = filepath.Glob("/sys/fs/cgroup/" + id)
		more, _ := filepath.Glob("/sys/fs/cgroup/*/" + id)
		left = append(left, more...)
		if _, err := os.Stat(filepath.Join("/tmp", id)); err == nil {
			left = append(left, "files")
		}
		if hasKeeper(id) {
			left = append(left, "keeper")
		}
		return left
	}
	for begin := time.Now(); len(remains()) > 0; time.Sleep(20 * time.Millisecond) {
		if time.Since(begin) > settleTime {
			t.Fatalf("left: %v", remains())
		}
	}
}
