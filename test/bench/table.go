package main

import (
	"fmt"
	"io"
	"os"
	"runtime"
	"slices"
	"strings"
	"time"
)

// A row is one measurement beside what it is compared with.
type row struct {
	what, value, beside string
	ratio               float64 // 0: none
	limit               string  // as promised; "" is only reported
	over                bool
}

type table struct{ rows []row }

// compare adds a ratio that must be at most (or at least) a limit; 0 is no limit.
func (t *table) compare(what string, value, beside string, ratio, atMost, atLeast float64) {
	r := row{what: what, value: value, beside: beside, ratio: ratio}
	switch {
	case atMost > 0:
		r.limit, r.over = fmt.Sprintf("at most %g", atMost), ratio > atMost
	case atLeast > 0:
		r.limit, r.over = fmt.Sprintf("at least %g", atLeast), ratio < atLeast
	}
	t.rows = append(t.rows, r)
}

// report adds a value that has its limit in itself.
func (t *table) report(what, value, beside, limit string, over bool) {
	t.rows = append(t.rows, row{what: what, value: value, beside: beside, limit: limit, over: over})
}

func (t *table) exceeded() []string {
	var all []string
	for _, r := range t.rows {
		if r.over {
			all = append(all, r.what)
		}
	}
	return all
}

// print writes the table as Markdown.
func (t *table) print(w io.Writer) {
	fmt.Fprint(w, "| what | measured | beside | ratio | promised |\n|---|---|---|---|---|\n")
	for _, r := range t.rows {
		ratio := ""
		if r.ratio > 0 {
			ratio = fmt.Sprintf("%.2f", r.ratio)
		}
		limit := r.limit
		switch {
		case limit == "":
			limit = "reported"
		case r.over:
			limit = "**" + limit + "**"
		}
		fmt.Fprintf(w, "| %s | %s | %s | %s | %s |\n", r.what, r.value, r.beside, ratio, limit)
	}
}

// writeInto replaces the table in a document, and says where it was measured.
func (t *table) writeInto(file string) error {
	text, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	const begin, end = "<!-- table -->\n", "<!-- /table -->"
	before, rest, ok := strings.Cut(string(text), begin)
	_, after, closed := strings.Cut(rest, end)
	if !ok || !closed {
		return fmt.Errorf("%s has no place for the table: %s…%s", file, strings.TrimSpace(begin), end)
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%s%sMeasured %s on %s.\n\n", before, begin, time.Now().UTC().Format(time.DateOnly), machine())
	t.print(&b)
	b.WriteString(end + after)
	return os.WriteFile(file, []byte(b.String()), 0o644)
}

// machine names the processor and whether it virtualises.
func machine() string {
	model := "an unknown processor"
	virtual := "without hardware virtualization (QEMU emulates)"
	text, _ := os.ReadFile("/proc/cpuinfo")
	for line := range strings.Lines(string(text)) {
		name, value, _ := strings.Cut(line, ":")
		switch strings.TrimSpace(name) {
		case "model name":
			model = strings.TrimSpace(value)
		case "flags":
			if flags := strings.Fields(value); slices.Contains(flags, "vmx") || slices.Contains(flags, "svm") {
				virtual = "with hardware virtualization"
			}
		}
	}
	return fmt.Sprintf("%d × %s, %s", runtime.NumCPU(), model, virtual)
}

// median of durations; of two in the middle the lower.
func median(all []time.Duration) time.Duration {
	sorted := slices.Sorted(slices.Values(all))
	return sorted[(len(sorted)-1)/2]
}

func seconds(d time.Duration) string { return fmt.Sprintf("%.3f s", d.Seconds()) }

func ratio(a, b time.Duration) float64 { return a.Seconds() / b.Seconds() }
