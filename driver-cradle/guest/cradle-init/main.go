// Command cradle-init is the one binary of the initramfs: PID 1 of a pod's VM, and what it starts containers with.
package main

import (
	"net/http"
	"os"

	"github.com/cradlestack/cradlestack/driver-cradle/guest"
)

func main() {
	os.Exit(guest.Main(os.Args, func(*guest.Pod) http.Handler { return http.NotFoundHandler() }))
}
