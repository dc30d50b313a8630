package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"

	"github.com/cradlestack/cradlestack/test/programs"
)

// terraform applies examples/terraform/stack, applies it again with another image of the database, and destroys it.
func (d *demo) terraform(ctx context.Context) error {
	d.title("terraform: a web server and a database, each with a volume")
	if _, err := exec.LookPath("terraform"); err != nil {
		fmt.Fprintln(d.out, "    left out, as it is not installed: https://developer.hashicorp.com/terraform/install")
		return nil //nolint:nilerr // no package of the distribution has it
	}
	if err := d.provider(ctx); err != nil {
		return err
	}
	terraform := func(args ...string) []string { return append([]string{"terraform", "-chdir=site"}, args...) }
	apply := terraform("apply", "-auto-approve", "-no-color")
	for _, args := range [][]string{terraform("init", "-no-color"), apply} {
		if err := d.timed(ctx, args...); err != nil {
			return err
		}
	}
	const page = "curl --silent --show-error --fail --max-time 30 $(terraform -chdir=site output -raw page)"
	if err := d.until(ctx, "", "sh", "-c", page+" | grep -q microVM"); err != nil { // the pods are well; whoever writes the page may be a moment later, and it is empty before
		return err
	}
	if err := d.expect(ctx, "hello from a microVM", "sh", "-c", page); err != nil {
		return err
	}
	sql := func(statement string) []string {
		return []string{"nomad", "alloc", "exec", "-job", "shop-database", "mariadb", "-psecret", "--skip-column-names", "--batch", "shop", "-e", statement}
	}
	if _, err := d.command(ctx, sql("CREATE TABLE goods (name TEXT, amount INT); INSERT INTO goods VALUES ('volume', 42)")...); err != nil {
		return err
	}
	d.title("terraform: another image of the database, and its rows are there; then all goes")
	image, err := d.newer("mariadb")
	if err != nil {
		return err
	}
	if err := d.timed(ctx, append(apply, "-var", "database_image="+image)...); err != nil {
		return err
	}
	if err := d.until(ctx, "", sql("SELECT 'up'")...); err != nil {
		return err
	}
	if err := d.expect(ctx, "volume\t42", sql("SELECT * FROM goods")...); err != nil {
		return err
	}
	if err := d.timed(ctx, terraform("destroy", "-auto-approve", "-no-color", "-var", "database_image="+image)...); err != nil {
		return err
	}
	for _, left := range []string{"/v1/jobs?prefix=shop-", "/v1/volumes?type=csi&prefix=shop-"} {
		if err := d.expect(ctx, "[]", "nomad", "operator", "api", left); err != nil {
			return err
		}
	}
	return nil
}

// provider puts the built provider where terraform init finds it, and the example into the demo's directory.
func (d *demo) provider(ctx context.Context) error {
	root, err := programs.Root()
	if err != nil {
		return err
	}
	hcl, err := os.ReadFile(filepath.Join(root, "examples/terraform/stack/main.tf"))
	if err != nil {
		return err
	}
	images := ""
	for _, name := range []string{"nginx", "busybox", "mariadb"} {
		dir, err := programs.Image(name)
		if err != nil {
			return err
		}
		images = filepath.Dir(dir)
	}
	plugins, rc, site := filepath.Join(d.dir, "plugins"), filepath.Join(d.dir, "terraformrc"), filepath.Join(d.dir, "site")
	if _, err := d.quiet(ctx, "make", "-C", root, "-o", "build", "install-provider", "PROVIDERS="+plugins); err != nil {
		return err
	}
	return errors.Join(
		os.Mkdir(site, 0o700),
		os.WriteFile(filepath.Join(site, "main.tf"), hcl, 0o600),
		os.WriteFile(rc, fmt.Appendf(nil, "provider_installation {\n  filesystem_mirror {\n    path = %q\n  }\n}\n", plugins), 0o600),
		os.Setenv("TF_CLI_CONFIG_FILE", rc),
		os.Setenv("TF_VAR_images", "oci:"+images),
		os.Setenv("CHECKPOINT_DISABLE", "1"),
	)
}

// newer makes an image that differs from an example's in a label, as a newer one of a registry might, and is how a pod has it.
func (d *demo) newer(name string) (string, error) {
	dir, err := programs.Image(name)
	if err != nil {
		return "", err
	}
	image, err := programs.OnlyImage(dir)
	if err != nil {
		return "", err
	}
	config, err := image.ConfigFile()
	if err != nil {
		return "", err
	}
	changed := config.Config
	changed.Labels = map[string]string{"version": "newer"}
	var made v1.Image
	if made, err = mutate.Config(image, changed); err != nil {
		return "", err
	}
	path, err := layout.Write(filepath.Join(d.dir, name+"-newer"), empty.Index)
	if err != nil {
		return "", err
	}
	return "oci:" + strings.TrimSuffix(string(path), "/"), path.AppendImage(made)
}
