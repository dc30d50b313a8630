package provider

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hashicorp/terraform-plugin-framework/attr"
	"github.com/hashicorp/terraform-plugin-framework/providerserver"
	"github.com/hashicorp/terraform-plugin-framework/tfsdk"
	"github.com/hashicorp/terraform-plugin-framework/types"
	"github.com/hashicorp/terraform-plugin-go/tfprotov6"
	"github.com/hashicorp/terraform-plugin-go/tftypes"

	"github.com/cradlestack/cradlestack/internal/nomadjob"
)

// openServers are the provider as Terraform has it, and as the framework alone would be, of a Nomad that answers so.
func openServers(t *testing.T, nomad http.HandlerFunc) (quick *server, slow tfprotov6.ProviderServer) {
	t.Helper()
	at := httptest.NewServer(http.HandlerFunc(func(out http.ResponseWriter, in *http.Request) {
		if in.URL.Path == "/v1/status/leader" {
			fmt.Fprint(out, `"127.0.0.1:4647"`)
			return
		}
		nomad(out, in)
	}))
	t.Cleanup(at.Close)
	quick, slow = newServer("test"), providerserver.NewProtocol6(New("test")())()
	for _, s := range []tfprotov6.ProviderServer{quick, slow} {
		said, err := s.GetProviderSchema(t.Context(), &tfprotov6.GetProviderSchemaRequest{})
		if err != nil {
			t.Fatal(err)
		}
		object := said.Provider.ValueType()
		config, err := tfprotov6.RawState{JSON: fmt.Appendf(nil, `{"address": %q, "namespace": "default"}`, at.URL)}.Unmarshal(object)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := s.ConfigureProvider(t.Context(), &tfprotov6.ConfigureProviderRequest{Config: packed(t, object, config)})
		if err != nil || len(resp.Diagnostics) > 0 {
			t.Fatal(err, resp.Diagnostics)
		}
	}
	return quick, slow
}

func packed(t *testing.T, object tftypes.Type, v tftypes.Value) *tfprotov6.DynamicValue {
	t.Helper()
	d, err := tfprotov6.NewDynamicValue(object, v)
	if err != nil {
		t.Fatal(err)
	}
	return &d
}

// stateOf is a model as a state has it.
func stateOf(t *testing.T, q *quick, model any) tftypes.Value {
	t.Helper()
	state := tfsdk.State{Raw: tftypes.NewValue(q.object, nil), Schema: q.schema}
	if diags := state.Set(t.Context(), model); diags.HasError() {
		t.Fatal(diags)
	}
	return state.Raw
}

// inPlace changes what is in one place.
func inPlace(t *testing.T, v tftypes.Value, place *tftypes.AttributePath, f func(tftypes.Value) tftypes.Value) tftypes.Value {
	t.Helper()
	v, err := tftypes.Transform(v, func(p *tftypes.AttributePath, v tftypes.Value) (tftypes.Value, error) {
		if p.Equal(place) {
			return f(v), nil
		}
		return v, nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func nothing(v tftypes.Value) tftypes.Value { return tftypes.NewValue(v.Type(), nil) }

// another value than v.
func another(v tftypes.Value) tftypes.Value {
	kind := v.Type()
	switch {
	case kind.Is(tftypes.String) && !v.IsNull():
		return nothing(v)
	case kind.Is(tftypes.String):
		return tftypes.NewValue(kind, "1m") // a size and a duration, too
	case kind.Is(tftypes.Number):
		return tftypes.NewValue(kind, 7)
	case kind.Is(tftypes.Bool):
		b := false
		if !v.IsNull() {
			_ = v.As(&b)
		}
		return tftypes.NewValue(kind, !b)
	case kind.Is(tftypes.List{}) && !v.IsNull():
		return tftypes.NewValue(kind, []tftypes.Value{})
	}
	return nothing(v)
}

// placesIn are those of attributes in a value: in each a configuration may have nothing.
func placesIn(t *testing.T, q *quick, v tftypes.Value) (all []*tftypes.AttributePath) {
	t.Helper()
	err := tftypes.Walk(v, func(p *tftypes.AttributePath, _ tftypes.Value) (bool, error) {
		if _, err := q.schema.AttributeAtTerraformPath(t.Context(), p); err == nil {
			all = append(all, p)
		}
		return true, nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// What is answered without the framework is what that answers.
func TestPlansAsTheFramework(t *testing.T) {
	quick, slow := openServers(t, http.NotFound)
	pod := func(name string, edit func(*podModel)) tftypes.Value {
		m := *models[name]
		m.Status, m.Beyond, m.Instances = str(statusRunning), types.ListValueMust(types.StringType, []attr.Value{}), types.ListValueMust(instance, []attr.Value{})
		if edit != nil {
			edit(&m)
		}
		return stateOf(t, quick.quick["cradle_pod"], &m)
	}
	v := &volumeModel{
		ID: str("default/v"), Name: str("v"), Namespace: str("default"), Plugin: str("cradle"), Class: str("nfs"), Size: size("1GiB"), AccessMode: str("multi-node-multi-writer"), AttachmentMode: str("file-system"), Zone: str("north"),
		Attach: str(attachHost), Parameters: mapOf(map[string]string{"fs": "xfs"}), Protected: types.BoolValue(true), ExternalID: str("e"), Capacity: types.Int64Value(1 << 30),
	}
	for _, c := range []struct {
		what, resource string
		state          tftypes.Value
		private        string
		quick          bool // as it is
	}{
		{"a minimal pod", "cradle_pod", pod("minimal", nil), "", true},
		{"a pod with everything", "cradle_pod", pod("everything", nil), "", true},
		{"a pod that runs once", "cradle_pod", pod("once", nil), "", true},
		{"a pod that has failed", "cradle_pod", pod("minimal", func(m *podModel) { m.Status = str(statusFailed) }), "", false},
		{"a pod that was stopped", "cradle_pod", pod("minimal", func(m *podModel) { m.Status = str(statusStopped) }), "", false},
		{"a pod with what no attribute says", "cradle_pod", pod("minimal", func(m *podModel) { m.Beyond = list("group.service") }), "", false},
		{"a pod with a former environment", "cradle_pod", pod("minimal", nil), `{"stale_env":"dHJ1ZQ=="}`, false},
		{"a volume", "cradle_volume", stateOf(t, quick.quick["cradle_volume"], v), "", true},
	} {
		q := quick.quick[c.resource]
		request := func(config, state tftypes.Value) *tfprotov6.PlanResourceChangeRequest {
			prior := packed(t, q.object, state)
			return &tfprotov6.PlanResourceChangeRequest{TypeName: c.resource, PriorState: prior, ProposedNewState: prior, Config: packed(t, q.object, config), PriorPrivate: []byte(c.private)}
		}
		compare := func(what string, config, state tftypes.Value) {
			t.Helper()
			want, err := slow.PlanResourceChange(t.Context(), request(config, state))
			if err != nil {
				t.Fatal(err)
			}
			planned, err := want.PlannedState.Unmarshal(q.object)
			if err != nil {
				t.Fatal(err)
			}
			if diff, _ := state.Diff(planned); len(diff) > 0 || len(want.Diagnostics) > 0 || len(want.RequiresReplace) > 0 || want.Deferred != nil {
				t.Errorf("%s, %s: the framework plans %v, replaces %v, says %v", c.what, what, diff, want.RequiresReplace, want.Diagnostics)
			}
		}
		config := c.state
		for name, a := range q.schema.Attributes {
			if !a.IsOptional() && !a.IsRequired() {
				config = inPlace(t, config, tftypes.NewAttributePath().WithAttributeName(name), nothing)
			}
		}
		if got := q.keeps(quick.provider.cluster, request(config, c.state)); got != c.quick {
			t.Errorf("%s: answered at once: %t", c.what, got)
		}
		if !c.quick {
			continue
		}
		compare("as it is", config, c.state)
		// All that changes nothing, together: what a configuration leaves out, with the state and with another one.
		for what, change := range map[string]func(tftypes.Value) tftypes.Value{"left out": func(v tftypes.Value) tftypes.Value { return v }, "left out and other": another} {
			said, state, kept, not := config, c.state, 0, 0
			for _, place := range placesIn(t, q, c.state) {
				trySaid, tryState := inPlace(t, said, place, nothing), inPlace(t, state, place, change)
				if q.keeps(quick.provider.cluster, request(trySaid, tryState)) {
					said, state = trySaid, tryState
					kept++
				} else {
					not++
				}
			}
			if kept == 0 || strings.HasSuffix(what, "other") && not == 0 {
				t.Errorf("%s, %s: of %d places a configuration changes nothing, of %d something", c.what, what, kept, not)
			}
			compare(what, said, state)
		}
	}
}

// What a pod's secrets are called is in its state: the same names change nothing, others do.
func TestPlansSecrets(t *testing.T) {
	quick, slow := openServers(t, http.NotFound)
	q := quick.quick["cradle_pod"]
	pod := func(secrets types.Map, names types.List) tftypes.Value {
		m := *models["minimal"]
		m.Status, m.Beyond, m.Instances = str(statusRunning), types.ListValueMust(types.StringType, []attr.Value{}), types.ListValueMust(instance, []attr.Value{})
		m.Containers = []containerModel{plannedContainer("main", func(c *containerModel) {
			c.Secrets, c.SecretNames, c.SecretsAt = secrets, names, str("1")
		})}
		return stateOf(t, q, &m)
	}
	none := types.MapNull(types.StringType)
	for _, c := range []struct {
		said  types.Map
		are   types.List
		keeps bool
	}{
		{mapOf(map[string]string{"A": "1", "B": "2"}), list("A", "B"), true},
		{mapOf(map[string]string{"A": "1"}), list("A", "B"), false},
		{mapOf(map[string]string{"A": "1", "C": "2"}), list("A", "B"), false},
		{mapOf(map[string]string{"A": "1"}), types.ListNull(types.StringType), false},
		{none, list("A"), false},
		{none, types.ListNull(types.StringType), true},
		{types.MapUnknown(types.StringType), list("A"), false},
	} {
		state := pod(none, c.are)
		prior := packed(t, q.object, state)
		req := &tfprotov6.PlanResourceChangeRequest{TypeName: "cradle_pod", PriorState: prior, ProposedNewState: prior, Config: packed(t, q.object, pod(c.said, types.ListNull(types.StringType)))}
		if got := q.keeps(quick.provider.cluster, req); got != c.keeps {
			t.Errorf("%v of a pod with %v: answered at once: %t", c.said, c.are, got)
		}
		resp, err := slow.PlanResourceChange(t.Context(), req)
		if err != nil || len(resp.Diagnostics) > 0 {
			t.Fatal(err, resp.Diagnostics)
		}
		planned, err := resp.PlannedState.Unmarshal(q.object)
		if err != nil {
			t.Fatal(err)
		}
		if diff, _ := state.Diff(planned); (len(diff) == 0) != c.keeps {
			t.Errorf("%v of a pod with %v: the framework plans %v", c.said, c.are, diff)
		}
	}
}

// A pod that is as its state says, and one that is not, are read as the framework reads them.
func TestReadsAsTheFramework(t *testing.T) {
	m := *models["minimal"]
	p, o := m.pod(nil)
	job, err := nomadjob.Job(p, o)
	if err != nil {
		t.Fatal(err)
	}
	version := uint64(0)
	job.Version, job.JobModifyIndex = &version, &version
	asked := 0
	quick, slow := openServers(t, func(out http.ResponseWriter, in *http.Request) {
		switch {
		case strings.HasSuffix(in.URL.Path, "/allocations"):
			fmt.Fprint(out, `[]`)
		case in.URL.Path == "/v1/job/web":
			asked++
			_ = json.NewEncoder(out).Encode(job)
		default:
			http.NotFound(out, in)
		}
	})
	m.Status, m.Beyond, m.Instances = str(statusPending), types.ListValueMust(types.StringType, []attr.Value{}), types.ListValueMust(instance, []attr.Value{})
	q := quick.quick["cradle_pod"]
	state := stateOf(t, q, &m)
	ask := func(state tftypes.Value) {
		t.Helper()
		req := &tfprotov6.ReadResourceRequest{TypeName: "cradle_pod", CurrentState: packed(t, q.object, state)}
		var read [2]tftypes.Value
		for i, s := range []tfprotov6.ProviderServer{quick, slow} {
			resp, err := s.ReadResource(t.Context(), req)
			if err != nil || len(resp.Diagnostics) > 0 {
				t.Fatal(err, resp.Diagnostics)
			}
			if read[i], err = resp.NewState.Unmarshal(q.object); err != nil {
				t.Fatal(err)
			}
		}
		if diff, _ := read[0].Diff(read[1]); len(diff) > 0 {
			t.Error(diff)
		}
	}
	ask(state)
	for _, name := range []string{"replicas", "hostname", "restart", "status", "memory"} {
		ask(inPlace(t, state, tftypes.NewAttributePath().WithAttributeName(name), another))
	}
	if asked != 12 {
		t.Errorf("Nomad is asked %d times for pods that are as they were and that are not, want once by each", asked)
	}
	// The job went: nothing is left of it, whoever reads.
	gone := inPlace(t, state, tftypes.NewAttributePath().WithAttributeName("name"), func(v tftypes.Value) tftypes.Value { return tftypes.NewValue(v.Type(), "gone") })
	ask(gone)
}

// States that earlier versions have written are upgraded as the framework does it.
func TestUpgradesAsTheFramework(t *testing.T) {
	quick, slow := openServers(t, http.NotFound)
	files, err := filepath.Glob("../testdata/state/*.tfstate")
	if err != nil || len(files) == 0 {
		t.Fatal("no states: ", err)
	}
	upgraded := 0
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		var state struct {
			Resources []struct {
				Type      string
				Instances []struct {
					Version    int64           `json:"schema_version"`
					Attributes json.RawMessage `json:"attributes"`
				}
			}
		}
		if err := json.Unmarshal(text, &state); err != nil {
			t.Fatal(file, err)
		}
		for _, r := range state.Resources {
			q := quick.quick[r.Type]
			if q == nil {
				continue
			}
			for _, i := range r.Instances {
				req := &tfprotov6.UpgradeResourceStateRequest{TypeName: r.Type, Version: i.Version, RawState: &tfprotov6.RawState{JSON: i.Attributes}}
				var got [2]tftypes.Value
				for n, s := range []tfprotov6.ProviderServer{quick, slow} {
					resp, err := s.UpgradeResourceState(context.Background(), req)
					if err != nil || len(resp.Diagnostics) > 0 {
						t.Fatal(file, err, resp.Diagnostics)
					}
					if got[n], err = resp.UpgradedState.Unmarshal(q.object); err != nil {
						t.Fatal(err)
					}
				}
				if diff, _ := got[0].Diff(got[1]); len(diff) > 0 {
					t.Errorf("%s: %s: %v", file, r.Type, diff)
				}
				upgraded++
			}
		}
	}
	if upgraded == 0 {
		t.Error("no state of a pod or a volume")
	}
}
