package nomadtest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"text/template"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/internal/agents"
)

// An agent is a running Nomad or Consul.
type agent struct {
	cmd  *exec.Cmd
	gone chan struct{} // closed when it has been waited for
}

// ended says how, if it has.
func (a *agent) ended() error {
	select {
	case <-a.gone:
		return fmt.Errorf("%w: %s", agents.ErrEnded, a.cmd.ProcessState)
	default:
		return nil
	}
}

// configure writes the agents' configuration. The ports are the usual ones: each node has its own.
func (n *Node) configure() error {
	o, server := n.cluster.o, n.cluster.Nodes[0].IP.String()
	n.config = agents.Config{
		Name: n.Name, Dir: n.Dir, Address: n.IP.String(), API: "0.0.0.0", Ports: agents.DefaultPorts(0),
		Servers: []string{server}, Join: []string{server}, ConsulServer: n.Server && n.number == 1, Consul: n.cluster.consul != "", ACL: o.ACL, LogLevel: "DEBUG", Interface: "eth0",
		Plugins: map[string]agents.Plugin{"raw_exec": {Config: "enabled = true"}},
	}
	if n.number > 1 {
		n.config.Peer = server
	}
	var errs []error
	more := func(text string) string {
		var b strings.Builder
		t, err := template.New("options").Parse(text)
		if err == nil {
			err = t.Execute(&b, n)
		}
		errs = append(errs, err)
		return b.String()
	}
	n.config.MoreAgent, n.config.MoreServer, n.config.MoreClient = more(o.Agent), more(o.Server), more(o.Client)
	for name, p := range o.Plugins {
		n.config.Plugins[name] = agents.Plugin{Path: p.Path, Config: more(p.Config)}
	}
	return errors.Join(append(errs, n.config.Write())...)
}

// StartAgents starts those agents of the node that don't run, and returns when each can be used; a client may have to register yet.
func (n *Node) StartAgents() error {
	ctx, cancel := context.WithTimeout(context.Background(), Patience)
	defer cancel()
	return n.startAgents(ctx)
}

func (n *Node) startAgents(ctx context.Context) error {
	for _, a := range []struct {
		name, program string
		wanted        bool
	}{
		{agents.Consul, n.cluster.consul, n.cluster.consul != ""},
		{agents.Server, n.cluster.nomad, n.Server},
		{agents.Client, n.cluster.nomad, n.Client},
	} {
		if !a.wanted {
			continue
		}
		agent, err := n.start(a.name, a.program)
		if err != nil {
			return err
		}
		http := n.HTTP()
		err = n.config.Answers(ctx, a.name, http, agent.ended)
		http.CloseIdleConnections()
		if err != nil {
			return err
		}
	}
	return nil
}

func (n *Node) start(name, program string) (*agent, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if a := n.agents[name]; a != nil && a.ended() == nil {
		return a, nil
	}
	log, err := os.OpenFile(n.config.Log(name), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	argv := n.config.Command(name, program)
	a := &agent{cmd: n.Command(context.Background(), argv[0], argv[1:]...), gone: make(chan struct{})}
	a.cmd.Stdout, a.cmd.Stderr = log, log
	a.cmd.SysProcAttr = &unix.SysProcAttr{Setpgid: true}
	if err := n.Launch(a.cmd); err != nil {
		return nil, fmt.Errorf("start %s on %s: %w", name, n.Name, err)
	}
	go func() {
		defer close(a.gone)
		a.cmd.Wait()
	}()
	n.agents[name] = a
	return a, nil
}

// ClientPID is the host's number of the node's Nomad client, 0 while it does not run.
func (n *Node) ClientPID() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	if a := n.agents[agents.Client]; a != nil && a.ended() == nil {
		return a.cmd.Process.Pid
	}
	return 0
}

// ClientLog is what the node's Nomad clients have logged, all of them.
func (n *Node) ClientLog() (string, error) {
	b, err := os.ReadFile(n.config.Log(agents.Client))
	return string(b), err
}

// KillClient kills the node's Nomad client as kill -9 does: pods go on, and so do plugins. StartAgents takes all up again, but for
// allocations with a network of their own that are younger than a minute: so long Nomad 1.11 has it in memory only, and fails them.
func (n *Node) KillClient() error { return n.end(agents.Client, unix.SIGKILL) }

// KillServer kills Nomad's server.
func (n *Node) KillServer() error { return n.end(agents.Server, unix.SIGKILL) }

// StopAgents ends the agents in order; jobs go on.
func (n *Node) StopAgents() error {
	return errors.Join(n.end(agents.Client, unix.SIGINT), n.end(agents.Server, unix.SIGINT), n.end(agents.Consul, unix.SIGINT))
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
