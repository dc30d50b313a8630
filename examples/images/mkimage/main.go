// Mkimage assembles OCI image layouts for the recipes beside it: from plain directories, from the upper directory of an
// overlay mount, and on top of another layout. It is a tool of build.sh; nothing of the product uses it.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

const usage = `usage: mkimage build -o DIR -config FILE [-base DIR] [-tag TAG] [-layer DIR]…
       mkimage save -o FILE -name NAME:TAG DIR
       mkimage layers DIR`

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stdout, os.Stderr); err != nil {
		fmt.Fprintf(os.Stderr, "mkimage: %v\n", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	if len(args) == 0 {
		return errors.New(usage)
	}
	switch args[0] {
	case "build":
		return build(ctx, args[1:], stderr)
	case "save":
		return save(args[1:], stderr)
	case "layers":
		return layers(args[1:], stdout)
	}
	return errors.New(usage)
}

// build writes a new layout: the base's layers, then one layer for each -layer directory.
func build(ctx context.Context, args []string, stderr io.Writer) error {
	fs := flag.NewFlagSet("build", flag.ContinueOnError)
	fs.SetOutput(stderr)
	out := fs.String("o", "", "the layout `directory` to create")
	configFile := fs.String("config", "", "`file` with the image's config object: Entrypoint, Cmd, Env, …")
	base := fs.String("base", "", "layout `directory` to build upon")
	tag := fs.String("tag", "latest", "`tag` of the image in the layout")
	var dirs []string
	fs.Func("layer", "`directory` to add as a layer (repeatable)", func(s string) error {
		dirs = append(dirs, s)
		return nil
	})
	if err := fs.Parse(args); err != nil {
		return err
	}
	if *out == "" || *configFile == "" || fs.NArg() != 0 {
		return errors.New(usage)
	}
	created, err := sourceDate()
	if err != nil {
		return err
	}

	img := v1.Image(empty.Image)
	if *base != "" {
		if img, err = open(*base); err != nil {
			return err
		}
	}
	work, err := os.MkdirTemp(filepath.Dir(filepath.Clean(*out)), ".layers-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)
	for i, dir := range dirs {
		file := filepath.Join(work, strconv.Itoa(i)+".tar.gz")
		if err := writeLayer(ctx, dir, file, created); err != nil {
			return fmt.Errorf("layer of %s: %w", dir, err)
		}
		l, err := tarball.LayerFromFile(file, tarball.WithMediaType(types.OCILayer))
		if err != nil {
			return fmt.Errorf("layer of %s: %w", dir, err)
		}
		img, err = mutate.Append(img, mutate.Addendum{
			Layer:     l,
			MediaType: types.OCILayer,
			History: v1.History{
				Created:   v1.Time{Time: created},
				CreatedBy: "mkimage " + filepath.Base(dir),
			},
		})
		if err != nil {
			return fmt.Errorf("layer of %s: %w", dir, err)
		}
	}

	cf, err := img.ConfigFile()
	if err != nil {
		return err
	}
	cf = cf.DeepCopy()
	cf.Created = v1.Time{Time: created}
	cf.OS, cf.Architecture = "linux", runtime.GOARCH
	if cf.Config, err = readConfig(*configFile, cf.Config); err != nil {
		return err
	}
	if img, err = mutate.ConfigFile(img, cf); err != nil {
		return err
	}
	img = mutate.ConfigMediaType(mutate.MediaType(img, types.OCIManifestSchema1), types.OCIConfigJSON)

	l, err := layout.Write(*out, empty.Index)
	if err != nil {
		return err
	}
	return l.AppendImage(img, layout.WithAnnotations(map[string]string{
		"org.opencontainers.image.ref.name": *tag,
	}))
}

// readConfig lays a recipe's config over the base's: as in a Dockerfile only the environment is inherited name by name,
// and a new entrypoint drops the base's command.
func readConfig(file string, base v1.Config) (v1.Config, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return base, err
	}
	var c v1.Config
	dec := json.NewDecoder(strings.NewReader(string(data)))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&c); err != nil {
		return base, fmt.Errorf("%s: %w", file, err)
	}
	own := make(map[string]bool, len(c.Env))
	for _, e := range c.Env {
		k, _, _ := strings.Cut(e, "=")
		own[k] = true
	}
	var env []string
	for _, e := range base.Env {
		if k, _, _ := strings.Cut(e, "="); !own[k] {
			env = append(env, e)
		}
	}
	c.Env = append(env, c.Env...)
	return c, nil
}

// save writes a layout's image as `docker save` would, for `docker load`.
func save(args []string, stderr io.Writer) error {
	fs := flag.NewFlagSet("save", flag.ContinueOnError)
	fs.SetOutput(stderr)
	out := fs.String("o", "", "archive `file` to write")
	ref := fs.String("name", "", "`name:tag` of the image in the archive")
	if err := fs.Parse(args); err != nil {
		return err
	}
	if *out == "" || fs.NArg() != 1 {
		return errors.New(usage)
	}
	tag, err := name.NewTag(*ref)
	if err != nil {
		return err
	}
	img, err := open(fs.Arg(0))
	if err != nil {
		return err
	}
	return tarball.WriteToFile(*out, tag, img)
}

// layers prints the paths of an image's layer blobs, lowest first.
func layers(args []string, stdout io.Writer) error {
	if len(args) != 1 {
		return errors.New(usage)
	}
	img, err := open(args[0])
	if err != nil {
		return err
	}
	m, err := img.Manifest()
	if err != nil {
		return err
	}
	for _, l := range m.Layers {
		fmt.Fprintln(stdout, filepath.Join(args[0], "blobs", l.Digest.Algorithm, l.Digest.Hex))
	}
	return nil
}

// open returns the only image of a layout.
func open(dir string) (v1.Image, error) {
	idx, err := layout.ImageIndexFromPath(dir)
	if err != nil {
		return nil, fmt.Errorf("open image %s: %w", dir, err)
	}
	m, err := idx.IndexManifest()
	if err != nil {
		return nil, fmt.Errorf("open image %s: %w", dir, err)
	}
	if len(m.Manifests) != 1 {
		return nil, fmt.Errorf("open image %s: %d images in the layout, want 1", dir, len(m.Manifests))
	}
	return idx.Image(m.Manifests[0].Digest)
}

// sourceDate is the newest time that an image shows (reproducible-builds.org/specs/source-date-epoch).
func sourceDate() (time.Time, error) {
	s := os.Getenv("SOURCE_DATE_EPOCH")
	if s == "" {
		return time.Now().UTC().Truncate(time.Second), nil
	}
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil {
		return time.Time{}, fmt.Errorf("SOURCE_DATE_EPOCH: %w", err)
	}
	return time.Unix(n, 0).UTC(), nil
}
