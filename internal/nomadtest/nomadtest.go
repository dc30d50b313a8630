// Package nomadtest runs real Nomad and Consul agents for tests: one agent that is server and client, or a server and
// several clients. Each node is a machine of its own as far as a kernel can make it one without a VM: its own mounts, processes,
// network, host name and cgroups. So it meets no other agent of the host, what its jobs leave behind is found by looking at it, and
// all of it ends with the test, even a killed one.
//
// Any test may import it; no program does. A program that imports it can be started again as a node's first process: see reexec_linux.go.
package nomadtest

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/nomad/api"

	"github.com/cradlestack/cradlestack/internal/agents"
	"github.com/cradlestack/cradlestack/test/programs"
)

// Patience bounds every wait. What takes longer hangs, but in a machine that is emulated, whose $NOMADTEST_PATIENCE says how long it may take.
var Patience = patience()

func patience() time.Duration {
	text, ok := os.LookupEnv("NOMADTEST_PATIENCE")
	if !ok {
		return 3 * time.Minute
	}
	d, err := time.ParseDuration(text)
	if err != nil || d <= 0 {
		panic(fmt.Sprintf("$NOMADTEST_PATIENCE: %q is no time to wait, such as 10m", text))
	}
	return d
}

// patient is the context of a wait. What cleans up after a test, whose own context has ended by then, waits as well.
func patient(t testing.TB) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(t.Context()), Patience)
}

// Options say which agents there are and what they are told beyond what they all need.
type Options struct {
	Clients int  // nodes beside the server; 0: one node is server and client
	Peers   int  // more servers, each on a node of its own, that the first can't act without
	Consul  bool // every node has a Consul agent beside Nomad's
	ACL     bool // Nomad's ACLs are on; Cluster.API has the management token

	// Plugins are executables and what the agent's plugin blocks hold, by the plugins' file names.
	Plugins map[string]Plugin
	// Drivers must be healthy on each client before Start returns.
	Drivers []string

	// Client and Server are more lines of the agents' blocks of these names, Agent more of those outside of any block. {{.Dir}} in them, and in
	// plugins' configurations, is the node's directory, {{.Name}} its name, {{.ClusterDir}} a directory that all nodes have.
	Agent, Client, Server string

	// Keep are files and folders below a node's directory that outlive jobs by design: image caches and the like.
	Keep []string

	// Tolerate are things left behind that are no fault of what is tested: lines of the list that a failing test shows.
	Tolerate *regexp.Regexp

	// Log is where everything's doings are told, nil for nowhere.
	Log func(format string, args ...any)
}

// A Plugin is an executable that Nomad starts, and what its plugin block's config holds.
type Plugin = agents.Plugin

// Cradle adds the task driver that make build has put into bin/. more is further lines of its configuration.
func (o *Options) Cradle(more string) error {
	driver, err := programs.Path("nomad-driver-cradle")
	if err != nil {
		return err
	}
	pkg, err := programs.Boot("default")
	if err != nil {
		return err
	}
	if o.Plugins == nil {
		o.Plugins = map[string]Plugin{}
	}
	o.Plugins["nomad-driver-cradle"] = Plugin{Path: driver, Config: fmt.Sprintf(`
    state_dir    = "{{.Dir}}/cradle"
    cache_dir    = "{{.ClusterDir}}/cache"
    boot_package = %q
%s`, pkg, more)}
	o.Drivers = append(o.Drivers, "cradle")
	return nil
}

// A Cluster is a server and its clients.
type Cluster struct {
	API   *api.Client
	Nodes []*Node // the server first

	o       Options
	id      string
	dir     string
	nomad   string
	consul  string // "" without
	token   string
	keeper  *keeper
	network *network
	watch   *watch
	made    sync.Map // index at which each job was made that Run has run
}

var clusters atomic.Int64

// The nodes' addresses mean nothing outside of their network: the API's client, which tries a node before its server, fails at once.
func init() { api.ClientConnTimeout = time.Nanosecond }

// Start starts agents that end with the test. When they have ended, everything has to be gone; what is not fails the test.
func Start(t testing.TB, o Options) *Cluster {
	t.Helper()
	if o.Log == nil {
		o.Log = t.Logf
	}
	ctx, cancel := context.WithTimeout(context.Background(), Patience)
	defer cancel()
	c, err := Open(ctx, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(c.Report())
			c.keepLogs(t)
		}
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	c.Begin(t)
	return c
}

// Open is Start for those who have no test, or one cluster for many: Begin then goes with each of them. It returns when the agents are ready.
func Open(ctx context.Context, o Options) (c *Cluster, err error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("agents that run jobs need root: sudo go test -tags vm …")
	}
	if o.Log == nil {
		o.Log = func(string, ...any) {}
	}
	c = &Cluster{o: o, id: fmt.Sprintf("nt-%d-%d", os.Getpid(), clusters.Add(1))}
	c.dir = filepath.Join("/tmp", c.id) // short, for the paths of sockets below
	if c.nomad, err = programs.Tool("nomad"); err != nil {
		return nil, err
	}
	if o.Consul {
		if c.consul, err = programs.Tool("consul"); err != nil {
			return nil, err
		}
	}
	defer func() {
		if err != nil {
			report := c.Report()
			err = errors.Join(err, c.Close())
			if report != "" {
				err = fmt.Errorf("%w\n%s", err, report)
			}
			c = nil
		}
	}()
	if c.keeper, err = startKeeper(c.id, c.dir); err != nil {
		return c, err
	}
	if c.network, err = newNetwork(); err != nil {
		return c, err
	}
	for i := range 1 + o.Clients + o.Peers {
		n := &Node{Name: fmt.Sprintf("client%d", i), cluster: c, number: i + 1}
		n.Server, n.Client = i == 0 || i > o.Clients, i > 0 && i <= o.Clients || o.Clients == 0 && i == 0
		switch {
		case i == 0:
			n.Name = "server"
		case n.Server:
			n.Name = fmt.Sprintf("peer%d", i-o.Clients)
		}
		c.Nodes = append(c.Nodes, n)
		if err := n.boot(); err != nil {
			return c, err
		}
	}
	if c.API, err = api.NewClient(&api.Config{Address: c.Nodes[0].config.NomadAddr(), HttpClient: c.Nodes[0].HTTP()}); err != nil {
		return c, err
	}
	for _, n := range c.Nodes {
		if err := n.startAgents(ctx); err != nil {
			return c, err
		}
		if n == c.Nodes[0] && o.ACL {
			if err := c.bootstrap(ctx); err != nil {
				return c, err
			}
		}
	}
	c.watch = newWatch(c.API, o.Log)
	if err := c.Wait(ctx, "ready nodes", func(s *State) bool {
		for _, n := range c.Clients() {
			if !s.ready(n, o.Drivers) {
				return false
			}
		}
		return true
	}); err != nil {
		return c, err
	}
	for _, n := range c.Nodes {
		if err := n.settled(); err != nil {
			return c, err
		}
	}
	return c, c.haveVotes(ctx)
}

// haveVotes waits until all servers have a vote.
func (c *Cluster) haveVotes(ctx context.Context) error {
	if c.o.Peers == 0 {
		return nil
	}
	return agents.Retry(ctx, "votes of the servers", func() error {
		raft, err := c.API.Operator().RaftGetConfiguration((&api.QueryOptions{}).WithContext(ctx))
		if err != nil {
			return err
		}
		votes := 0
		for _, s := range raft.Servers {
			if s.Voter {
				votes++
			}
		}
		if votes != 1+c.o.Peers {
			return fmt.Errorf("%d of %d", votes, 1+c.o.Peers)
		}
		return nil
	})
}

// Server is the node with the server.
func (c *Cluster) Server() *Node { return c.Nodes[0] }

// Clients are the nodes that run jobs.
func (c *Cluster) Clients() []*Node {
	return slices.DeleteFunc(slices.Clone(c.Nodes), func(n *Node) bool { return !n.Client })
}

// Peers are the nodes of the further servers.
func (c *Cluster) Peers() []*Node { return c.Nodes[len(c.Nodes)-c.o.Peers:] }

// Dir is where everything of the cluster lies.
func (c *Cluster) Dir() string { return c.dir }

// Nomad is the path of its program.
func (c *Cluster) Nomad() string { return c.nomad }

// Env is what makes Nomad's and Consul's command lines use the cluster when they run in the server's node.
func (c *Cluster) Env() []string {
	env := append(c.Server().env(), "NOMAD_ADDR="+c.Server().config.NomadAddr())
	if c.token != "" {
		env = append(env, "NOMAD_TOKEN="+c.token)
	}
	return env
}

// bootstrap makes the management token.
func (c *Cluster) bootstrap(ctx context.Context) error {
	return agents.Retry(ctx, "acl bootstrap", func() error {
		token, _, err := c.API.ACLTokens().Bootstrap((&api.WriteOptions{}).WithContext(ctx))
		if err == nil {
			c.token = token.SecretID
			c.API.SetSecretID(c.token)
		}
		return err
	})
}

// Report is the end of each agent's log.
func (c *Cluster) Report() string {
	var b strings.Builder
	for _, n := range c.Nodes {
		for _, name := range []string{agents.Consul, agents.Server, agents.Client} {
			if text := agents.Tail(n.config.Log(name), reported); text != "" {
				fmt.Fprintf(&b, "the log of %s on %s ends:\n%s\n", name, n.Name, text)
			}
		}
	}
	return b.String()
}

// keepLogs copies the agents' whole logs to where `go test -artifacts` keeps them.
func (c *Cluster) keepLogs(t testing.TB) {
	for _, n := range c.Nodes {
		for _, name := range []string{agents.Consul, agents.Server, agents.Client} {
			b, err := os.ReadFile(n.config.Log(name))
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if err == nil {
				err = os.WriteFile(filepath.Join(t.ArtifactDir(), n.Name+"-"+name+".log"), b, 0o644)
			}
			if err != nil {
				t.Log(err)
			}
		}
	}
}

// reported are the bytes of a log that a failed test shows.
const reported = 8 << 10

// Close ends the agents as an operator would and says what they leave behind that they should not; all of it is gone afterwards.
func (c *Cluster) Close() error {
	var errs []error
	if c.watch != nil {
		c.watch.close()
	}
	for _, n := range c.Nodes {
		errs = append(errs, n.shutDown())
	}
	if c.keeper != nil {
		errs = append(errs, c.keeper.close())
	}
	for _, n := range c.Nodes {
		n.release()
	}
	if c.network != nil {
		c.network.close()
	}
	return errors.Join(errs...)
}
