package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"github.com/hashicorp/nomad/api"

	"github.com/cradlestack/cradlestack/csi-plugin/cold"
	"github.com/cradlestack/cradlestack/csi-plugin/rpc"
	"github.com/cradlestack/cradlestack/csi-plugin/volume"
)

// What a restore has left is made anew of a newer copy of the former volume. One that was staged, or has copies of its own, was used: it stays, also where Nomad does not know any more that it was restored.
func TestReceiveAgain(t *testing.T) {
	t.Run("copied", func(t *testing.T) { testReceiveAgain(t, false) })
	t.Run("staged", func(t *testing.T) { testReceiveAgain(t, true) })
}

// testReceiveAgain has the restored volume copied, or staged and not copied yet.
func testReceiveAgain(t *testing.T, staged bool) {
	nomad := httptest.NewServer(http.NotFoundHandler()) // it has no Variable of the volume
	defer nomad.Close()
	dir := t.TempDir()
	key := filepath.Join(dir, "key")
	newKey(t, key)
	var out bytes.Buffer
	c := &cli{stdout: &out, stderr: io.Discard, backend: "dir", pools: []string{filepath.Join(dir, "pool")}, nomad: nomad.URL, cold: coldFlags{where: filepath.Join(dir, "cold"), key: key}}
	vault, err := c.cold.open()
	if err = errors.Join(err, os.Mkdir(c.cold.where, 0o700)); err != nil {
		t.Fatal(err)
	}
	const size = 8 << 20
	save := func(of volume.Volume, taken time.Time) {
		t.Helper()
		s := volume.Snapshot{ID: volume.SnapshotID{Volume: "db", Name: "cold"}, Created: taken}
		blocks := &volume.Blocks{ReaderAt: strings.NewReader(strings.Repeat("x", size)), Size: size, Data: []volume.Range{{End: size}}, Whole: true}
		if _, _, err := vault.Save(t.Context(), of, s, cold.Order{Taken: taken}, blocks, cold.Copy{}); err != nil {
			t.Fatal(err)
		}
	}
	receive := func() volume.Volume {
		t.Helper()
		if err := c.lv2Receive(t.Context(), "db", "", 1); err != nil {
			t.Fatal(err)
		}
		b, _, err := c.open(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer b.Close()
		v, err := b.Get(t.Context(), "db")
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	born := time.Now().Add(-time.Hour).UTC()
	former := volume.Volume{ID: "db", Created: born, Size: size, Parameters: volume.Parameters{Class: volume.LV2, Direct: true}}
	save(former, born.Add(time.Minute))
	first := receive()
	if again := receive(); again != first {
		t.Errorf("of the same copy it was made again: %+v, and before %+v", again, first)
	}
	save(former, born.Add(2*time.Minute))
	second := receive()
	if second == first {
		t.Errorf("it is not of the former volume's newest copy: %+v", second)
	}
	if staged {
		b, _, err := c.open(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer b.Close()
		if _, err := b.Stage(t.Context(), "db", volume.Use{As: volume.AsGuest}); err != nil {
			t.Fatal(err)
		}
		second.Used = true
		save(former, born.Add(3*time.Minute))
	} else {
		save(second, time.Now())
	}
	if now := receive(); now != second {
		t.Errorf("what was used is removed for a copy: %+v, and before %+v", now, second)
	}
}

// Nomad's id of a volume may be another one than the plugin's name for it (db[0] has to), and what is not meant is not restored.
func TestRestoreWhich(t *testing.T) {
	of := func(id, plugin, namespace, external string) *api.CSIVolume {
		return &api.CSIVolume{ID: id, ExternalID: external, Namespace: namespace, PluginID: plugin, Provider: rpc.Name, Context: map[string]string{"class": "lv2"}}
	}
	files := of("pages", "files", "default", "db-0")
	files.Context["class"] = "nfs"
	text := func(v *api.CSIVolume) string {
		data, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return string(data)
	}
	noted := func(v *api.CSIVolume) api.VariableItems {
		return api.VariableItems{"generation": "1", "node": "node1", "volume": text(v)}
	}
	made := func(index uint64, v *api.CSIVolume) *api.CSIVolume { v.CreateIndex = index; return v }
	on := func(v *api.CSIVolume, generation, next string) api.VariableItems {
		return api.VariableItems{"generation": generation, "node": "node2", "volume": text(v), "next_generation": next, "next_node": "node2"}
	}
	// The Variable is what Nomad wrote as number 10.
	for _, c := range []struct {
		name, id  string
		volumes   []*api.CSIVolume
		variables map[string]api.VariableItems
		want      string // of the error; the plugin's name and the generation follow where it is received
		received  string
	}{
		{"another name", "db[0]", []*api.CSIVolume{of("db[0]", "p1", "default", "db-0"), files, of("db[0]", "p1", "tests", "db-0")}, nil, "exit code 3", "db-0 1"},
		{"forgotten", "db[0]", nil, map[string]api.VariableItems{"cradle/lv2/db-0": noted(of("db[0]", "p1", "default", "db-0")), "cradle/lv2/db-1": noted(of("db[1]", "p1", "default", "db-1"))}, "exit code 3", "db-0 2"},
		{"forgotten by its name", "db", nil, map[string]api.VariableItems{"cradle/lv2/db": noted(of("db", "p1", "default", "db"))}, "exit code 3", "db 2"},
		{"another namespace's", "db", nil, map[string]api.VariableItems{"cradle/lv2/db": noted(of("db", "p1", "tests", "db"))}, "volume db: Nomad knows none in namespace default", ""},
		{"unknown", "../db?", nil, nil, "volume ../db?: Nomad knows none", ""},
		{"another plugin's has its name", "db", []*api.CSIVolume{of("db", "p1", "default", "db"), of("other", "p3", "tests", "db")}, nil, "volume db: plugin p3 has one of its name db as well (volume other in namespace tests)", ""},
		{"it is there twice", "db", []*api.CSIVolume{of("db", "p1", "default", "db"), of("other", "p2", "tests", "db")}, map[string]api.VariableItems{"cradle/lv2/db": {"generation": "1", "node": "node2", "volume": text(of("other", "p2", "tests", "db"))}}, "exit code 3", "db 1"},
		{"interrupted", "db", []*api.CSIVolume{made(9, of("db", "p1", "default", "db"))}, map[string]api.VariableItems{"cradle/lv2/db": on(of("db", "p2", "default", "db"), "1", "1")}, "exit code 3", "db 1"},
		{"made anew on another node", "db", []*api.CSIVolume{made(11, of("db", "p1", "default", "db"))}, map[string]api.VariableItems{"cradle/lv2/db": on(of("db", "p2", "default", "db"), "1", "1")}, "exit code 3", "db 2"},
		{"made anew, interrupted", "db", []*api.CSIVolume{made(9, of("db", "p1", "default", "db"))}, map[string]api.VariableItems{"cradle/lv2/db": on(of("db", "p2", "default", "db"), "1", "2")}, "exit code 3", "db 2"},
		{"lost again", "db", []*api.CSIVolume{made(11, of("db", "p2", "default", "db"))}, map[string]api.VariableItems{"cradle/lv2/db": on(of("db", "p2", "default", "db"), "1", "1")}, "exit code 3", "db 1"},
		{"no name", "db", []*api.CSIVolume{of("db", "p1", "default", "--into")}, nil, `volume db: what the plugin calls it: "--into" is no name`, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			var received string
			srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				namespace := r.URL.Query().Get("namespace")
				var answer any
				switch dir, last := path.Split(r.URL.Path); {
				case last == "exec":
					var command []string
					if err := json.Unmarshal([]byte(r.URL.Query().Get("command")), &command); err != nil || len(command) < 6 {
						t.Error(command, err)
						return
					}
					received = command[3] + " " + command[5]
					conn, err := (&websocket.Upgrader{}).Upgrade(w, r, nil)
					if err == nil {
						err = errors.Join(conn.WriteMessage(websocket.TextMessage, []byte(`{"exited": true, "result": {"exit_code": 3}}`)), conn.Close())
					}
					if err != nil {
						t.Error(err)
					}
					return
				case r.URL.Path == "/v1/nodes":
					answer = []*api.NodeListStub{{ID: "n2", Name: "node2", Status: api.NodeStatusReady}}
				case dir == "/v1/node/":
					answer = &api.Node{ID: "n2", Name: "node2", CSIControllerPlugins: map[string]*api.CSIInfo{"p2": {Healthy: true, AllocID: "a"}}, CSINodePlugins: map[string]*api.CSIInfo{
						"p2": {NodeInfo: &api.CSINodeInfo{AccessibleTopology: &api.CSITopology{Segments: map[string]string{rpc.TopologyHost: "node2"}}}},
					}}
				case dir == "/v1/plugin/csi/":
					answer = &api.CSIPlugin{ID: "p2", Provider: rpc.Name}
				case dir == "/v1/allocation/":
					group, task := "g", &api.Task{Name: "t", CSIPluginConfig: &api.TaskCSIPluginConfig{ID: "p2"}}
					answer = &api.Allocation{ID: "a", NodeID: "n2", Namespace: "default", TaskGroup: group, Job: &api.Job{TaskGroups: []*api.TaskGroup{{Name: &group, Tasks: []*api.Task{task}}}}}
				case r.URL.Path == "/v1/volumes":
					var all []*api.CSIVolumeListStub
					for _, v := range c.volumes {
						all = append(all, &api.CSIVolumeListStub{ID: v.ID, Namespace: v.Namespace, ExternalID: v.ExternalID, PluginID: v.PluginID, Provider: v.Provider})
					}
					answer = all
				case dir == "/v1/volume/csi/":
					for _, v := range c.volumes {
						if v.ID == last && v.Namespace == namespace {
							answer = v
						}
					}
				case r.URL.Path == "/v1/vars":
					all := []*api.VariableMetadata{}
					for name := range c.variables {
						all = append(all, &api.VariableMetadata{Path: name})
					}
					answer = all
				case r.Method == http.MethodPut:
					answer = &api.Variable{ModifyIndex: 12}
				case strings.HasPrefix(r.URL.Path, "/v1/var/"):
					name := strings.TrimPrefix(r.URL.Path, "/v1/var/")
					if items, ok := c.variables[name]; ok {
						answer = &api.Variable{Path: name, ModifyIndex: 10, Items: items}
					}
				}
				if answer == nil {
					http.NotFound(w, r)
				} else if err := json.NewEncoder(w).Encode(answer); err != nil {
					t.Error(err)
				}
			}))
			defer srv.Close()
			t.Setenv("NOMAD_ADDR", srv.URL)
			r := &restore{c: &cli{stdout: io.Discard, stderr: io.Discard}, to: "node2", namespace: "default"}
			if err := r.run(t.Context(), c.id); err == nil || !strings.Contains(err.Error(), c.want) || received != c.received {
				t.Errorf("%v, received %q; want %s, %q", err, received, c.want, c.received)
			}
		})
	}
}

// What was made of a copy for a look is removed while nobody has used it and Nomad knows no such volume here.
func TestDiscardRestored(t *testing.T) {
	dir := t.TempDir()
	key := filepath.Join(dir, "key")
	newKey(t, key)
	c := &cli{stdout: io.Discard, stderr: io.Discard, backend: "dir", pools: []string{filepath.Join(dir, "pool")}, nodeID: "node1", cold: coldFlags{where: filepath.Join(dir, "cold"), key: key}}
	vault, err := c.cold.open()
	if err = errors.Join(err, os.Mkdir(c.cold.where, 0o700)); err != nil {
		t.Fatal(err)
	}
	const size = 8 << 20
	born := time.Now().Add(-time.Hour).UTC()
	blocks := &volume.Blocks{ReaderAt: strings.NewReader(strings.Repeat("x", size)), Size: size, Data: []volume.Range{{End: size}}, Whole: true}
	of := volume.Volume{ID: "db", Created: born, Size: size, Parameters: volume.Parameters{Class: volume.LV2, Direct: true}}
	if _, _, err := vault.Save(t.Context(), of, volume.Snapshot{Created: born}, cold.Order{Taken: born}, blocks, cold.Copy{}); err != nil {
		t.Fatal(err)
	}
	at := func(host string) []*api.CSITopology {
		return []*api.CSITopology{{Segments: map[string]string{rpc.TopologyHost: host, rpc.TopologyZone: "east"}}}
	}
	// The volume is of generation 0, as is what is in use.
	replaced := func(next, generation string) api.VariableItems {
		return api.VariableItems{"generation": "0", "node": "node1", "volume": "null", "next_node": next, "next_generation": generation}
	}
	for _, c2 := range []struct {
		name    string
		token   api.ACLToken
		volumes []*api.CSIVolumeListStub
		use     bool
		want    string // "" is removed
		owner   api.VariableItems
	}{
		{"another token", api.ACLToken{Type: "client"}, nil, false, "a management token alone (NOMAD_TOKEN)", nil},
		{"known", api.ACLToken{Type: "management"}, []*api.CSIVolumeListStub{{ID: "drill[0]", ExternalID: "drill", Topologies: at("node1")}}, false, "it is the one that is in use", nil},
		{"known somewhere", api.ACLToken{Type: "management"}, []*api.CSIVolumeListStub{{ID: "drill"}}, false, "it is the one that is in use", nil},
		{"known elsewhere", api.ACLToken{Type: "management"}, []*api.CSIVolumeListStub{{ID: "drill", ExternalID: "drill", Topologies: at("node2")}, {ID: "db", Topologies: at("node1")}}, false, "", nil},
		{"used", api.ACLToken{Type: "management"}, nil, true, "it is the one that is in use", nil},
		{"made anew elsewhere", api.ACLToken{Type: "management"}, []*api.CSIVolumeListStub{{ID: "drill", Topologies: at("node2")}}, true, "", replaced("node1", "1")},
		{"made anew here", api.ACLToken{Type: "management"}, []*api.CSIVolumeListStub{{ID: "drill", Topologies: at("node1")}}, true, "it is the one that is in use", replaced("node1", "1")},
		{"made anew, brought to another node", api.ACLToken{Type: "management"}, nil, true, "it is the one that is in use", replaced("node2", "1")},
		{"not made anew", api.ACLToken{Type: "management"}, nil, true, "it is the one that is in use", replaced("node1", "0")},
	} {
		t.Run(c2.name, func(t *testing.T) {
			srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				var answer any = c2.token
				switch r.URL.Path {
				case "/v1/volumes":
					answer = c2.volumes
				case "/v1/acl/token/self":
				case "/v1/var/cradle/lv2/drill":
					if answer = (&api.Variable{Items: c2.owner}); c2.owner != nil {
						break
					}
					fallthrough
				default:
					http.NotFound(w, r)
					return
				}
				if err := json.NewEncoder(w).Encode(answer); err != nil {
					t.Error(err)
				}
			}))
			defer srv.Close()
			t.Setenv("NOMAD_ADDR", srv.URL)
			if err := c.coldRestore(t.Context(), &c.cold, "db", "drill", ""); err != nil {
				t.Fatal(err)
			}
			b, _, err := c.open(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			defer b.Close()
			if c2.use {
				if _, err := b.Stage(t.Context(), "drill", volume.Use{As: volume.AsGuest}); err != nil {
					t.Fatal(err)
				}
			}
			err = c.lv2Discard(t.Context(), "drill")
			_, gerr := b.Get(t.Context(), "drill")
			if (err == nil) != (c2.want == "") || err != nil && !strings.Contains(err.Error(), c2.want) || errors.Is(gerr, volume.ErrNotFound) != (c2.want == "") {
				t.Errorf("%v; the volume: %v; want %q", err, gerr, c2.want)
			}
		})
	}
}

// A copy that another key reads is not told to be damaged, and to be removed: who has brought the wrong key to a new host would lose it.
func TestRestoreOtherKey(t *testing.T) {
	dir := t.TempDir()
	c := &cli{stdout: io.Discard, stderr: io.Discard, backend: "dir", pools: []string{filepath.Join(dir, "pool")}, cold: coldFlags{where: filepath.Join(dir, "cold"), key: filepath.Join(dir, "key")}}
	vault := func() *cold.Vault {
		t.Helper()
		newKey(t, c.cold.key)
		v, err := c.cold.open()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	if err := os.Mkdir(c.cold.where, 0o700); err != nil {
		t.Fatal(err)
	}
	born := time.Now().Add(-time.Hour).UTC()
	of := volume.Volume{ID: "db", Created: born, Size: 1 << 20, Parameters: volume.Parameters{Class: volume.LV2}}
	blocks := &volume.Blocks{ReaderAt: strings.NewReader(""), Size: 1 << 20, Whole: true}
	if _, _, err := vault().Save(t.Context(), of, volume.Snapshot{Created: born}, cold.Order{Taken: born}, blocks, cold.Copy{}); err != nil {
		t.Fatal(err)
	}
	vault()
	err := c.coldRestore(t.Context(), &c.cold, "db", "", "")
	if err == nil || !errors.Is(err, cold.ErrKey) || !strings.Contains(err.Error(), "give this host the key that the copies are made with") || strings.Contains(err.Error(), "lists others") {
		t.Error(err)
	}
}
