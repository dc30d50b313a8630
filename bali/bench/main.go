// Command bench measures bali against the plain tools and prints the ratios
// that docs/bali.md promises:
//
//	sudo go run ./bali/bench [-n 5] [-o json]
//
// It takes root, tar, gzip, sha512sum, sha256sum, busybox and a minute. The
// image is a copy of the Go installation, about 100 MB as a file. Competitors
// take turns and the fastest run of each counts, so that another process on the
// machine disturbs both alike.
package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"time"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// duel is a promise: ours takes at most limit times as long as theirs.
type duel struct {
	Name         string  `json:"name"`
	Limit        float64 `json:"limit"`
	ours, theirs string
	before       string // run before each, untimed

	Ours   float64 `json:"oursSeconds"`
	Theirs float64 `json:"theirsSeconds"`
	Ratio  float64 `json:"ratio"`
	Kept   bool    `json:"kept"`
}

func run() error {
	n := flag.Int("n", 5, "runs of each")
	format := flag.String("o", "text", "text or json")
	flag.Parse()
	if os.Geteuid() != 0 {
		return errors.New("bali run takes root")
	}
	dir, err := os.MkdirTemp("", "bali-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	b := &bench{dir: dir}
	if err := b.prepare(); err != nil {
		return err
	}
	duels := []*duel{
		{
			Name: "run to execve / tar xzf into tmpfs and exec", Limit: 1.15,
			ours:   "bali run app.tar.gz -- true",
			theirs: "unshare -m sh -euc 'mount -t tmpfs t mnt; tar xzf app.tar.gz -C mnt; exec chroot mnt /busybox true'",
		},
		{
			Name: "run from the cache / sha256sum of what is cached", Limit: 1.2,
			ours:   "bali run --cache cache app.tar.gz -- true",
			theirs: "find cache/v1/*/tree -type f -print0 | xargs -0 sha256sum >/dev/null",
		},
		{
			Name: "verify / sha512sum", Limit: 1.2,
			ours: "bali verify app.tar.gz", theirs: "sha512sum app.tar.gz",
		},
		{
			Name: "build / tar and gzip", Limit: 1.1, before: "rm -f out.tar.gz",
			ours:   "bali build out.tar.gz --from ./app",
			theirs: "tar c --sort=name -C app . | gzip >out.tar.gz",
		},
	}
	for range *n {
		for _, d := range duels {
			for _, side := range []struct {
				script string
				best   *float64
			}{{d.ours, &d.Ours}, {d.theirs, &d.Theirs}} {
				if _, err := b.sh(d.before); err != nil {
					return err
				}
				t, err := b.sh(side.script)
				if err != nil {
					return err
				}
				if *side.best == 0 || t < *side.best {
					*side.best = t
				}
			}
		}
	}
	for _, d := range duels {
		d.Ratio = d.Ours / d.Theirs
		d.Kept = d.Ratio <= d.Limit
	}
	if *format == "json" {
		e := json.NewEncoder(os.Stdout)
		e.SetIndent("", "  ")
		return e.Encode(duels)
	}
	fmt.Printf("image: %d files, %.0f MB unpacked, %.0f MB as tar.gz; %d processors, best of %d\n\n", b.files, b.unpacked/1e6, b.packed/1e6, runtime.NumCPU(), *n)
	fmt.Printf("%-52s %8s %8s %6s %6s\n", "", "bali", "other", "ratio", "limit")
	kept := true
	for _, d := range duels {
		mark := ""
		if !d.Kept {
			mark, kept = "  MISSED", false
		}
		fmt.Printf("%-52s %7.3fs %7.3fs %6.2f %6.2f%s\n", d.Name, d.Ours, d.Theirs, d.Ratio, d.Limit, mark)
	}
	if !kept {
		return errors.New("a limit was missed")
	}
	return nil
}

type bench struct {
	dir              string
	files            int
	unpacked, packed float64
}

func (b *bench) prepare() error {
	out, err := exec.Command("go", "build", "-o", filepath.Join(b.dir, "bali"), "github.com/cradlestack/cradlestack/bali").CombinedOutput()
	if err != nil {
		return fmt.Errorf("go build: %w: %s", err, out)
	}
	goroot, err := exec.Command("go", "env", "GOROOT").Output()
	if err != nil {
		return err
	}
	_, err = b.sh(fmt.Sprintf(`mkdir app mnt
cp -a %[1]s/bin %[1]s/src %[1]s/pkg app/
cp /bin/busybox app/busybox
bali id >/dev/null 2>&1
bali trust add "$(bali id)"
bali build -q app.tar.gz --from ./app --entrypoint /busybox
bali run --cache cache app.tar.gz -- true`, bytes.TrimSpace(goroot)))
	if err != nil {
		return err
	}
	err = filepath.WalkDir(filepath.Join(b.dir, "app"), func(_ string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		fi, err := d.Info()
		if err != nil {
			return err
		}
		b.files++
		b.unpacked += float64(fi.Size())
		return nil
	})
	if err != nil {
		return err
	}
	fi, err := os.Stat(filepath.Join(b.dir, "app.tar.gz"))
	if err != nil {
		return err
	}
	b.packed = float64(fi.Size())
	return nil
}

// sh runs a script in the folder and gives the seconds it took.
func (b *bench) sh(script string) (float64, error) {
	cmd := exec.Command("sh", "-euc", script)
	cmd.Dir = b.dir
	cmd.Env = append(os.Environ(), "PATH="+b.dir+":"+os.Getenv("PATH"), "BALI_KEY="+b.dir+"/key", "BALI_TRUST="+b.dir+"/trust")
	start := time.Now()
	out, err := cmd.CombinedOutput()
	if err != nil {
		return 0, fmt.Errorf("%s: %w: %s", script, err, out)
	}
	return time.Since(start).Seconds(), nil
}
