package spec

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"
)

// MaxDocument is the size of the largest document that ParseLaunch and ParsePod read.
const MaxDocument = 4 << 20

// An Error says what is wrong with one field of a document.
type Error struct {
	File         string // "" where the value was not read from a document
	Line, Column int    // from 1, the column in bytes; 0 where the value was not read from a document
	Field        string // containers[0].mounts[1].path; "" is the document as a whole
	Message      string // what is wrong; what to do
}

// Error is file:line:column: field: message, without the parts that are not known.
func (e *Error) Error() string {
	var b strings.Builder
	if e.Line > 0 {
		fmt.Fprintf(&b, "%s:%d:%d: ", e.File, e.Line, e.Column)
	}
	if e.Field != "" {
		b.WriteString(e.Field + ": ")
	}
	b.WriteString(e.Message)
	return b.String()
}

// ParseLaunch reads and validates a launch.json. Unknown and repeated fields, null, and anything after the document are
// errors, as is every value that no guest could execute. The error is an *Error, or several of them joined; file is only its name there.
func ParseLaunch(file string, data []byte) (*Launch, error) {
	var l Launch
	if err := parse(file, data, &l, l.validate); err != nil {
		return nil, err
	}
	return &l, nil
}

// ParsePod reads and validates a Pod, as ParseLaunch does a Launch.
func ParsePod(file string, data []byte) (*Pod, error) {
	var p Pod
	if err := parse(file, data, &p, p.validate); err != nil {
		return nil, err
	}
	return &p, nil
}

// parse fills *into, which validate then judges.
func parse(file string, data []byte, into any, validate func(*validator)) error {
	d := document{file: file, data: data, at: map[string]int{}}
	if len(data) > MaxDocument {
		return d.errorAt(0, "", "the document has more than %s; is it the right file?", Bytes(MaxDocument))
	}
	if i := invalidUTF8(data); i >= 0 {
		return d.errorAt(i, "", "no valid UTF-8; is it the right file?")
	}
	root, err := d.tree()
	if err != nil {
		return err
	}
	if err := d.bind(root, reflect.ValueOf(into).Elem(), ""); err != nil {
		return err
	}
	var v validator
	validate(&v)
	return v.err(d.locate)
}

func invalidUTF8(data []byte) int {
	for i := 0; i < len(data); {
		r, n := utf8.DecodeRune(data[i:])
		if r == utf8.RuneError && n == 1 {
			return i
		}
		i += n
	}
	return -1
}

// A document remembers where in the text each field is.
type document struct {
	file string
	data []byte
	at   map[string]int // field → offset of its value; of its key where the field is a map's
}

// A node is one JSON value and where it is.
type node struct {
	offset  int
	raw     json.RawMessage // of a scalar
	delim   json.Delim      // '{', '[' or 0
	members []member        // of an object
	items   []node          // of a list
}

type member struct {
	name   string
	offset int
	value  node
}

func (d *document) errorAt(offset int, field, format string, args ...any) *Error {
	before := d.data[:min(offset, len(d.data))]
	return &Error{
		File:    d.file,
		Line:    bytes.Count(before, []byte("\n")) + 1,
		Column:  len(before) - (bytes.LastIndexByte(before, '\n') + 1) + 1,
		Field:   field,
		Message: fmt.Sprintf(format, args...),
	}
}

// locate gives a semantic error the place of its field, or of what encloses it where the field is missing.
func (d *document) locate(e *Error) {
	field := e.Field
	for {
		if offset, ok := d.at[field]; ok {
			at := d.errorAt(offset, "", "")
			e.File, e.Line, e.Column = at.File, at.Line, at.Column
			return
		}
		field = field[:max(0, strings.LastIndexAny(field, ".["))]
	}
}

// maxDepth of nested values; the deepest that a Launch has is 6.
const maxDepth = 32

// tree reads the text as JSON.
func (d *document) tree() (node, error) {
	dec := json.NewDecoder(bytes.NewReader(d.data))
	dec.UseNumber()
	root, err := d.value(dec, 0)
	if err != nil {
		return node{}, err
	}
	end := int(dec.InputOffset())
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return node{}, d.errorAt(d.skip(end, ""), "", "something follows the document; remove it")
	}
	return root, nil
}

// skip goes from offset over white space and the given separators.
func (d *document) skip(offset int, separators string) int {
	for offset < len(d.data) && strings.IndexByte(" \t\r\n"+separators, d.data[offset]) >= 0 {
		offset++
	}
	return offset
}

// value reads the next value.
func (d *document) value(dec *json.Decoder, depth int) (node, error) {
	n := node{offset: d.skip(int(dec.InputOffset()), ",:")}
	if depth > maxDepth {
		return n, d.errorAt(n.offset, "", "values are nested deeper than %d; nothing here is", maxDepth)
	}
	token, err := dec.Token()
	if err != nil {
		return n, d.syntax(err, n.offset)
	}
	delim, ok := token.(json.Delim)
	if !ok {
		n.raw = d.data[n.offset:dec.InputOffset()]
		return n, nil
	}
	n.delim = delim
	seen := map[string]bool{}
	for dec.More() {
		var m member
		if delim == '{' {
			m.offset = d.skip(int(dec.InputOffset()), ",")
			key, err := dec.Token()
			if err != nil {
				return n, d.syntax(err, m.offset)
			}
			m.name = key.(string) // the decoder allows nothing else as a key
			if seen[m.name] {
				return n, d.errorAt(m.offset, m.name, "is there twice; keep one")
			}
			seen[m.name] = true
		}
		if m.value, err = d.value(dec, depth+1); err != nil {
			return n, err
		}
		if delim == '{' {
			n.members = append(n.members, m)
		} else {
			n.items = append(n.items, m.value)
		}
	}
	if _, err := dec.Token(); err != nil {
		return n, d.syntax(err, int(dec.InputOffset()))
	}
	return n, nil
}

// syntax places what the decoder says. Its offsets point behind the offending byte.
func (d *document) syntax(err error, offset int) error {
	var s *json.SyntaxError
	switch {
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return d.errorAt(len(d.data), "", "the document ends too early; is a closing bracket missing?")
	case errors.As(err, &s):
		return d.errorAt(max(offset, int(s.Offset)-1), "", "no valid JSON: %v", s)
	default:
		return d.errorAt(offset, "", "no valid JSON: %v", err)
	}
}

var unmarshaler = reflect.TypeFor[json.Unmarshaler]()

// bind stores a value in v, strictly: encoding/json alone would ignore the case of names, take null for anything, and
// tell of an unknown field without its place.
func (d *document) bind(n node, v reflect.Value, field string) error {
	if _, keyed := d.at[field]; !keyed {
		d.at[field] = n.offset
	}
	if string(n.raw) == "null" {
		return d.errorAt(n.offset, field, "null is no value; leave the field out")
	}
	if v.Kind() == reflect.Pointer {
		v.Set(reflect.New(v.Type().Elem()))
		v = v.Elem()
	}
	if v.Addr().Type().Implements(unmarshaler) {
		return d.scalar(n, v, field)
	}
	switch v.Kind() {
	case reflect.Struct:
		return d.object(n, v, field)
	case reflect.Map:
		return d.dictionary(n, v, field)
	case reflect.Slice:
		return d.list(n, v, field)
	default:
		return d.scalar(n, v, field)
	}
}

func (d *document) object(n node, v reflect.Value, field string) error {
	if n.delim != '{' {
		return d.errorAt(n.offset, field, "is %s; write an object: {…}", n.kind())
	}
	known := fields(v.Type())
	for _, m := range n.members {
		index, ok := known[m.name]
		if !ok {
			return d.errorAt(m.offset, join(field, m.name), "there is no such field; %s", suggest(m.name, known))
		}
		if err := d.bind(m.value, v.FieldByIndex(index), join(field, m.name)); err != nil {
			return err
		}
	}
	return nil
}

func (d *document) dictionary(n node, v reflect.Value, field string) error {
	if n.delim != '{' {
		return d.errorAt(n.offset, field, "is %s; write an object: {…}", n.kind())
	}
	v.Set(reflect.MakeMapWithSize(v.Type(), len(n.members)))
	for _, m := range n.members {
		key := entry(field, m.name)
		d.at[key] = m.offset
		value := reflect.New(v.Type().Elem()).Elem()
		if err := d.bind(m.value, value, key); err != nil {
			return err
		}
		v.SetMapIndex(reflect.ValueOf(m.name), value)
	}
	return nil
}

func (d *document) list(n node, v reflect.Value, field string) error {
	if n.delim != '[' {
		return d.errorAt(n.offset, field, "is %s; write a list: […]", n.kind())
	}
	v.Set(reflect.MakeSlice(v.Type(), len(n.items), len(n.items)))
	for i, item := range n.items {
		if err := d.bind(item, v.Index(i), index(field, i)); err != nil {
			return err
		}
	}
	return nil
}

func (d *document) scalar(n node, v reflect.Value, field string) error {
	if n.delim != 0 {
		return d.errorAt(n.offset, field, "is %s; write %s", n.kind(), wanted(v))
	}
	err := json.Unmarshal(n.raw, v.Addr().Interface())
	var mismatch *json.UnmarshalTypeError
	switch {
	case errors.As(err, &mismatch) && strings.HasPrefix(mismatch.Value, "number "):
		return d.errorAt(n.offset, field, "%s is out of range; write %s", n.raw, wanted(v))
	case errors.As(err, &mismatch):
		return d.errorAt(n.offset, field, "is %s; write %s", n.kind(), wanted(v))
	case err != nil:
		return d.errorAt(n.offset, field, "%v", err)
	}
	return nil
}

// kind names a value for a person.
func (n node) kind() string {
	switch {
	case n.delim == '{':
		return "an object"
	case n.delim == '[':
		return "a list"
	case n.raw[0] == '"':
		return "a string"
	case n.raw[0] == 't', n.raw[0] == 'f':
		return "true or false"
	default:
		return "a number"
	}
}

// wanted names what a field takes.
func wanted(v reflect.Value) string {
	switch v.Interface().(type) {
	case Bytes:
		return `a size such as "512MiB"`
	case Duration:
		return `a duration such as "1m30s"`
	}
	switch v.Kind() {
	case reflect.String:
		return "a string"
	case reflect.Bool:
		return "true or false"
	case reflect.Uint16:
		return "a number from 0 to 65535"
	case reflect.Uint64:
		return "a whole number, not below 0"
	case reflect.Float64:
		return "a number"
	default:
		return "a whole number"
	}
}

// fields maps the names in JSON to a struct's fields, those of embedded structs among them.
func fields(t reflect.Type) map[string][]int {
	known := map[string][]int{}
	for _, f := range reflect.VisibleFields(t) {
		if name, _, _ := strings.Cut(f.Tag.Get("json"), ","); name != "" {
			known[name] = f.Index
		}
	}
	return known
}

// suggest tells which field was meant, or which there are.
func suggest(name string, known map[string][]int) string {
	names := make([]string, 0, len(known))
	for k := range known {
		names = append(names, k)
	}
	slices.Sort(names)
	best, bestDistance := "", 3
	for _, k := range names {
		if n := distance(strings.ToLower(name), strings.ToLower(k)); n < bestDistance {
			best, bestDistance = k, n
		}
	}
	if best != "" {
		return "did you mean " + best + "?"
	}
	return "known are " + strings.Join(names, ", ")
}

// distance is Levenshtein's, of names short enough for a typing error to matter.
func distance(a, b string) int {
	if len(a) > 64 || len(b) > 64 {
		return 64
	}
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost++
			}
			diagonal, row[j+1] = row[j+1], min(cost, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}

// join, index and entry write field paths as people read them in messages.
func join(field, name string) string {
	if field == "" {
		return name
	}
	return field + "." + name
}

func index(field string, i int) string { return field + "[" + strconv.Itoa(i) + "]" }

func entry(field, key string) string { return field + "[" + strconv.Quote(key) + "]" }
