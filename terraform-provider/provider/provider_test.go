package provider

import (
	"context"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/hashicorp/nomad/api"
	"github.com/hashicorp/terraform-plugin-framework/attr"
	"github.com/hashicorp/terraform-plugin-framework/attr/xattr"
	"github.com/hashicorp/terraform-plugin-framework/datasource"
	"github.com/hashicorp/terraform-plugin-framework/path"
	"github.com/hashicorp/terraform-plugin-framework/provider"
	"github.com/hashicorp/terraform-plugin-framework/resource"
	"github.com/hashicorp/terraform-plugin-framework/resource/schema/planmodifier"
	"github.com/hashicorp/terraform-plugin-framework/schema/validator"
	"github.com/hashicorp/terraform-plugin-framework/types"
	"github.com/hashicorp/terraform-plugin-framework/types/basetypes"
)

// Every schema is one that Terraform takes, and says what each attribute is.
func TestSchemas(t *testing.T) {
	ctx, p := context.Background(), New("test")()
	var s provider.SchemaResponse
	p.Schema(ctx, provider.SchemaRequest{}, &s)
	if d := s.Schema.ValidateImplementation(ctx); d.HasError() {
		t.Error(d)
	}
	names := map[string]bool{}
	for _, f := range p.Resources(ctx) {
		var meta resource.MetadataResponse
		var s resource.SchemaResponse
		f().Metadata(ctx, resource.MetadataRequest{ProviderTypeName: "cradle"}, &meta)
		f().Schema(ctx, resource.SchemaRequest{}, &s)
		if d := s.Schema.ValidateImplementation(ctx); d.HasError() {
			t.Errorf("%s: %v", meta.TypeName, d)
		}
		for name, a := range s.Schema.GetAttributes() {
			if a.GetMarkdownDescription() == "" {
				t.Errorf("%s.%s has no description", meta.TypeName, name)
			}
		}
		if _, ok := f().(resource.ResourceWithImportState); !ok {
			t.Errorf("%s can't be imported", meta.TypeName)
		}
		names[meta.TypeName] = true
	}
	for _, f := range p.DataSources(ctx) {
		var meta datasource.MetadataResponse
		var s datasource.SchemaResponse
		f().Metadata(ctx, datasource.MetadataRequest{ProviderTypeName: "cradle"}, &meta)
		f().Schema(ctx, datasource.SchemaRequest{}, &s)
		if d := s.Schema.ValidateImplementation(ctx); d.HasError() {
			t.Errorf("data %s: %v", meta.TypeName, d)
		}
		for name, a := range s.Schema.GetAttributes() {
			if a.GetMarkdownDescription() == "" {
				t.Errorf("data %s.%s has no description", meta.TypeName, name)
			}
		}
	}
	if !names["cradle_volume"] || !names["cradle_snapshot"] {
		t.Errorf("resources are %v", names)
	}
}

func size(s string) sizeValue { return sizeValue{basetypes.NewStringValue(s)} }

func TestSize(t *testing.T) {
	for _, c := range []struct {
		was, is string
		same    bool
	}{
		{"10GiB", "10GiB", true},
		{"10GiB", "10240MiB", true},
		{"10GiB", "10 G", true},
		{"10GB", "10000 MB", true},
		{"10GiB", "10GB", false},
		{"1GiB", "2GiB", false},
	} {
		if got, _ := size(c.was).StringSemanticEquals(t.Context(), size(c.is)); got != c.same {
			t.Errorf("%s is %s: %t", c.was, c.is, got)
		}
		resp := planmodifier.StringResponse{PlanValue: basetypes.NewStringValue(c.is)}
		sameQuantity[inBytes]{}.PlanModifyString(t.Context(), planmodifier.StringRequest{StateValue: basetypes.NewStringValue(c.was), PlanValue: resp.PlanValue}, &resp)
		if want := map[bool]string{true: c.was, false: c.is}[c.same]; resp.PlanValue.ValueString() != want {
			t.Errorf("planned %s after %s: %s, want %s", c.is, c.was, resp.PlanValue, want)
		}
	}
	for text, want := range map[string]string{"10GiB": "", "0": "there has to be something", "ten": "is none of B KB", "10 GX": "is none of B KB"} {
		var resp xattr.ValidateAttributeResponse
		size(text).ValidateAttribute(t.Context(), xattr.ValidateAttributeRequest{Path: path.Root("size")}, &resp)
		if want == "" && resp.Diagnostics.HasError() || want != "" && (!resp.Diagnostics.HasError() || !strings.Contains(resp.Diagnostics[0].Detail(), want)) {
			t.Errorf("%s: %v, want %q", text, resp.Diagnostics, want)
		}
	}
}

// A volume that its node does not let go of in time is told by what has it, also where time ends while Nomad is asked again.
func TestVolumeNotFreed(t *testing.T) {
	ctx, end := context.WithCancel(t.Context())
	asked := false
	nomad := httptest.NewServer(http.HandlerFunc(func(out http.ResponseWriter, in *http.Request) {
		if asked {
			end()
			<-in.Context().Done()
			return
		}
		asked = true
		http.Error(out, "volume v: in use: it is mounted on /alloc/v", http.StatusInternalServerError)
	}))
	defer nomad.Close()
	client, err := api.NewClient(&api.Config{Address: nomad.URL})
	if err != nil {
		t.Fatal(err)
	}
	if err := (&cluster{nomad: client}).deleteFreed(ctx, "default", "v"); err == nil || !strings.Contains(err.Error(), "it is mounted on /alloc/v") {
		t.Errorf("%v; want what has the volume", err)
	}
}

// A volume that somebody else deletes meanwhile, as Nomad does for a Terraform that was killed, is gone all the same; another volume's name is no such answer.
func TestVolumeGone(t *testing.T) {
	said := ""
	nomad := httptest.NewServer(http.HandlerFunc(func(out http.ResponseWriter, in *http.Request) {
		http.Error(out, said, http.StatusInternalServerError)
	}))
	defer nomad.Close()
	client, err := api.NewClient(&api.Config{Address: nomad.URL})
	if err != nil {
		t.Fatal(err)
	}
	for text, gone := range map[string]bool{"volume not found: v": true, "volume not found: other-v": false, "volume not found: vv": false, "no leader": false} {
		said = text
		if err := (&cluster{nomad: client}).deleteFreed(t.Context(), "default", "v"); gone != (err == nil) {
			t.Errorf("%s: %v", text, err)
		}
	}
}

// An apply that is interrupted while it waits, and a Nomad that goes away then, leave the pod that was registered in the state, so that it can be destroyed.
func TestInterruptedApply(t *testing.T) {
	ctx, interrupt := context.WithCancel(t.Context())
	nomad := httptest.NewServer(http.HandlerFunc(func(out http.ResponseWriter, in *http.Request) {
		switch {
		case in.Method == http.MethodPut && in.URL.Path == "/v1/jobs":
			_, _ = out.Write([]byte(`{"EvalID": "e", "JobModifyIndex": 7}`))
		case in.URL.Path == "/v1/validate/job":
			_, _ = out.Write([]byte(`{}`))
		case in.URL.Path == "/v1/evaluation/e":
			interrupt()
			<-in.Context().Done()
		default:
			http.Error(out, "gone", http.StatusBadGateway)
		}
	}))
	defer nomad.Close()
	client, err := api.NewClient(&api.Config{Address: nomad.URL})
	if err != nil {
		t.Fatal(err)
	}
	m := planned(func(m *podModel) { m.Instances, m.EnvIndex = types.ListUnknown(instance), types.Int64Unknown() })
	w, err := m.wish(m)
	if err != nil {
		t.Fatal(err)
	}
	diags := (&podResource{&cluster{nomad: client}}).register(ctx, w, nil, m)
	if m.Status.ValueString() != statusPending || m.Instances.IsUnknown() || m.EnvIndex.IsUnknown() {
		t.Errorf("of the pod the state has %v, %v, %v: %v", m.Status, m.Instances, m.EnvIndex, diags)
	}
	if len(diags) == 0 || !strings.Contains(diags[0].Detail(), "was interrupted") {
		t.Errorf("the apply says %v", diags)
	}
}

// What a volume's configuration says that is nothing, stays as it is written: nothing of it makes another volume.
func TestVolumeReadsBackNothing(t *testing.T) {
	m := volumeModel{SnapshotID: str(""), CloneID: str(""), Snapshots: str(""), Parameters: types.MapValueMust(types.StringType, map[string]attr.Value{})}
	was := m
	m.read(&api.CSIVolume{ID: "v", Parameters: map[string]string{classParameter: "nfs"}})
	for name, v := range map[string][2]attr.Value{"snapshot_id": {was.SnapshotID, m.SnapshotID}, "clone_id": {was.CloneID, m.CloneID}, "snapshots": {was.Snapshots, m.Snapshots}, "parameters": {was.Parameters, m.Parameters}} {
		if !v[0].Equal(v[1]) {
			t.Errorf("%s is %v, was %v", name, v[1], v[0])
		}
	}
	for _, v := range []attr.Value{types.StringNull(), str(""), types.MapNull(types.StringType), was.Parameters} {
		if !saysNothing(v) {
			t.Errorf("%v says something", v)
		}
	}
	for _, v := range []attr.Value{types.StringUnknown(), str("a"), types.MapUnknown(types.StringType), mapOf(map[string]string{"fs": "xfs"})} {
		if saysNothing(v) {
			t.Errorf("%v says nothing", v)
		}
	}
}

// A name in an environment that is none is refused, as its value would be read back as another variable's, and told without that value.
func TestEnvNames(t *testing.T) {
	for name, good := range map[string]bool{"A": true, "a.b-c": true, "": false, "A=B": false, "A\x00": false} {
		var resp validator.MapResponse
		envMap{}.ValidateMap(t.Context(), validator.MapRequest{Path: path.Root("secret_env"), ConfigValue: mapOf(map[string]string{name: "hidden"})}, &resp)
		if resp.Diagnostics.HasError() == good || !good && strings.Contains(resp.Diagnostics[0].Detail(), "hidden") {
			t.Errorf("%q: %v", name, resp.Diagnostics)
		}
	}
}

// A Nomad that is away for a moment while pods are waited for is asked again.
func TestNomadIsAwayForAMoment(t *testing.T) {
	asked := 0
	nomad := httptest.NewServer(http.HandlerFunc(func(out http.ResponseWriter, in *http.Request) {
		switch asked++; asked {
		case 1:
			http.Error(out, "No cluster leader", http.StatusInternalServerError)
		case 2:
			panic(http.ErrAbortHandler)
		default:
			_, _ = out.Write([]byte(`{"Status": "failed", "StatusDescription": "told at last"}`))
		}
	}))
	defer nomad.Close()
	client, err := api.NewClient(&api.Config{Address: nomad.URL})
	if err != nil {
		t.Fatal(err)
	}
	m := planned(func(*podModel) {})
	w, err := m.wish(m)
	if err != nil {
		t.Fatal(err)
	}
	if d := (&cluster{nomad: client}).wait(t.Context(), w, "e", m); len(d) != 1 || !strings.Contains(d[0].Detail(), "told at last") || asked != 3 {
		t.Errorf("asked %d times, it is told\n%v", asked, d)
	}
}
