package driver

import (
	"github.com/hashicorp/nomad/plugins/shared/hclspec"
)

// A key is one of a configuration block's: the schema that Nomad checks configurations with and docs/nomad-driver.md are made of these.
type key struct {
	name string
	kind string // HCL type: string, number, bool, list(string); block; blocks (any number of them); or attrs (a block of free names)
	must bool
	def  string // the default, for people
	doc  string
	keys []key // of a block, and of blocks
	// label is what the name of each block means; such blocks have one.
	label string
}

// Kinds beside HCL's types.
const (
	text     = "string"
	number   = "number"
	boolean  = "bool"
	texts    = "list(string)"
	block    = "block"
	blocks   = "blocks"
	freeText = "attrs"
)

// spec is what Nomad checks a configuration with. Unknown keys are its errors.
func schemaOf(keys []key) *hclspec.Spec {
	attrs := map[string]*hclspec.Spec{}
	for _, k := range keys {
		attrs[k.name] = k.spec()
	}
	return hclspec.NewObject(attrs)
}

func (k *key) spec() *hclspec.Spec {
	switch {
	case k.kind == block:
		return hclspec.NewBlock(k.name, k.must, schemaOf(k.keys))
	case k.kind == blocks && k.label != "":
		return hclspec.NewBlockMap(k.name, []string{k.label}, schemaOf(k.keys))
	case k.kind == blocks:
		return hclspec.NewBlockList(k.name, schemaOf(k.keys))
	case k.kind == freeText:
		return hclspec.NewBlockAttrs(k.name, text, k.must)
	case k.kind == number:
		// HCL makes a text of a number. As a number, 0.1 would be one that msgpack has no form for, and what is wrong with 1.5 told without the key.
		return hclspec.NewAttr(k.name, text, k.must)
	}
	return hclspec.NewAttr(k.name, k.kind, k.must)
}
