// Package agents has what everybody needs who starts Consul and Nomad: their configuration, their environment, and when they can be used.
// It starts no processes: tests and make up do that, each in its own way.
package agents

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"text/template"
	"time"
)

// The names of agents, of their configurations and logs. Nomad's server and client are two processes also where they share a node: a client that
// starts when the server can register it is ready at once, and either can end alone.
const (
	Consul = "consul"
	Server = "server"
	Client = "client"
)

// cniPaths are where CNI's plugins may be: the distribution's package, and what Nomad's manual says.
var cniPaths = []string{"/usr/lib/cni", "/opt/cni/bin"}

// A Config is what the agents of one node are told.
type Config struct {
	Name string
	Dir  string // of the node; configurations, data and logs lie in it

	Address string // of the node: RPC and gossip listen there
	API     string // where the HTTP APIs listen
	Ports   Ports
	Servers []string // addresses of the servers' RPC, for a client
	Peer    string   // address of the server that this one joins; "" for the first
	Join    []string // addresses of Consul's servers, for a node that has none

	ConsulServer bool
	Consul       bool // Nomad uses Consul
	ACL          bool // Nomad's
	LogLevel     string

	Interface      string // that jobs' ports are on
	Bridge, Subnet string // of jobs' networks; "": Nomad's own choice
	Plugins        map[string]Plugin

	// MoreAgent, MoreServer, MoreClient are further lines: outside of any block, and of these blocks.
	MoreAgent, MoreServer, MoreClient string

	CNI string // found by Write
}

// A Plugin is an executable that Nomad starts, and what its plugin block's config holds.
type Plugin struct {
	Path   string // "" for one that is part of Nomad
	Config string
}

// Ports are those of one node.
type Ports struct {
	HTTP, RPC, Serf, ClientHTTP                              int // Nomad's
	ConsulHTTP, ConsulDNS, ConsulRPC, ConsulSerf, ConsulGRPC int
	Registry                                                 int // of images
}

// DefaultPorts are the well-known ones, plus an offset.
func DefaultPorts(offset int) Ports {
	return Ports{
		HTTP: 4646 + offset, RPC: 4647 + offset, Serf: 4648 + offset, ClientHTTP: 4656 + offset,
		ConsulHTTP: 8500 + offset, ConsulDNS: 8600 + offset, ConsulRPC: 8300 + offset, ConsulSerf: 8301 + offset, ConsulGRPC: 8502 + offset,
		Registry: 5000 + offset,
	}
}

//go:embed server.hcl.tmpl
var serverHCL string

//go:embed client.hcl.tmpl
var clientHCL string

//go:embed consul.hcl.tmpl
var consulHCL string

// Write writes the configurations and the folder of plugins.
func (c Config) Write() error {
	for _, dir := range cniPaths {
		if _, err := os.Stat(filepath.Join(dir, "bridge")); err == nil {
			c.CNI = dir
			break
		}
	}
	if c.CNI == "" {
		return fmt.Errorf("CNI's plugins are not in %s: apt-get install --no-install-recommends containernetworking-plugins iptables", strings.Join(cniPaths, ", "))
	}
	plugins := filepath.Join(c.Dir, "plugins")
	if err := os.MkdirAll(plugins, 0o755); err != nil {
		return err
	}
	for name, p := range c.Plugins {
		if p.Path == "" { // it is part of Nomad
			continue
		}
		at := filepath.Join(plugins, name)
		if err := os.Remove(at); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		if err := os.Symlink(p.Path, at); err != nil {
			return err
		}
	}
	for name, text := range map[string]string{Consul: consulHCL, Server: serverHCL, Client: clientHCL} {
		if err := c.render(name, text); err != nil {
			return err
		}
	}
	return nil
}

// File is the configuration of an agent.
func (c Config) File(name string) string { return filepath.Join(c.Dir, name+".hcl") }

// Log is where an agent's output is to go.
func (c Config) Log(name string) string { return filepath.Join(c.Dir, name+".log") }

func (c Config) render(name, text string) error {
	t, err := template.New(name).Parse(text)
	if err != nil {
		return err
	}
	var b strings.Builder
	if err := t.Execute(&b, c); err != nil {
		return err
	}
	return os.WriteFile(c.File(name), []byte(b.String()), 0o644)
}

// Command is what an agent is started with.
func (c Config) Command(name, program string) []string {
	if name == Consul {
		return []string{program, "agent", "-config-file", c.File(name)}
	}
	return []string{program, "agent", "-config", c.File(name)}
}

// Environ is the environment for agents and their clients, tmp being their folder for temporary files.
func Environ(tmp string) []string {
	var env []string
	for _, e := range os.Environ() {
		name, _, _ := strings.Cut(e, "=")
		switch {
		// A CA bundle in the environment ends Nomad's agent, and what is meant for other agents is not for these.
		case name == "AWS_CA_BUNDLE", name == "TMPDIR", strings.HasPrefix(name, "NOMAD_"), strings.HasPrefix(name, "CONSUL_"):
		default:
			env = append(env, e)
		}
	}
	return append(env, "TMPDIR="+tmp)
}

// NomadAddr and ConsulAddr are the APIs' addresses.
func (c Config) NomadAddr() string { return fmt.Sprintf("http://127.0.0.1:%d", c.Ports.HTTP) }

func (c Config) ConsulAddr() string { return fmt.Sprintf("http://127.0.0.1:%d", c.Ports.ConsulHTTP) }

// Answers waits until an agent can be used: Consul has a leader, Nomad's server can register clients. A client is used through its server.
// alive says what has become of its process, if it has ended.
func (c Config) Answers(ctx context.Context, name string, client *http.Client, alive func() error) error {
	var url, nothing string
	switch name {
	case Consul:
		url, nothing = c.ConsulAddr()+"/v1/status/leader", `""`
	case Server:
		// Without the keys that this lists a server can't register a client, who would try again only after 15 seconds.
		url, nothing = c.NomadAddr()+"/.well-known/jwks.json", `{"keys":[]}`
	default:
		return nil
	}
	return Retry(ctx, name+" of "+c.Name, func() error {
		if err := alive(); err != nil {
			return err
		}
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
		if err != nil {
			return err
		}
		resp, err := client.Do(req)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
		if err != nil {
			return err
		}
		if text := strings.TrimSpace(string(body)); resp.StatusCode != http.StatusOK || text == nothing {
			return fmt.Errorf("GET %s: %s: %s", url, resp.Status, text)
		}
		return nil
	})
}

// ErrEnded is an error after which trying again is in vain.
var ErrEnded = errors.New("it has ended")

// Retry repeats what can't succeed before an agent has come up.
func Retry(ctx context.Context, what string, f func() error) error {
	for {
		err := f()
		if err == nil {
			return nil
		}
		if errors.Is(err, ErrEnded) {
			return fmt.Errorf("%s: %w", what, err)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s: %w", what, err)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// Tail is the end of a log, at most n bytes; "" where there is none.
func Tail(file string, n int64) string {
	f, err := os.Open(file)
	if err != nil {
		return ""
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return ""
	}
	at := max(0, info.Size()-n)
	text := make([]byte, info.Size()-at)
	got, _ := f.ReadAt(text, at) // what there is
	return string(text[:got])
}
