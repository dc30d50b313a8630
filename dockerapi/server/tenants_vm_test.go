//go:build vm

package server

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/hashicorp/nomad/api"

	"github.com/cradlestack/cradlestack/dockerapi/registry"
	"github.com/cradlestack/cradlestack/internal/nomadjob"
	"github.com/cradlestack/cradlestack/internal/nomadtest"
	"github.com/cradlestack/cradlestack/spec"
	"github.com/cradlestack/cradlestack/test/programs"
)

// A cloud is a server with mutual TLS in front of a Nomad with ACLs.
type cloud struct {
	t         *testing.T
	nomad     *nomadtest.Cluster
	registry  *registry.Registry
	authority *authority
	config    Config
	clients   map[string]Access
	url       string
}

const cloudRegistry = "127.0.0.1:5000" // on the node

func openCloud(t *testing.T) *cloud {
	t.Helper()
	o := nomadtest.Options{ACL: true, Keep: []string{"cradle", "volumes", "nomad/client/csi", "/run/cradle"}}
	if err := o.Cradle(""); err != nil {
		t.Fatal(err)
	}
	c := &cloud{t: t, nomad: nomadtest.Start(t, o), authority: newAuthority(t), clients: map[string]Access{}}
	var err error
	if c.registry, err = registry.Open(t.Context(), registry.Config{Folder: t.TempDir(), WorkloadKeys: WorkloadKeys(c.nomad.API)}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.registry.Close() })
	node := c.nomad.Server()
	l, err := node.Listen("tcp", cloudRegistry)
	if err != nil {
		t.Fatal(err)
	}
	front := &http.Server{Handler: c.registry.Handler()}
	go front.Serve(l)
	t.Cleanup(func() { front.Close() })
	c.config = Config{
		Version: "test", Nomad: &api.Config{Address: c.nomad.API.Address(), HttpClient: node.HTTP()}, Registry: c.registry, RegistryHost: cloudRegistry,
		Clients: filepath.Join(c.authority.dir, "clients.json"),
	}
	return c
}

// full are the capabilities that docs/dockerapi.md asks for.
const full = `capabilities = ["submit-job", "read-job", "list-jobs", "alloc-exec", "alloc-lifecycle", "csi-list-volume", "csi-read-volume", "csi-write-volume", "csi-mount-volume"]
variables {
  path "docker/*" { capabilities = ["write", "read", "list", "destroy"] }
  path "nomad/jobs/docker-*" { capabilities = ["write", "read", "list", "destroy"] }
}`

// client lets somebody in who may do in a namespace what rules say.
func (c *cloud) client(name, namespace, rules string) {
	c.t.Helper()
	if _, err := c.nomad.API.Namespaces().Register(&api.Namespace{Name: namespace}, nil); err != nil {
		c.t.Fatal(err)
	}
	policy := &api.ACLPolicy{Name: name, Rules: fmt.Sprintf("namespace %q {\n%s\n}\nplugin { policy = \"read\" }", namespace, rules)}
	if _, err := c.nomad.API.ACLPolicies().Upsert(policy, nil); err != nil {
		c.t.Fatal(err)
	}
	token, _, err := c.nomad.API.ACLTokens().Create(&api.ACLToken{Name: name, Type: "client", Policies: []string{name}}, nil)
	if err != nil {
		c.t.Fatal(err)
	}
	file := filepath.Join(c.authority.dir, name+".token")
	if err := os.WriteFile(file, []byte(token.SecretID), 0o600); err != nil {
		c.t.Fatal(err)
	}
	c.clients[name] = Access{Namespace: namespace, TokenFile: file}
}

// serve lets those in that there are.
func (c *cloud) serve() {
	c.t.Helper()
	data, err := json.Marshal(map[string]any{"clients": c.clients})
	if err != nil {
		c.t.Fatal(err)
	}
	if err := os.WriteFile(c.config.Clients, data, 0o600); err != nil {
		c.t.Fatal(err)
	}
	l, err := ListenTLS("127.0.0.1:0", c.authority.files("server"))
	if err != nil {
		c.t.Fatal(err)
	}
	start(c.t, c.config, l)
	c.url = "https://" + l.Addr().String()
}

// as is how somebody asks.
func (c *cloud) as(name string) func(method, path, body string) (int, string, http.Header) {
	return asker(c.t, c.authority.client(c.authority.files(name)), c.url)
}

// must asks for what has to succeed and returns the answer's field.
func must(t *testing.T, ask func(method, path, body string) (int, string, http.Header), method, path, body, field string) string {
	t.Helper()
	status, text, _ := ask(method, path, body)
	if status >= 300 {
		t.Fatalf("%s %s: %d %s", method, path, status, text)
	}
	if field == "" {
		return text
	}
	var answer map[string]any
	if err := json.Unmarshal([]byte(text), &answer); err != nil {
		t.Fatal(err)
	}
	return answer[field].(string)
}

func busybox(t *testing.T) v1.Image {
	t.Helper()
	dir, err := programs.Image("busybox")
	if err != nil {
		t.Fatal(err)
	}
	img, err := programs.OnlyImage(dir)
	if err != nil {
		t.Fatal(err)
	}
	return img
}

// Bob asks every route for what is alice's, by each of its names. He sees nothing of it and changes nothing. Those who share alice's namespace, but not all of her
// rights, are told which they lack.
func TestVMTenants(t *testing.T) {
	c := openCloud(t)
	c.nomad.RunVolumes(t)
	c.client("alice", "team-a", full)
	c.client("bob", "team-b", full)
	for name, rules := range lacking {
		c.client(name, "team-a", rules.policy)
	}
	c.serve()
	alice, bob := c.as("alice"), c.as("bob")
	must(t, alice, "POST", "/images/load", string(savedImage(t, "app-of-alice:1", busybox(t))), "")
	image := must(t, alice, "GET", "/images/app-of-alice:1/json", "", "Id")
	const like = `{"Image": "app-of-alice:1", "Cmd": ["sleep", "1000"], "Labels": {"secret": "label-of-alice"}, "Env": ["SECRET=env-of-alice"]%s}`
	must(t, alice, "POST", "/volumes/create", `{"Name": "data-of-alice", "DriverOpts": {"size": "64M"}, "Labels": {"secret": "volume-of-alice"}}`, "")
	config := fmt.Sprintf(like, "")
	web := must(t, alice, "POST", "/containers/create?name=web-of-alice", fmt.Sprintf(like, `, "HostConfig": {"Binds": ["data-of-alice:/data"]}`), "Id")
	idle := must(t, alice, "POST", "/containers/create?name=idle-of-alice", config, "Id")
	must(t, alice, "POST", "/containers/"+web+"/start", "", "")
	exec := must(t, alice, "POST", "/containers/"+web+"/exec", `{"Cmd": ["true"]}`, "Id")

	network := must(t, alice, "POST", "/networks/create", `{"Name": "net-of-alice"}`, "Id")

	objects := map[string][]string{ // by the beginning of their routes
		"/containers/":   {web, web[:12], "web-of-alice", idle, "idle-of-alice"},
		"/exec/":         {exec},
		"/networks/":     {network, network[:12], "net-of-alice"},
		"/volumes/":      {"data-of-alice"},
		"/images/":       {"app-of-alice:1", "app-of-alice", image, image[7:19]},
		"/distribution/": {cloudRegistry + "/team-a/docker.io/library/app-of-alice:1"},
	}
	var secrets []string
	for _, names := range objects {
		secrets = append(secrets, names...)
	}
	secrets = append(secrets, "of-alice", web[:12], idle[:12], exec[64:76], image[7:19])

	// What has no name in its path is asked with them as parameters.
	parameters := "?container=web-of-alice&names=app-of-alice:1&fromImage=" + cloudRegistry + "/team-a/docker.io/library/app-of-alice&tag=1&name=bobs&repo=bobs&all=1&size=1&path=/etc/passwd&stream=1&stdout=1&stderr=1&logs=1&force=1&shared-size=1&verbose=1&since=1&until=" +
		strconv.FormatInt(time.Now().Unix()+1, 10)
	bodies := map[string]string{"POST /containers/create": config}
	refused := map[string]bool{"POST /containers/create": true, "POST /commit": true, "GET /images/get": true, "POST /images/create": true}

	none := map[string]bool{"DELETE /volumes/{name}": true} // by force, it is content that there is none

	state := func() string {
		return must(t, alice, "GET", "/containers/"+web+"/json", "", "") + must(t, alice, "GET", "/containers/"+idle+"/json", "", "") + must(t, alice, "GET", "/images/json", "", "") +
			must(t, alice, "GET", "/exec/"+exec+"/json", "", "") + must(t, alice, "GET", "/networks/"+network, "", "") + must(t, alice, "GET", "/volumes/data-of-alice", "", "")
	}
	before := state()
	asked := 0
	for _, pattern := range routes(t, c.config) {
		method, path, found := strings.Cut(pattern, " ")
		if !found {
			method, path = "GET", pattern
		}
		names := []string{""}
		begin, rest, named := strings.Cut(path, "{")
		if named {
			_, rest, _ = strings.Cut(rest, "}")
			if names = objects[begin]; names == nil {
				names = []string{"thing-of-alice"}
			}
		}
		for _, name := range names {
			target := begin + name + rest + parameters
			if !named {
				target = path + parameters
			}
			status, body, _ := bob(method, target, or(bodies[pattern], "{}"))
			asked++
			failed := status >= 300 || strings.Contains(body, "errorDetail") // a push tells it in its stream
			if status == 0 || !failed && (named && !none[pattern] || refused[pattern]) {
				t.Errorf("bob: %s %s: %d %s", method, target, status, body)
			}
			told := body
			for _, known := range append([]string{name}, secrets...) { // what he has said himself is no secret
				if known != "" && strings.Contains(target+bodies[pattern], known) {
					told = strings.ReplaceAll(told, known, "")
				}
			}
			for _, s := range secrets {
				if !strings.Contains(target, s) && strings.Contains(told, s) {
					t.Errorf("bob: %s %s tells of %s: %s", method, target, s, body)
				}
			}
		}
	}
	if asked < 80 {
		t.Errorf("%d requests: where are the routes?", asked)
	}
	// With an image and a network of his own, what is alice's is no part of his containers.
	must(t, bob, "POST", "/images/load", string(savedImage(t, "app-of-bob:1", busybox(t))), "")
	must(t, bob, "POST", "/networks/create", `{"Name": "net-of-bob"}`, "Id")
	for _, host := range []string{`"NetworkMode": "net-of-alice"`, `"NetworkMode": "` + network + `"`, `"NetworkMode": "container:` + web + `"`, `"VolumesFrom": ["web-of-alice"]`, `"Links": ["web-of-alice"]`} {
		status, body, _ := bob("POST", "/containers/create?name=of-bob", `{"Image": "app-of-bob:1", "Cmd": ["true"], "HostConfig": {`+host+`}}`)
		if status == http.StatusCreated { // a network is looked for by who starts it
			status, body, _ = bob("POST", "/containers/of-bob/start", "")
			must(t, bob, "DELETE", "/containers/of-bob?force=1", "", "")
		}
		if status < 400 {
			t.Errorf("bob starts a container with %s: %d %s", host, status, body)
		}
	}
	// A volume of the same name is another one.
	if status, body, _ := bob("GET", "/volumes/data-of-alice", ""); status != http.StatusNotFound {
		t.Errorf("bob has asked for what is alice's: %d %s", status, body)
	}
	must(t, bob, "POST", "/volumes/create", `{"Name": "data-of-alice", "DriverOpts": {"size": "64M"}}`, "")
	if body := must(t, bob, "GET", "/volumes/data-of-alice", "", ""); strings.Contains(body, "volume-of-alice") {
		t.Errorf("bob's volume has alice's labels: %s", body)
	}
	must(t, bob, "DELETE", "/volumes/data-of-alice", "", "")
	for _, method := range []string{"connect", "disconnect"} {
		if status, body, _ := bob("POST", "/networks/net-of-bob/"+method, `{"Container": "`+web+`"}`); status < 400 {
			t.Errorf("bob: %s alice's container: %d %s", method, status, body)
		}
	}
	must(t, bob, "DELETE", "/networks/net-of-bob", "", "")
	if after := state(); after != before {
		t.Errorf("what is alice's was\n%s\nand is\n%s", before, after)
	}
	c.cannotPull(image)
	for name, l := range lacking {
		path := strings.NewReplacer("WEB", web, "IDLE", idle).Replace(l.path)
		status, body, _ := c.as(name)(l.method, path, or(l.body, `{"Image": "app-of-alice:1", "Cmd": ["true"]}`))
		var e struct{ Message string }
		if json.Unmarshal([]byte(body), &e); status != http.StatusForbidden || !strings.Contains(e.Message, l.needs) {
			t.Errorf("%s: %s %s: %d %s; want %s", name, l.method, path, status, body, l.needs)
		}
	}
	must(t, alice, "DELETE", "/containers/"+web+"?force=1", "", "")
	must(t, alice, "DELETE", "/containers/"+idle, "", "")
	must(t, alice, "DELETE", "/networks/"+network, "", "")
	must(t, alice, "DELETE", "/volumes/data-of-alice", "", "")
	must(t, bob, "POST", `/volumes/prune?filters={"all":["true"]}`, "", "")
}

// lacking are those whose policy is not enough, with what they then try.
var lacking = map[string]struct{ policy, method, path, body, needs string }{
	"without-variables": {strings.Split(full, "\n")[0], "GET", "/containers/WEB/json", "", "capability read of variables docker/containers/"},
	"reads-variables": {
		strings.ReplaceAll(full, `["write", "read", "list", "destroy"]`, `["read", "list"]`), "POST", "/containers/create?name=new", "",
		"capability write of variables docker/names/new in namespace team-a is needed",
	},
	"without-submit": {strings.Replace(full, `"submit-job", `, "", 1), "POST", "/containers/IDLE/start", "", "capability submit-job in namespace team-a is needed"},
	"without-exec":   {strings.Replace(full, `"alloc-exec", `, "", 1), "POST", "/containers/WEB/exec", `{"Cmd": ["true"]}`, "alloc-exec"},
	"without-read":   {strings.Replace(full, `"read-job", `, "", 1), "GET", "/containers/json", "", "capability read-job in namespace team-a is needed"},
	"without-list":   {strings.Replace(full, `"list-jobs", `, "", 1), "GET", "/containers/json", "", "capability list-jobs in namespace team-a is needed"},
}

// routes are all patterns that a server answers, but for those that everybody may ask.
func routes(t *testing.T, c Config) []string {
	t.Helper()
	s, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	rt := newRouter(s)
	for _, group := range s.groups() {
		group(rt)
	}
	var all []string
	for _, pattern := range rt.all {
		if _, ok := rt.named[strings.TrimSuffix(pattern, "{name...}")]; !ok && pattern != "/" {
			all = append(all, pattern)
		}
	}
	for begin, suffixes := range rt.named {
		for suffix := range suffixes {
			all = append(all, begin+"{name...}"+suffix)
		}
	}
	return all
}

// untilEnded waits for the only allocation of a job to end.
func untilEnded(t *testing.T, nomad *api.Client, job string) *api.AllocationListStub {
	t.Helper()
	for begin := time.Now(); ; time.Sleep(100 * time.Millisecond) {
		all, _, err := nomad.Jobs().Allocations(job, false, nil)
		if err != nil {
			t.Fatal(err)
		}
		if len(all) == 1 && nomadtest.Ended(all[0]) {
			return all[0]
		}
		if time.Since(begin) > nomadtest.Patience {
			t.Fatalf("job %s does not end: %+v", job, all)
		}
	}
}

// cannotPull checks that an image of alice's, which the node has, is not for a job of bob's: neither without a login nor with his own identity.
func (c *cloud) cannotPull(id string) {
	c.t.Helper()
	images, err := c.registry.Images("team-a")
	if err != nil {
		c.t.Fatal(err)
	}
	i, err := images.Resolve(c.t.Context(), id)
	if err != nil {
		c.t.Fatal(err)
	}
	token, err := os.ReadFile(c.clients["bob"].TokenFile)
	if err != nil {
		c.t.Fatal(err)
	}
	bob, err := api.NewClient(&api.Config{Address: c.config.Nomad.Address, HttpClient: c.config.Nomad.HttpClient, SecretID: string(token), Namespace: "team-b"})
	if err != nil {
		c.t.Fatal(err)
	}
	for job, audience := range map[string]string{"without-login": "", "with-login": i.WorkloadAudience()} {
		p := &spec.Pod{Name: job, Containers: []spec.PodContainer{{Name: "main", Image: i.NodeReference(cloudRegistry)}}}
		made, err := nomadjob.Job(p, nomadjob.Options{ID: job, Namespace: "team-b", Audience: audience, Bare: true})
		if err != nil {
			c.t.Fatal(err)
		}
		if _, _, err := bob.Jobs().Register(made, nil); err != nil {
			c.t.Fatal(err)
		}
		a := untilEnded(c.t, bob, job)
		var said strings.Builder
		for _, e := range a.TaskStates["main"].Events {
			fmt.Fprintln(&said, e.DisplayMessage)
		}
		if !strings.Contains(said.String(), "does not exist or needs a login") || bytes.Contains([]byte(said.String()), []byte("Task started")) {
			c.t.Errorf("bob's job %s with alice's image: %s", job, &said)
		}
	}
}
