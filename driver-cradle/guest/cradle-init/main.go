// Command cradle-init is the one binary of the initramfs: PID 1 of a pod's VM, and what it starts containers with.
package main

import (
	"os"

	"github.com/cradlestack/cradlestack/driver-cradle/guest"
	"github.com/cradlestack/cradlestack/driver-cradle/guest/vdocker"
)

func main() { os.Exit(guest.Main(os.Args, vdocker.Handler)) }
