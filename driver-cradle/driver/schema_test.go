package driver

import (
	"reflect"
	"strings"
	"testing"
)

// checkDecoded checks that a struct has a field for each key, of a fitting type, and none else.
func checkDecoded(t *testing.T, at string, keys []key, into any) {
	t.Helper()
	fields := map[string]reflect.Type{}
	for _, f := range reflect.VisibleFields(reflect.Indirect(reflect.ValueOf(into)).Type()) {
		if name := f.Tag.Get("codec"); name != "" {
			fields[name] = f.Type
		}
	}
	known := map[string]bool{}
	for _, k := range keys {
		name := at + k.name
		if known[k.name] {
			t.Errorf("%s is there twice", name)
		}
		known[k.name] = true
		if k.doc == "" || !strings.HasSuffix(k.doc, ".") {
			t.Errorf("%s: its doc %q is no sentence", name, k.doc)
		}
		f, ok := fields[k.name]
		if !ok {
			t.Errorf("%s is in the schema, and nothing decodes it", name)
			continue
		}
		if f.Kind() == reflect.Pointer {
			f = f.Elem()
		}
		want := map[string]string{text: "string", number: "string", boolean: "bool", texts: "[]string", freeText: "map[string]string"}[k.kind]
		switch k.kind {
		case block:
			checkDecoded(t, name+".", k.keys, reflect.New(f).Interface())
		case blocks:
			if f = f.Elem(); f.Kind() == reflect.Pointer {
				f = f.Elem()
			}
			checkDecoded(t, name+".", k.keys, reflect.New(f).Interface())
		default:
			if f.String() != want {
				t.Errorf("%s is a %s, decoded into %v", name, k.kind, f)
			}
		}
	}
	if strings.Contains(at, "container.") || at == "" {
		return // one struct serves the task and its container blocks
	}
	for name := range fields {
		if !known[name] {
			t.Errorf("%s%s is decoded, and not in the schema", at, name)
		}
	}
}
