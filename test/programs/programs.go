// Package programs finds what the end-to-end tests, the demo and the benchmarks run: the built programs in bin/, the boot package, the example
// images. They use the product through its programs, as its users do, and import nothing of it.
package programs

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
)

// Root is the repository's root, found upwards from the working directory.
func Root() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for ; ; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "arch_test.go")); err == nil {
			return dir, nil
		}
		if dir == filepath.Dir(dir) {
			return "", errors.New("this is not inside the repository; run it there")
		}
	}
}

// Lab builds the machine with ZFS where that is not done, and returns the program that runs it.
func Lab() (string, error) {
	root, err := Root()
	if err != nil {
		return "", err
	}
	lab := filepath.Join(root, "tools/zfs/lab.sh")
	if out, err := exec.Command(lab, "build").CombinedOutput(); err != nil {
		return "", fmt.Errorf("%s build: %w\n%s", lab, err, out)
	}
	return lab, nil
}

// Path is the path of a built program.
func Path(name string) (string, error) {
	root, err := Root()
	if err != nil {
		return "", err
	}
	path := filepath.Join(root, "bin", name)
	if _, err := os.Stat(path); err != nil {
		return "", fmt.Errorf("%w; run make build", err)
	}
	return path, nil
}

// Boot is the boot package to use: $CRADLE_BOOT, else bin/boot/VARIANT.
func Boot(variant string) (string, error) {
	path := os.Getenv("CRADLE_BOOT")
	if path == "" {
		root, err := Root()
		if err != nil {
			return "", err
		}
		path = filepath.Join(root, "bin", "boot", variant)
	}
	if _, err := os.Stat(filepath.Join(path, "manifest.json")); err != nil {
		return "", fmt.Errorf("%w; run make boot", err)
	}
	return path, nil
}

// AnyBoot is the boot package of the own kernel or, where that is not built, of the distribution's.
func AnyBoot() (string, error) {
	path, err := Boot("default")
	if err != nil {
		if stock, serr := Boot("stock"); serr == nil {
			return stock, nil
		}
	}
	return path, err
}

// Image is the OCI layout of an example image.
func Image(name string) (string, error) {
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	dir := filepath.Join(cache, "cradlestack", "images", name)
	if _, err := os.Stat(filepath.Join(dir, "index.json")); err != nil {
		return "", fmt.Errorf("%w; run make images", err)
	}
	return dir, nil
}
