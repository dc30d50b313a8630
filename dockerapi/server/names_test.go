package server

import (
	"encoding/json"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/hashicorp/nomad/api"

	"github.com/cradlestack/cradlestack/internal/nomadjob"
)

// A container that is given no name gets another one where that which the server chose is somebody's. Who asks for a name that is taken is refused.
func TestChosenNames(t *testing.T) {
	const taken = 3 // of those that the server chooses, the first ones
	names := strings.TrimSuffix(nomadjob.DockerNamePath(""), nomadjob.VariableName(""))
	var mu sync.Mutex
	held := map[string]*api.Variable{} // by path
	var got *api.Variable
	nomad := nomadOf(t, func(w http.ResponseWriter, r *http.Request) {
		path, isVariable := strings.CutPrefix(r.URL.Path, "/v1/var/")
		if !isVariable || !strings.HasPrefix(path, names) {
			if isVariable && r.Method == http.MethodPut {
				_, _ = w.Write([]byte("{}"))
				return
			}
			answerNothing(w, r)
			return
		}
		mu.Lock()
		defer mu.Unlock()
		if r.Method != http.MethodPut {
			if held[path] == nil {
				http.NotFound(w, r)
				return
			}
			_ = json.NewEncoder(w).Encode(held[path])
			return
		}
		var v api.Variable
		if err := json.NewDecoder(r.Body).Decode(&v); err != nil || r.URL.Query().Get("cas") != "0" {
			http.Error(w, "this is no name that is to be taken", http.StatusBadRequest)
			return
		}
		if name := v.Items["name"]; len(held) < taken || name == "mine" || held[path] != nil {
			held[path] = &api.Variable{Path: path, Items: api.VariableItems{ownerItem: "another", "name": name}, ModifyTime: time.Now().UnixNano()}
			w.WriteHeader(http.StatusConflict)
			_ = json.NewEncoder(w).Encode(held[path])
			return
		}
		got = &v
		_ = json.NewEncoder(w).Encode(v)
	})
	layouts := t.TempDir()
	image, err := random.Image(1, 1)
	if err != nil {
		t.Fatal(err)
	}
	dir, err := layout.Write(filepath.Join(layouts, "app"), empty.Index)
	if err == nil {
		err = dir.AppendImage(image)
	}
	if err != nil {
		t.Fatal(err)
	}
	ask := serve(t, Config{Nomad: nomad, Layouts: layouts})
	if status, body, _ := ask("POST", "/containers/create", `{"Image": "app", "Cmd": ["true"]}`); status != http.StatusCreated {
		t.Fatalf("%d %s", status, body)
	}
	if got == nil || len(held) != taken || held[got.Path] != nil {
		t.Errorf("the container has got %+v, and of others are %v", got, held)
	}
	if status, body, _ := ask("POST", "/containers/create?name=mine", `{"Image": "app", "Cmd": ["true"]}`); status != http.StatusConflict || !strings.Contains(body, `\"/mine\" is already in use by container \"another\"`) {
		t.Errorf("a name that is taken: %d %s", status, body)
	}
}
