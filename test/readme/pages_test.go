package readme

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/cradlestack/cradlestack/test/programs"
)

// texts are the pages and examples that readers follow, by their paths below the root. What docs/decisions tells is as it was then.
func texts(t *testing.T, extensions ...string) map[string]string {
	t.Helper()
	root, err := programs.Root()
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]string{}
	err = filepath.WalkDir(root, func(path string, e fs.DirEntry, err error) error {
		switch {
		case errors.Is(err, fs.ErrNotExist): // what another test makes meanwhile
			return nil
		case err != nil:
			return err
		case e.IsDir() && (e.Name() == "bin" || path != root && strings.HasPrefix(e.Name(), ".")):
			return fs.SkipDir
		case e.IsDir() || !slices.Contains(extensions, filepath.Ext(path)):
			return nil
		}
		data, err := os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		name, _ := filepath.Rel(root, path)
		all[name] = string(data)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

var (
	fences   = regexp.MustCompile("(?ms)^ *```[^\n]*\n(.*?)^ *```")
	spans    = regexp.MustCompile("`([^`\n]+)`")
	comments = regexp.MustCompile(`(?m) {2,}# .*$`)
	links    = regexp.MustCompile(`\]\(([^)\s]+)\)`)
	headings = regexp.MustCompile(`(?m)^#+ +(.*)$`)
	ids      = regexp.MustCompile(`<a id="([^"]+)">`)
	marks    = regexp.MustCompile(`[^\pL\pN _-]`)
)

// anchors are the places of a page that a link can lead to, by GitHub's names of them.
func anchors(page string) map[string]bool {
	page = fences.ReplaceAllString(page, "")
	all := map[string]bool{}
	for _, h := range headings.FindAllStringSubmatch(page, -1) {
		text := regexp.MustCompile(`\[([^\]]*)\]\([^)]*\)`).ReplaceAllString(h[1], "$1")
		all[strings.ReplaceAll(marks.ReplaceAllString(strings.ToLower(strings.TrimSpace(text)), ""), " ", "-")] = true
	}
	for _, id := range ids.FindAllStringSubmatch(page, -1) {
		all[id[1]] = true
	}
	return all
}

// TestLinks: what a page refers to in the repository is there, the place in the other page as well; and each page of docs/ is referred to.
func TestLinks(t *testing.T) {
	root, err := programs.Root()
	if err != nil {
		t.Fatal(err)
	}
	pages, found, linked := texts(t, ".md"), 0, map[string]bool{}
	places := map[string]map[string]bool{}
	for name, text := range pages {
		places[name] = anchors(text)
	}
	for name, text := range pages {
		for _, link := range links.FindAllStringSubmatch(fences.ReplaceAllString(text, ""), -1) {
			if strings.Contains(link[1], ":") {
				continue // elsewhere
			}
			found++
			path, anchor, _ := strings.Cut(link[1], "#")
			to := name
			if path != "" {
				to = filepath.Join(filepath.Dir(name), path)
				linked[to] = linked[to] || name != "CHANGELOG.md"
			}
			if _, err := os.Stat(filepath.Join(root, to)); err != nil {
				t.Errorf("%s: %s leads nowhere: %v", name, link[1], err)
			} else if at, ok := places[to]; ok && anchor != "" && !at[anchor] {
				t.Errorf("%s: %s leads to no heading of %s", name, link[1], to)
			}
		}
	}
	for name := range pages {
		if strings.HasPrefix(name, "docs/") && !linked[name] {
			t.Errorf("no page leads to %s", name)
		}
	}
	if found < 100 {
		t.Errorf("%d links were found", found)
	}
}

// A command is one of a program's, as its reference page has it. A flag's value is what its argument is called, "" of one that takes none.
type command struct {
	subcommands map[string]bool
	flags       map[string]string
	defaults    map[string]string // of flags that have one which is no empty string
}

var (
	sections  = regexp.MustCompile(`(?m)^#+ `)
	defaulted = regexp.MustCompile(`(?m)--([\w-]+) .*\(default "?([^":)][^")]*)"?\)$`)
	flagged   = regexp.MustCompile(`(?m)^ +(?:-(\w), )?--([\w-]+)(?: (\S+(?: \S+)*))?(?: {3}|\n)`)
)

// reference reads docs/PROGRAM.md, which is written from the commands' own help: each command by its path, with the flags of those above it.
func reference(t *testing.T, pages map[string]string, program string) map[string]command {
	t.Helper()
	all := map[string]command{}
	for _, section := range sections.Split(pages["docs/"+program+".md"], -1)[1:] {
		path, text, _ := strings.Cut(section, "\n")
		c := command{map[string]bool{}, map[string]string{"help": "", "h": "", "version": ""}, map[string]string{}}
		if i := strings.LastIndex(path, " "); i >= 0 {
			above, ok := all[path[:i]]
			if !ok {
				t.Fatalf("docs/%s.md: %s is below nothing", program, path)
			}
			above.subcommands[path[i+1:]] = true
			for name, value := range above.flags {
				c.flags[name] = value
			}
		}
		for _, f := range flagged.FindAllStringSubmatch(text, -1) {
			c.flags[f[2]] = f[3]
			if f[1] != "" {
				c.flags[f[1]] = f[3]
			}
		}
		for _, f := range defaulted.FindAllStringSubmatch(text, -1) {
			c.defaults[f[1]] = f[2]
		}
		all[path] = c
	}
	if len(all) < 10 {
		t.Fatalf("docs/%s.md has %d commands", program, len(all))
	}
	return all
}

// programsOf are those whose reference is written from their help.
var programsOf = []string{"cradle-csi", "cradle-filer", "kcradle"}

// written says whether a page is one of those.
func written(page string) bool {
	return slices.ContainsFunc(programsOf, func(program string) bool { return page == "docs/"+program+".md" })
}

// TestCommands: each command line that a page or an example shows is one that the program takes, as far as names of commands and flags go.
func TestCommands(t *testing.T) {
	pages, examples := texts(t, ".md"), texts(t, ".hcl", ".sh", ".service", "")
	for name := range examples {
		if !strings.HasPrefix(name, "examples/") {
			delete(examples, name)
		}
	}
	seen := map[string]int{}
	for _, program := range programsOf {
		commands := reference(t, pages, program)
		line := regexp.MustCompile(`(?:^|[\s/"(` + "`" + `])` + program + ` +([^\n]*)`)
		check := func(name, code string, prose bool) {
			for _, m := range line.FindAllStringSubmatch(comments.ReplaceAllString(strings.ReplaceAll(code, "\\\n", " "), ""), -1) {
				if first, _, _ := strings.Cut(m[1], " "); prose && !commands[program].subcommands[first] {
					continue
				}
				seen[program]++
				if wrong := commandLine(commands, program, m[1]); wrong != "" {
					t.Errorf("%s: %s %s: %s", name, program, m[1], wrong)
				}
			}
		}
		for name, text := range pages {
			if name == "CHANGELOG.md" || strings.HasPrefix(name, "docs/decisions/") || written(name) {
				continue
			}
			for _, block := range fences.FindAllStringSubmatch(text, -1) {
				check(name, block[1], false)
			}
			for _, span := range spans.FindAllStringSubmatch(fences.ReplaceAllString(text, ""), -1) {
				check(name, span[1], false)
			}
		}
		args := regexp.MustCompile(`command += "[^"]*/` + program + `"\s+args += \[([^]]*)\]`)
		for name, text := range examples {
			for _, list := range args.FindAllStringSubmatch(text, -1) {
				check(name, program+" "+strings.NewReplacer(",", " ", "\n", " ", `"`, "").Replace(list[1]), false)
			}
			check(name, text, true)
		}
	}
	for _, program := range programsOf {
		if seen[program] < 10 {
			t.Errorf("%d command lines of %s were found", seen[program], program)
		}
	}
}

// TestFlags: each flag that the storage's pages name is one of the programs they are about, and has the default that their tables say.
func TestFlags(t *testing.T) {
	pages := texts(t, ".md")
	known := map[string]bool{}
	for _, program := range programsOf {
		for _, c := range reference(t, pages, program) {
			for name := range c.flags {
				known[name] = true
			}
		}
	}
	named := 0
	for _, page := range []string{"docs/csi.md", "docs/nfs.md", "docs/webdav.md", "docs/s3.md", "docs/cold-format.md", "docs/volumes.md"} {
		for _, span := range spans.FindAllStringSubmatch(fences.ReplaceAllString(pages[page], ""), -1) {
			name, ok := strings.CutPrefix(span[1], "--")
			if name = regexp.MustCompile(`^[\w-]*`).FindString(name); !ok || name == "" {
				continue
			}
			if named++; !known[name] {
				t.Errorf("%s: no command has the flag %s", page, span[1])
			}
		}
	}
	rows := 0
	for page, c := range map[string]command{
		"docs/csi.md": reference(t, pages, "cradle-csi")["cradle-csi monolith"], "docs/nfs.md": reference(t, pages, "cradle-filer")["cradle-filer serve"],
		"docs/webdav.md": reference(t, pages, "cradle-filer")["cradle-filer serve"], "docs/s3.md": reference(t, pages, "cradle-filer")["cradle-filer serve"],
	} {
		for _, row := range regexp.MustCompile("(?m)^\\| `--([\\w-]+)` \\| ([^|]*) \\|").FindAllStringSubmatch(pages[page], -1) {
			if want := c.defaults[row[1]]; want != "" && !strings.Contains(want, ": ") { // not prose
				if rows++; !strings.Contains(row[2], want) {
					t.Errorf("%s: --%s is %s by default, and the table says %q", page, row[1], want, row[2])
				}
			}
		}
	}
	if rows < 8 {
		t.Errorf("%d defaults were found", rows)
	}
	if named < 50 {
		t.Errorf("%d flags were found", named)
	}
}

// commandLine says what is wrong with one, "" where nothing is.
func commandLine(commands map[string]command, program, line string) string {
	path := program
	words := strings.Fields(strings.TrimRight(line, "`\"'"))
	for i := 0; i < len(words); i++ {
		word := strings.Trim(words[i], "`\"',")
		c := commands[path]
		name, value := strings.TrimLeft(word, "-"), false
		name, _, value = strings.Cut(name, "=")
		switch {
		case word == "|" || word == "#" || word == "&&" || word == "||" || word == "--" || word == ">" || strings.HasSuffix(words[i], ";") && !strings.HasPrefix(word, "-"):
			return ""
		case strings.HasPrefix(word, "-") && name != "":
			arg, ok := c.flags[name]
			if !ok {
				return path + " has no flag " + word
			}
			if arg != "" && !value {
				i++
			}
		case c.subcommands[word]:
			path += " " + word
		case len(c.subcommands) > 0 && regexp.MustCompile(`^[a-z][a-z-]*$`).MatchString(word):
			return path + " has no command " + word
		case len(c.subcommands) == 0 && path == program:
			return ""
		}
	}
	return ""
}

// TestMetrics: the metrics that pages tell of are those that the programs have, all of them.
func TestMetrics(t *testing.T) {
	code, told := map[string]bool{}, map[string]bool{}
	names := regexp.MustCompile(`cradle_(?:csi|filer)_[a-z_]+[a-z]`)
	for name, text := range texts(t, ".go") {
		if strings.HasPrefix(name, "csi-plugin/") && !strings.HasSuffix(name, "_test.go") {
			for _, m := range regexp.MustCompile(`"(`+names.String()+`)"`).FindAllStringSubmatch(text, -1) {
				code[m[1]] = true
			}
		}
	}
	for name, text := range texts(t, ".md", ".hcl", ".yml", ".yaml") {
		if strings.HasPrefix(name, "docs/decisions/") {
			continue
		}
		for _, m := range names.FindAllString(text, -1) {
			m = regexp.MustCompile(`_(bucket|count|sum)$`).ReplaceAllString(m, "")
			if told[m] = true; !code[m] {
				t.Errorf("%s: there is no metric %s", name, m)
			}
		}
	}
	for m := range code {
		if !told[m] {
			t.Errorf("no page tells of the metric %s", m)
		}
	}
	if len(code) < 20 {
		t.Errorf("%d metrics were found", len(code))
	}
}
