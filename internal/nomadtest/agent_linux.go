package nomadtest

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"text/template"
	"time"

	"golang.org/x/sys/unix"
)

// The names of agents, of their logs and configurations. Server and client are two processes also where they share a node: a client that
// starts when the server can register it is ready at once, and either can be killed alone.
const (
	consul = "consul"
	server = "server"
	client = "client"
)

// The agents' ports are the usual ones: each node has its own.
const (
	serverAddress = "http://127.0.0.1:4646"
	consulAddress = "http://127.0.0.1:8500"
)

// cniPath is where the distribution has CNI's plugins.
const cniPath = "/usr/lib/cni"

//go:embed server.hcl.tmpl
var serverHCL string

//go:embed client.hcl.tmpl
var clientHCL string

//go:embed consul.hcl.tmpl
var consulHCL string

// An agent is a running Nomad or Consul.
type agent struct {
	cmd  *exec.Cmd
	gone chan struct{} // closed when it has been waited for
}

// configure writes the agents' configuration and the folder of plugins.
func (n *Node) configure() error {
	if _, err := os.Stat(filepath.Join(cniPath, "bridge")); err != nil {
		return fmt.Errorf("%w: apt-get install --no-install-recommends containernetworking-plugins iptables", err)
	}
	o := n.cluster.o
	plugins := filepath.Join(n.Dir, "plugins")
	if err := os.MkdirAll(plugins, 0o755); err != nil {
		return err
	}
	for name, p := range o.Plugins {
		at := filepath.Join(plugins, name)
		if err := os.Remove(at); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		if err := os.Symlink(p.Path, at); err != nil {
			return err
		}
	}
	values := map[string]any{
		"Name": n.Name, "Dir": n.Dir, "IP": n.IP.String(), "Server": n.Server, "Client": n.Client, "CNI": cniPath,
		"ServerIP": n.cluster.Nodes[0].IP.String(), "Consul": n.cluster.consul != "", "ACL": o.ACL, "Plugins": o.Plugins, "Options": o,
	}
	for name, text := range map[string]string{consul: consulHCL, server: serverHCL, client: clientHCL} {
		if err := render(filepath.Join(n.Dir, name+".hcl"), text, values); err != nil {
			return err
		}
	}
	return nil
}

// render writes a file; what the options contain is a template too.
func render(file, text string, values map[string]any) error {
	var b strings.Builder
	t := template.New(filepath.Base(file))
	t.Funcs(template.FuncMap{"more": func(text string) (string, error) {
		var b strings.Builder
		t, err := template.New("more").Parse(text)
		if err == nil {
			err = t.Execute(&b, values)
		}
		return b.String(), err
	}})
	if _, err := t.Parse(text); err != nil {
		return err
	}
	if err := t.Execute(&b, values); err != nil {
		return err
	}
	return os.WriteFile(file, []byte(b.String()), 0o644)
}

// StartAgents starts those agents of the node that don't run, and returns when each can be used; a client may have to register yet.
func (n *Node) StartAgents() error {
	ctx, cancel := context.WithTimeout(context.Background(), Patience)
	defer cancel()
	return n.startAgents(ctx)
}

func (n *Node) startAgents(ctx context.Context) error {
	if n.cluster.consul != "" {
		if err := n.start(consul, n.cluster.consul, "agent", "-config-file", filepath.Join(n.Dir, "consul.hcl")); err != nil {
			return err
		}
		if err := n.answers(ctx, consul, consulAddress+"/v1/status/leader", `""`); err != nil {
			return err
		}
	}
	if n.Server {
		if err := n.start(server, n.cluster.nomad, "agent", "-config", filepath.Join(n.Dir, "server.hcl")); err != nil {
			return err
		}
		// Without the keys that it lists a server can't register a client, who would try again after 15 seconds.
		if err := n.answers(ctx, server, serverAddress+"/.well-known/jwks.json", `{"keys":[]}`); err != nil {
			return err
		}
	}
	if n.Client {
		return n.start(client, n.cluster.nomad, "agent", "-config", filepath.Join(n.Dir, "client.hcl"))
	}
	return nil
}

// answers waits for an agent's answer that says more than that there is nothing.
func (n *Node) answers(ctx context.Context, name, url, nothing string) error {
	c := n.HTTP()
	defer c.CloseIdleConnections()
	return retry(ctx, name+" on "+n.Name, func() error {
		select {
		case <-n.agents[name].gone:
			return fmt.Errorf("it has ended: %s", n.agents[name].cmd.ProcessState)
		default:
		}
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
		if err != nil {
			return err
		}
		resp, err := c.Do(req)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
		if err != nil {
			return err
		}
		if text := strings.TrimSpace(string(body)); resp.StatusCode != 200 || text == nothing {
			return fmt.Errorf("GET %s: %s: %s", url, resp.Status, text)
		}
		return nil
	})
}

func (n *Node) start(name, program string, args ...string) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if a := n.agents[name]; a != nil {
		select {
		case <-a.gone:
		default:
			return nil
		}
	}
	log, err := os.OpenFile(filepath.Join(n.Dir, name+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer log.Close()
	a := &agent{cmd: n.Command(context.Background(), program, args...), gone: make(chan struct{})}
	a.cmd.Stdout, a.cmd.Stderr = log, log
	a.cmd.SysProcAttr = &unix.SysProcAttr{Setpgid: true}
	if err := n.Launch(a.cmd); err != nil {
		return fmt.Errorf("start %s on %s: %w", name, n.Name, err)
	}
	go func() {
		defer close(a.gone)
		a.cmd.Wait()
	}()
	n.agents[name] = a
	return nil
}

// ClientPID is the host's number of the node's Nomad client, 0 while it does not run.
func (n *Node) ClientPID() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	if a := n.agents[client]; a != nil {
		select {
		case <-a.gone:
		default:
			return a.cmd.Process.Pid
		}
	}
	return 0
}

// KillClient kills the node's Nomad client as kill -9 does: pods go on, and so do plugins. StartAgents takes all up again, but for
// allocations with a network of their own that are younger than a minute: so long Nomad 1.11 has it in memory only, and fails them.
func (n *Node) KillClient() error { return n.end(client, unix.SIGKILL) }

// KillServer kills Nomad's server.
func (n *Node) KillServer() error { return n.end(server, unix.SIGKILL) }

// StopAgents ends the agents in order; jobs go on.
func (n *Node) StopAgents() error {
	return errors.Join(n.end(client, unix.SIGINT), n.end(server, unix.SIGINT), n.end(consul, unix.SIGINT))
}

func (n *Node) end(name string, signal unix.Signal) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	a := n.agents[name]
	if a == nil {
		return nil
	}
	if err := a.cmd.Process.Signal(signal); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case <-a.gone:
		delete(n.agents, name)
	case <-time.After(Patience):
		return fmt.Errorf("%s on %s does not end after %s", name, n.Name, signal)
	}
	return nil
}
