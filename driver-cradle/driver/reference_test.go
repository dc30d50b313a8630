package driver

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/cradlestack/cradlestack/internal/golden"
)

// docs/nomad-driver.md is written from the schemas: go test ./driver-cradle/driver -run TestReference -update
func TestReference(t *testing.T) {
	const path = "../../docs/nomad-driver.md"
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	text := string(data)
	for _, section := range []struct {
		name string
		keys []key
	}{{"plugin", configKeys}, {"task", taskKeys}} {
		begin, end := fmt.Sprintf("<!-- %s keys -->\n", section.name), fmt.Sprintf("<!-- end of %s keys -->\n", section.name)
		head, rest, ok := strings.Cut(text, begin)
		_, tail, closed := strings.Cut(rest, end)
		if !ok || !closed {
			t.Fatalf("%s has no place for the %s's keys", path, section.name)
		}
		var b strings.Builder
		b.WriteString("| key | type | default | |\n|---|---|---|---|\n")
		writeKeys(&b, "", section.keys)
		text = head + begin + b.String() + end + tail
	}
	golden.Compare(t, path, []byte(text))
}

func writeKeys(b *strings.Builder, at string, keys []key) {
	common := map[string]bool{}
	if strings.HasPrefix(at, "container.") {
		for _, k := range containerKeys {
			common[k.name] = true
		}
	}
	for _, k := range keys {
		if common[k.name] {
			continue // said of the task
		}
		kind := map[string]string{block: "block", blocks: "blocks", freeText: "block of names"}[k.kind]
		if kind == "" {
			kind = k.kind
		}
		if k.label != "" {
			kind = fmt.Sprintf("blocks, by %s", k.label)
		}
		def := k.def
		if k.must {
			def = "*required*"
		}
		fmt.Fprintf(b, "| `%s%s` | %s | %s | %s |\n", at, k.name, kind, def, strings.ReplaceAll(k.doc, "|", "\\|"))
		writeKeys(b, at+k.name+".", k.keys)
	}
}
