package main

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spf13/cobra"

	"github.com/cradlestack/cradlestack/internal/golden"
)

// TestReference keeps docs/kcradle.md what the commands say of themselves: go test ./driver-cradle/kcradle -run TestReference -update.
func TestReference(t *testing.T) {
	t.Setenv("CRADLE_ROOT", "")
	var want bytes.Buffer
	want.WriteString("# kcradle\n\n<!-- Written from the commands' own help: go test ./driver-cradle/kcradle -run TestReference -update -->\n")
	reference(&want, (&cli{stdin: os.Stdin, stdout: io.Discard, stderr: io.Discard}).command())
	golden.Compare(t, filepath.Join("..", "..", "docs", "kcradle.md"), want.Bytes())
}

// reference writes a command and those below it. A command without a description is no use to anybody and an error here.
func reference(w *bytes.Buffer, cmd *cobra.Command) {
	if cmd.Hidden || cmd.Name() == "help" || cmd.Name() == "completion" {
		return
	}
	if cmd.HasParent() {
		fmt.Fprintf(w, "\n## %s\n\n", cmd.CommandPath())
	} else {
		w.WriteString("\n")
	}
	text := cmd.Long
	if text == "" {
		text = strings.ToUpper(cmd.Short[:1]) + cmd.Short[1:] + "."
	}
	if !cmd.HasSubCommands() {
		fmt.Fprintf(w, "```\n%s\n```\n\n", cmd.UseLine())
	}
	fmt.Fprintf(w, "%s\n", fenced(text))
	if cmd.Example != "" {
		fmt.Fprintf(w, "\n```sh\n%s\n```\n", strings.TrimSpace(cmd.Example))
	}
	if flags := cmd.LocalFlags(); flags.HasAvailableFlags() {
		fmt.Fprintf(w, "\n```\n%s```\n", flags.FlagUsages())
	}
	for _, sub := range cmd.Commands() {
		reference(w, sub)
	}
}

// fenced puts a text's indented parts, which are tables and examples, where Markdown leaves them as they are.
func fenced(text string) string {
	var b strings.Builder
	open := false
	for line := range strings.Lines(strings.TrimSpace(text) + "\n") {
		indented := strings.HasPrefix(line, "  ")
		if indented != open && (indented || strings.TrimSpace(line) != "") {
			b.WriteString("```\n")
			open = indented
		}
		b.WriteString(line)
	}
	if open {
		b.WriteString("```\n")
	}
	return strings.TrimRight(b.String(), "\n")
}
