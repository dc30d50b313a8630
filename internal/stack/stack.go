// Package stack runs one node of the stack on the host itself, in the background: Consul, Nomad's server and client, the pods of its jobs, volumes
// for them, and docker's API.
// It is what make up, make down and the demo are made of. There is no supervisor: an agent that has ended is started by the next Up.
//
// Everything that a stack has lies in one directory. Its processes begin in a cgroup of its own, so that nothing escapes its end.
package stack

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/nomad/api"
	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/internal/agents"
	"github.com/cradlestack/cradlestack/test/programs"
)

// DefaultDir is where make up keeps the stack.
const DefaultDir = "/var/lib/cradlestack"

const (
	readyLimit = 5 * time.Minute // for agents that come up
	drainLimit = 5 * time.Minute // for jobs that end
	endLimit   = time.Minute     // for agents that end
)

// A Stack is one node, up or not.
type Stack struct {
	dir    string
	record record
	tools  map[string]string // third-party programs
}

// A record is what a stack remembers, in stack.json.
type record struct {
	Version   int                `json:"version"`
	Offset    int                `json:"offset"`              // of the ports, from the well-known ones
	Drained   bool               `json:"drained,omitempty"`   // by Down: Up makes the node eligible again
	Bridge    string             `json:"bridge,omitempty"`    // of jobs' networks; "" while the stack is down
	Subnet    string             `json:"subnet,omitempty"`    // of the bridge
	Forwarded bool               `json:"forwarded,omitempty"` // the host has forwarded packets before
	Docker    string             `json:"docker,omitempty"`    // docker's folder of configurations that has a context for the stack
	Processes map[string]process `json:"processes,omitempty"`
}

const recordVersion = 1

// open finds the stack in a directory, or makes one, and holds it: of several Ups and Downs one goes after the other.
func open(dir string) (*Stack, func(), error) {
	if os.Geteuid() != 0 {
		return nil, nil, errors.New("root is needed: pods need namespaces, bridges and mounts")
	}
	if !filepath.IsAbs(dir) {
		return nil, nil, fmt.Errorf("%s is no absolute path", dir)
	}
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return nil, nil, err
	}
	lock, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, nil, err
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		lock.Close()
		return nil, nil, fmt.Errorf("lock %s: %w", lock.Name(), err)
	}
	s, err := load(dir)
	if err != nil {
		lock.Close()
		return nil, nil, err
	}
	return s, func() { lock.Close() }, nil
}

func load(dir string) (*Stack, error) {
	s := &Stack{dir: dir, record: record{Version: recordVersion, Processes: map[string]process{}}}
	data, err := os.ReadFile(filepath.Join(dir, "stack.json"))
	if errors.Is(err, fs.ErrNotExist) {
		return s, nil
	}
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(data, &s.record); err != nil {
		return nil, fmt.Errorf("%s/stack.json: %w", dir, err)
	}
	if s.record.Version != recordVersion {
		return nil, fmt.Errorf("%s was made by another version (%d) of this program: make clean removes it with its data", dir, s.record.Version)
	}
	if s.record.Processes == nil {
		s.record.Processes = map[string]process{}
	}
	return s, nil
}

func (s *Stack) save() error {
	data, err := json.MarshalIndent(s.record, "", "  ")
	if err != nil {
		return err
	}
	part := filepath.Join(s.dir, "stack.json.part")
	if err := os.WriteFile(part, append(data, '\n'), 0o644); err != nil {
		return err
	}
	return os.Rename(part, filepath.Join(s.dir, "stack.json"))
}

// config is what the agents are told.
func (s *Stack) config() (agents.Config, error) {
	driver, err := programs.Path("nomad-driver-cradle")
	if err != nil {
		return agents.Config{}, err
	}
	pkg, err := programs.AnyBoot()
	if err != nil {
		return agents.Config{}, err
	}
	ports := agents.DefaultPorts(s.record.Offset)
	local := func(port int) []string { return []string{fmt.Sprintf("127.0.0.1:%d", port)} }
	return agents.Config{
		Name: "one", Dir: s.dir, Address: "127.0.0.1", API: "127.0.0.1", Ports: ports, LogLevel: "INFO", ACL: true,
		Servers: local(ports.RPC), Join: local(ports.ConsulSerf), ConsulServer: true, Consul: true,
		Interface: "lo", Bridge: s.record.Bridge, Subnet: s.record.Subnet,
		Plugins: map[string]agents.Plugin{
			"nomad-driver-cradle": {Path: driver, Config: fmt.Sprintf(`    state_dir    = "%[1]s/pods"
    cache_dir    = "%[1]s/cache"
    boot_package = %[2]q
    volumes {
      enabled = true
    }`, s.dir, pkg)},
			"raw_exec": {Config: "    enabled = true"}, // of the volumes' plugin
		},
		// Nomad's own choices of ports for jobs are to be none of the stack's, which pods would take over.
		MoreClient: fmt.Sprintf("  reserved {\n    reserved_ports = %q\n  }\n", s.ports()),
		MoreAgent:  "telemetry {\n  publish_allocation_metrics = true\n}\n", // or Nomad does not ask how much tasks use
	}, nil
}

// names of the processes in the order of their start.
var order = []string{agents.Consul, agents.Server, agents.Client, dockerAPI}

// Up starts what does not run, and what runs with another configuration or program than now; it returns when jobs can be run. Pods of an earlier
// Up go on, or begin again.
func Up(ctx context.Context, dir string) (*Stack, error) {
	s, done, err := open(dir)
	if err != nil {
		return nil, err
	}
	defer done()
	return s, s.up(ctx)
}

func (s *Stack) up(ctx context.Context) error {
	if err := s.findTools(); err != nil { // which may build them first
		return err
	}
	done, err := lockHost(ctx)
	if err != nil {
		return err
	}
	defer done()
	ctx, cancel := context.WithTimeout(ctx, readyLimit)
	defer cancel()
	if s.record.Bridge == "" || !s.running() {
		if err := s.settleIn(); err != nil {
			return err
		}
	}
	config, err := s.config()
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Join(s.dir, "tmp"), 0o700); err != nil {
		return err
	}
	if err := config.Write(); err != nil {
		return err
	}
	for _, step := range []struct {
		of string // whose log says more
		up func(context.Context, agents.Config) error
	}{
		{agents.Consul, s.agent(agents.Consul)},
		{agents.Server, s.agent(agents.Server)},
		{agents.Server, s.bootstrap},
		{agents.Client, s.agent(agents.Client)},
		{agents.Client, s.ready},
		{agents.Client, s.upVolumes},
		{dockerAPI, s.upDockerAPI},
	} {
		if err := step.up(ctx, config); err != nil {
			return fmt.Errorf("%w\n%s", err, agents.Tail(config.Log(step.of), 4<<10))
		}
	}
	return s.addContext(ctx)
}

// agent starts Consul, or one of Nomad's two.
func (s *Stack) agent(name string) func(context.Context, agents.Config) error {
	return func(ctx context.Context, config agents.Config) error {
		program := s.tools["nomad"]
		if name == agents.Consul {
			program = s.tools["consul"]
		}
		files := append([]string{config.File(name)}, plugins(config, name)...)
		alive, err := s.upProcess(config, name, config.Command(name, program), files)
		if err != nil {
			return err
		}
		return config.Answers(ctx, name, http.DefaultClient, alive)
	}
}

// upProcess starts what does not run, or runs as another program or with other files than now. It returns what says whether it has ended.
func (s *Stack) upProcess(config agents.Config, name string, argv, files []string) (alive func() error, err error) {
	digest, err := digestOf(append(files, argv[0]), argv)
	if err != nil {
		return nil, err
	}
	p := s.record.Processes[name]
	if p.alive() && p.Digest != digest {
		if err := p.end(endLimit); err != nil {
			return nil, fmt.Errorf("end %s, to start it anew: %w", name, err)
		}
	}
	if !p.alive() {
		if err := s.portsFree(config, name); err != nil {
			return nil, err
		}
		if p, err = s.start(argv, config.Log(name), "NOMAD_ADDR="+config.NomadAddr()); err != nil {
			return nil, fmt.Errorf("start %s: %w", name, err)
		}
		p.Digest = digest
		s.record.Processes[name] = p
		if err := s.save(); err != nil {
			return nil, err
		}
	}
	return func() error {
		if !p.alive() {
			return agents.ErrEnded
		}
		return nil
	}, nil
}

// bootstrap makes the token that everything is done with, once.
func (s *Stack) bootstrap(ctx context.Context, config agents.Config) error {
	if _, err := os.Stat(s.tokenFile()); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	client, err := api.NewClient(&api.Config{Address: config.NomadAddr()})
	if err != nil {
		return err
	}
	return agents.Retry(ctx, "the first token of Nomad's ACLs", func() error {
		token, _, err := client.ACLTokens().Bootstrap((&api.WriteOptions{}).WithContext(ctx))
		if err != nil && strings.Contains(err.Error(), "bootstrap already done") {
			return fmt.Errorf("%s is lost: make clean removes the stack with its data (%w)", s.tokenFile(), agents.ErrEnded)
		}
		if err != nil {
			return err
		}
		return os.WriteFile(s.tokenFile(), []byte(token.SecretID+"\n"), 0o600)
	})
}

func (s *Stack) tokenFile() string { return filepath.Join(s.dir, "nomad.token") }

func (s *Stack) findTools() error {
	s.tools = map[string]string{}
	for _, name := range []string{"consul", "nomad"} {
		path, err := programs.Tool(name)
		if err != nil {
			return err
		}
		s.tools[name] = path
	}
	return nil
}

// plugins are the programs that an agent starts.
func plugins(c agents.Config, name string) []string {
	var all []string
	if name == agents.Client {
		for _, p := range c.Plugins {
			if p.Path != "" { // it is part of Nomad
				all = append(all, p.Path)
			}
		}
	}
	slices.Sort(all)
	return all
}

// digestOf tells whether one of some files has changed, or a command line: small files by what they say, programs by size and time.
func digestOf(files, argv []string) (string, error) {
	h := sha256.New()
	fmt.Fprintf(h, "%q ", argv)
	for _, f := range files {
		info, err := os.Stat(f)
		if err != nil {
			return "", err
		}
		if info.Size() < 1<<20 {
			text, err := os.ReadFile(f)
			if err != nil {
				return "", err
			}
			fmt.Fprintf(h, "%s %d %s", f, len(text), text)
			continue
		}
		fmt.Fprintf(h, "%s %d %s", f, info.Size(), info.ModTime())
	}
	return hex.EncodeToString(h.Sum(nil)[:8]), nil
}

// ready waits until the node takes pods.
func (s *Stack) ready(ctx context.Context, _ agents.Config) error {
	client, err := s.API()
	if err != nil {
		return err
	}
	return agents.Retry(ctx, "the node", func() error {
		if !s.record.Processes[agents.Client].alive() {
			return agents.ErrEnded
		}
		node, err := onlyNode(ctx, client)
		if err != nil {
			return err
		}
		if node.Status != api.NodeStatusReady {
			return fmt.Errorf("it is %s", node.Status)
		}
		if d := node.Drivers["cradle"]; d == nil {
			return errors.New("driver cradle is not loaded")
		} else if !d.Healthy {
			return fmt.Errorf("driver cradle: %s", d.HealthDescription)
		}
		if s.record.Drained {
			if _, err := client.Nodes().UpdateDrainOpts(node.ID, &api.DrainOptions{MarkEligible: true}, nil); err != nil {
				return err
			}
			s.record.Drained = false
			return s.save()
		}
		return nil
	})
}

// API is Nomad's.
func (s *Stack) API() (*api.Client, error) {
	token, err := s.token()
	if err != nil {
		return nil, err
	}
	return api.NewClient(&api.Config{Address: agents.Config{Ports: agents.DefaultPorts(s.record.Offset)}.NomadAddr(), SecretID: token})
}

func (s *Stack) token() (string, error) {
	text, err := os.ReadFile(s.tokenFile())
	return strings.TrimSpace(string(text)), err
}

func onlyNode(ctx context.Context, client *api.Client) (*api.NodeListStub, error) {
	nodes, _, err := client.Nodes().List((&api.QueryOptions{}).WithContext(ctx))
	if err != nil {
		return nil, err
	}
	for _, n := range nodes {
		if n.Status != api.NodeStatusDown {
			return n, nil
		}
	}
	return nil, errors.New("it has not registered yet")
}

// Env are shell exports for the stack's users.
func Env(dir string) (string, error) {
	s, err := load(dir)
	if err != nil {
		return "", err
	}
	for _, name := range order {
		if !s.record.Processes[name].alive() {
			return "", fmt.Errorf("%s is not up: make up", dir)
		}
	}
	return s.env()
}

func (s *Stack) env() (string, error) {
	config := agents.Config{Ports: agents.DefaultPorts(s.record.Offset)}
	root, err := programs.Root()
	if err != nil {
		return "", err
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	path := []string{filepath.Join(root, "bin")}
	if err := s.findTools(); err != nil {
		return "", err
	}
	for _, tool := range []string{"consul", "nomad"} {
		if dir := filepath.Dir(s.tools[tool]); !slices.Contains(filepath.SplitList(os.Getenv("PATH")), dir) {
			path = append(path, dir)
		}
	}
	token, err := s.token()
	if err != nil {
		return "", err
	}
	text := fmt.Sprintf("export NOMAD_ADDR=%s\nexport NOMAD_TOKEN=%s\nexport CONSUL_HTTP_ADDR=%s\nexport CRADLE_FILER_SOCKET=%s\nexport CRADLE_FILER_API=%s\nexport CRADLE_FILER_WEBDAV=%s\nexport CRADLE_FILER_S3=%s\nexport NOMAD_VAR_images=oci:%s\nexport PATH=%s:$PATH\n",
		config.NomadAddr(), token, config.ConsulAddr(), s.filerSocket(), filerURL(s.filerAPIPort()), filerURL(s.webdavPort()), filerURL(s.s3Port()), filepath.Join(cache, "cradlestack", "images"), strings.Join(path, ":"))
	if s.record.Docker != "" {
		text += "export DOCKER_CONTEXT=" + dockerContext + "\n"
	}
	return text, nil
}

// Usage says what to do with a stack that is up.
func (s *Stack) Usage() string {
	c := agents.Config{Ports: agents.DefaultPorts(s.record.Offset)}
	docker := "docker run --rm busybox uname -r"
	if s.record.Docker == "" {
		docker = "make up                                         # once more, when the docker CLI is installed"
	}
	return fmt.Sprintf(`The stack is up: Nomad at %s, Consul at %s, docker's API at %s, everything of it in %s.

    eval "$(make env)"                              # nomad, consul, docker, kcradle: in PATH, and where they find it
    %s
    nomad node status
    nomad job run examples/nomad/web.nomad.hcl
    nomad alloc exec -job web sh                    # examples/nomad/README.md has more

make down ends it, with every pod; data stays for the next make up, until make clean.
`, c.NomadAddr(), c.ConsulAddr(), s.socket(), s.dir, docker)
}

// Down ends the jobs in order, then the agents, and leaves nothing running or mounted. What fails on the way is told when everything is gone.
func Down(ctx context.Context, dir string) error {
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	s, done, err := open(dir)
	if err != nil {
		return err
	}
	defer done()
	return s.down(ctx)
}

func (s *Stack) down(ctx context.Context) error {
	if s.record.Bridge == "" {
		return nil // it is
	}
	var errs []error
	if s.running() {
		errs = append(errs, s.endJobs(ctx))
	}
	for _, name := range slices.Backward(order) {
		if p := s.record.Processes[name]; p.alive() {
			if err := p.end(endLimit); err != nil {
				errs = append(errs, fmt.Errorf("end %s: %w", name, err))
			}
		}
	}
	if err := s.sweep(ctx); err != nil {
		return errors.Join(append(errs, err)...)
	}
	errs = append(errs, os.RemoveAll(s.runDir()), s.removeContext(ctx))
	s.record.Processes, s.record.Bridge = map[string]process{}, ""
	return errors.Join(append(errs, s.save())...)
}

// running says whether any process of the stack's is there, or one of its mounts.
func (s *Stack) running() bool {
	populated, err := os.ReadFile(filepath.Join(s.cgroup(), "cgroup.events"))
	if err == nil && strings.Contains(string(populated), "populated 1") {
		return true
	}
	mounts, err := s.mounts()
	return err != nil || len(mounts) > 0
}

// endJobs stops every allocation as a drain of the node does, and lets the client clear up after them. It needs all agents.
func (s *Stack) endJobs(ctx context.Context) error {
	if err := s.up(ctx); err != nil {
		return fmt.Errorf("agents, to end jobs in order: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, drainLimit)
	defer cancel()
	client, err := s.API()
	if err != nil {
		return err
	}
	node, err := onlyNode(ctx, client)
	if err != nil {
		return err
	}
	if node.SchedulingEligibility == api.NodeSchedulingEligible {
		// A negative deadline ends allocations at once, each with its own time to end; but for the volumes' plugin, which they need meanwhile.
		if _, err := client.Nodes().UpdateDrainOpts(node.ID, &api.DrainOptions{DrainSpec: &api.DrainSpec{Deadline: -1, IgnoreSystemJobs: true}}, nil); err != nil {
			return fmt.Errorf("drain the node: %w", err)
		}
		s.record.Drained = true
		if err := s.save(); err != nil {
			return err
		}
	}
	if err := s.endVolumes(ctx, client, node.ID); err != nil {
		return err
	}
	return agents.Retry(ctx, "end of the jobs", func() error {
		allocs, _, err := client.Nodes().Allocations(node.ID, (&api.QueryOptions{}).WithContext(ctx))
		if err != nil {
			return err
		}
		for _, a := range allocs {
			if !a.ClientTerminalStatus() {
				return fmt.Errorf("%s is %s", a.Name, a.ClientStatus)
			}
		}
		if err := client.Nodes().GC(node.ID, nil); err != nil && err.Error() != "EOF" { // the answer is empty
			return err
		}
		left, err := s.allocs()
		if err == nil && len(left) > 0 {
			err = fmt.Errorf("%d allocations are being cleared", len(left))
		}
		return err
	})
}

// Clean is Down, and removes the data.
func Clean(ctx context.Context, dir string) error {
	if err := Down(ctx, dir); err != nil {
		return err
	}
	return os.RemoveAll(dir)
}

// command runs a program and returns its output.
func command(stdin string, name string, args ...string) (string, error) {
	cmd := exec.Command(name, args...)
	cmd.Stdin = strings.NewReader(stdin)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, strings.TrimSpace(stderr.String()))
	}
	return string(out), nil
}
