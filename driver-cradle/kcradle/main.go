// Command kcradle runs docker images in microVMs: it prepares pod directories, boots them, and becomes them.
package main

import (
	"os"

	"github.com/cradlestack/cradlestack/driver-cradle/vmm"
)

func main() {
	vmm.Confine()
	os.Exit(run(os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
}
