// Command cradle-csi keeps volumes for Nomad jobs, or for whoever else speaks the Container Storage Interface.
package main

import "github.com/cradlestack/cradlestack/internal/command"

func main() { command.Main(run) }
