// Command gen writes docs/launch-spec.md, the reference of launch.json and of pods, from the comments in package spec, so that
// there is one text to keep right. Run it at the repository's root: go run ./docs/gen. A test fails where the file is not current.
package main

import (
	"bytes"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
)

func main() {
	if err := run("."); err != nil {
		fmt.Fprintf(os.Stderr, "gen: %v\n", err)
		os.Exit(1)
	}
}

// output is where the reference lies, from the repository's root.
const output = "docs/launch-spec.md"

func run(root string) error {
	text, err := launchSpec(root)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(root, output), text, 0o644)
}

const preamble = `# launch.json, and pods

<!-- Written by docs/gen from the comments in spec/; edit those. -->

A pod directory holds one **launch.json**: what its guest executes, resolved, nothing left to look up. kcradle summon writes it, and it is made to be
read and edited. A **pod** is the same before its images are known.

The text is JSON, read strictly: a field that is not listed here, one that is there twice, null, and anything after the document are errors, and each
error tells file:line:column and the field. Fields marked *required* must be there; any other can be left out.

| type | written as |
|---|---|
| size | a number of bytes, or a string with a unit: "512MiB", "10GB", "64m" (docker's single letters are powers of 1024) |
| duration | "1m30s", "500ms" |
| id | 64 lower-case hexadecimal digits |

An example, one of the files that the tests read:

`

// launchSpec is the text of the reference.
func launchSpec(root string) ([]byte, error) {
	types, err := structs(filepath.Join(root, "spec"))
	if err != nil {
		return nil, err
	}
	example, err := os.ReadFile(filepath.Join(root, "spec/testdata/launch/mariadb.json"))
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer
	b.WriteString(preamble + "```json\n")
	b.Write(example)
	b.WriteString("```\n")
	seen := map[string]bool{}
	// Breadth first: a reader meets the outer types before the inner ones.
	for queue := []string{"Launch", "Pod"}; len(queue) > 0; queue = queue[1:] {
		name := queue[0]
		t, ok := types[name]
		if !ok || seen[name] {
			continue
		}
		seen[name] = true
		fmt.Fprintf(&b, "\n## %s\n\n%s\n", name, paragraph(t.doc))
		if len(t.fields) == 0 {
			b.WriteString("\nIt has no fields: `{}`.\n")
		} else {
			b.WriteString("\n| field | type | |\n|---|---|---|\n")
		}
		for _, f := range t.fields {
			fmt.Fprintf(&b, "| %s | %s | %s |\n", f.name, f.kind, f.doc)
			queue = append(queue, f.refers...)
		}
	}
	return b.Bytes(), nil
}

type structType struct {
	doc    string
	fields []field
}

type field struct {
	name, kind, doc string   // in Markdown
	refers          []string // struct types that the field's type names
}

// structs reads the struct types of a package, by name.
func structs(dir string) (map[string]structType, error) {
	names, err := filepath.Glob(filepath.Join(dir, "*.go"))
	if err != nil {
		return nil, err
	}
	all := map[string]structType{}
	for _, name := range names {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		file, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.ParseComments|parser.SkipObjectResolution)
		if err != nil {
			return nil, err
		}
		for _, decl := range file.Decls {
			gen, ok := decl.(*ast.GenDecl)
			if !ok || gen.Tok != token.TYPE {
				continue
			}
			for _, s := range gen.Specs {
				spec := s.(*ast.TypeSpec)
				if st, ok := spec.Type.(*ast.StructType); ok && spec.Name.IsExported() {
					all[spec.Name.Name] = structType{gen.Doc.Text(), fieldsOf(st)}
				}
			}
		}
	}
	if len(all) == 0 {
		return nil, fmt.Errorf("%s has no struct types; is this the repository's root?", dir)
	}
	return all, nil
}

func fieldsOf(st *ast.StructType) []field {
	var all []field
	for _, f := range st.Fields.List {
		doc := cell(f.Doc.Text(), f.Comment.Text())
		kind, refers := kindOf(f.Type)
		if len(f.Names) == 0 {
			all = append(all, field{"*and all of* " + kind, "", doc, refers})
			continue
		}
		name, optional := jsonName(f.Tag)
		if name == "" {
			continue
		}
		if !optional {
			doc = strings.TrimSuffix("*required*; "+doc, "; ")
		}
		all = append(all, field{"`" + name + "`", kind, doc, refers})
	}
	return all
}

func jsonName(tag *ast.BasicLit) (name string, optional bool) {
	if tag == nil {
		return "", false
	}
	name, options, _ := strings.Cut(reflect.StructTag(strings.Trim(tag.Value, "`")).Get("json"), ",")
	return name, strings.HasPrefix(options, "omit")
}

// kindOf names a Go type as a reader of JSON does.
func kindOf(e ast.Expr) (kind string, refers []string) {
	switch t := e.(type) {
	case *ast.StarExpr:
		return kindOf(t.X)
	case *ast.ArrayType:
		kind, refers = kindOf(t.Elt)
		return "list of " + kind, refers
	case *ast.MapType:
		kind, refers = kindOf(t.Value)
		return "object of " + kind, refers
	case *ast.Ident:
		switch t.Name {
		case "string":
			return "string", nil
		case "bool":
			return "true, false", nil
		case "float64":
			return "number", nil
		case "int", "int64", "uint16", "uint64":
			return "whole number", nil
		case "Bytes":
			return "size", nil
		case "Duration":
			return "duration", nil
		}
		return fmt.Sprintf("[%s](#%s)", t.Name, strings.ToLower(t.Name)), []string{t.Name}
	}
	return fmt.Sprintf("%T", e), nil
}

// cell is a table cell's text.
func cell(parts ...string) string {
	var all []string
	for _, p := range parts {
		if p = paragraph(p); p != "" {
			all = append(all, p)
		}
	}
	return strings.ReplaceAll(strings.Join(all, " "), "|", `\|`)
}

// paragraph puts a comment on one line; Markdown would read its * and < as its own.
func paragraph(s string) string {
	s = regexp.MustCompile(`\s+`).ReplaceAllString(strings.TrimSpace(s), " ")
	return strings.NewReplacer("*", `\*`, "<", "&lt;").Replace(s)
}
