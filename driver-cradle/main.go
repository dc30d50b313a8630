// Command nomad-driver-cradle is Nomad's task driver for pods: put it into the client's plugin_dir.
package main

import (
	"github.com/hashicorp/nomad/plugins"

	"github.com/cradlestack/cradlestack/driver-cradle/driver"
	"github.com/cradlestack/cradlestack/driver-cradle/vmm"
)

func main() {
	vmm.Confine()
	plugins.Serve(driver.Serve)
}
