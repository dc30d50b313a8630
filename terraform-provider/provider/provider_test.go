package provider

import (
	"context"
	"strings"
	"testing"

	"github.com/hashicorp/terraform-plugin-framework/attr/xattr"
	"github.com/hashicorp/terraform-plugin-framework/datasource"
	"github.com/hashicorp/terraform-plugin-framework/path"
	"github.com/hashicorp/terraform-plugin-framework/provider"
	"github.com/hashicorp/terraform-plugin-framework/resource"
	"github.com/hashicorp/terraform-plugin-framework/resource/schema/planmodifier"
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
