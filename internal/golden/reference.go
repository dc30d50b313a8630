package golden

import (
	"bytes"
	"fmt"
	"strings"
	"testing"

	"github.com/spf13/cobra"
)

// Reference keeps a page of docs/ what a program's commands say of themselves; how is the command that writes it anew. Defaults that are taken from the
// environment or the host have to be the same everywhere: the test unsets what they come from.
func Reference(t testing.TB, file, how string, root *cobra.Command) {
	t.Helper()
	var b bytes.Buffer
	fmt.Fprintf(&b, "# %s\n\n<!-- Written from the commands' own help: %s -->\n", root.Name(), how)
	reference(&b, root)
	Compare(t, file, b.Bytes())
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
