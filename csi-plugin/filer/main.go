// Command cradle-filer serves file volumes to pods and hosts over NFS.
package main

import "github.com/cradlestack/cradlestack/internal/command"

func main() { command.Main(run) }
