package provider

import (
	"context"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/hashicorp/terraform-plugin-framework/datasource"
	dschema "github.com/hashicorp/terraform-plugin-framework/datasource/schema"
	"github.com/hashicorp/terraform-plugin-framework/provider"
	"github.com/hashicorp/terraform-plugin-framework/resource"
	"github.com/hashicorp/terraform-plugin-framework/resource/schema"

	"github.com/cradlestack/cradlestack/internal/golden"
)

const page = "../../docs/terraform.md"

// described is what all kinds of attributes have.
type described interface {
	GetMarkdownDescription() string
	IsRequired() bool
	IsOptional() bool
	IsComputed() bool
}

// The page's tables are the schemas'.
func TestDocs(t *testing.T) {
	text, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	ctx, p := context.Background(), New("test")()
	var s provider.SchemaResponse
	p.Schema(ctx, provider.SchemaRequest{}, &s)
	rows := map[string]described{}
	for name, a := range s.Schema.Attributes {
		rows[name] = a
	}
	out := fill(t, string(text), "provider", rows)
	for _, f := range p.Resources(ctx) {
		var meta resource.MetadataResponse
		var s resource.SchemaResponse
		f().Metadata(ctx, resource.MetadataRequest{ProviderTypeName: "cradle"}, &meta)
		f().Schema(ctx, resource.SchemaRequest{}, &s)
		out = fill(t, out, meta.TypeName, flat("", s.Schema.Attributes, s.Schema.Blocks))
	}
	for _, f := range p.DataSources(ctx) {
		var meta datasource.MetadataResponse
		var s datasource.SchemaResponse
		f().Metadata(ctx, datasource.MetadataRequest{ProviderTypeName: "cradle"}, &meta)
		f().Schema(ctx, datasource.SchemaRequest{}, &s)
		rows := map[string]described{}
		for name, a := range s.Schema.Attributes {
			rows[name] = a
			if list, ok := a.(dschema.ListNestedAttribute); ok {
				for inner, a := range list.NestedObject.Attributes {
					rows[name+"[]."+inner] = a
				}
			}
		}
		out = fill(t, out, "data "+meta.TypeName, rows)
	}
	golden.Compare(t, page, []byte(out))
}

// A block is described as an attribute is.
type block struct{ schema.ListNestedBlock }

func (block) IsRequired() bool { return false }
func (block) IsOptional() bool { return true }
func (block) IsComputed() bool { return false }

// flat names what is inside of blocks and objects by a path.
func flat(at string, attributes map[string]schema.Attribute, blocks map[string]schema.Block) map[string]described {
	rows := map[string]described{}
	for name, a := range attributes {
		rows[at+name] = a
		switch a := a.(type) {
		case schema.SingleNestedAttribute:
			maps.Copy(rows, flat(at+name+".", a.Attributes, nil))
		case schema.ListNestedAttribute:
			maps.Copy(rows, flat(at+name+"[].", a.NestedObject.Attributes, nil))
		}
	}
	for name, b := range blocks {
		list := b.(schema.ListNestedBlock)
		rows[at+name] = block{list}
		maps.Copy(rows, flat(at+name+".", list.NestedObject.Attributes, list.NestedObject.Blocks))
	}
	return rows
}

// fill writes a table between a page's marks.
func fill(t *testing.T, text, name string, rows map[string]described) string {
	t.Helper()
	before, rest, ok := strings.Cut(text, "<!-- "+name+" -->\n")
	_, after, ok2 := strings.Cut(rest, "<!-- end of "+name+" -->")
	if !ok || !ok2 {
		t.Fatalf("%s has no place for %s: <!-- %[2]s --> and <!-- end of %[2]s -->", page, name)
	}
	var b strings.Builder
	b.WriteString("| name | | |\n|---|---|---|\n")
	for _, row := range slices.SortedFunc(maps.Keys(rows), func(a, b string) int {
		return strings.Compare(strings.ReplaceAll(a, ".", "\x00"), strings.ReplaceAll(b, ".", "\x00"))
	}) {
		a := rows[row]
		kind := "read-only"
		if a.IsRequired() {
			kind = "**required**"
		} else if _, ok := a.(block); ok {
			kind = "blocks"
		} else if a.IsOptional() {
			kind = ""
		}
		fmt.Fprintf(&b, "| `%s` | %s | %s |\n", row, kind, a.GetMarkdownDescription())
	}
	return before + "<!-- " + name + " -->\n" + b.String() + "<!-- end of " + name + " -->" + after
}
