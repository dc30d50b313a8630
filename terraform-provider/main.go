// Command terraform-provider-cradle is started by Terraform, to which it offers pods, volumes and snapshots of a Nomad cluster as resources.
package main

import (
	"flag"
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"slices"
	"strings"

	"github.com/hashicorp/terraform-plugin-go/tfprotov6/tf6server"

	"github.com/cradlestack/cradlestack/terraform-provider/provider"
)

// version is set by the linker.
var version = "development"

func main() {
	os.Exit(run(os.Args[1:], os.Stdout, os.Stderr))
}

// run serves Terraform until that is done, and returns the exit code.
func run(args []string, stdout, stderr io.Writer) int {
	flags := flag.NewFlagSet("terraform-provider-cradle", flag.ContinueOnError)
	flags.SetOutput(stderr)
	debugged := flags.Bool("debug", false, "serve by itself, and print how Terraform reaches it")
	if err := flags.Parse(args); err != nil {
		return 2
	}
	if flags.Arg(0) == "version" {
		fmt.Fprintf(stdout, "terraform-provider-cradle %s\n", version)
		return 0
	}
	quicken()
	var opts []tf6server.ServeOpt
	if *debugged {
		opts = append(opts, tf6server.WithManagedDebug())
	}
	if err := tf6server.Serve(provider.Address, provider.Server(version), opts...); err != nil {
		fmt.Fprintf(stderr, "terraform-provider-cradle: %v\n", err)
		return 1
	}
	return 0
}

// quicken leaves out what is half of a plan's processor time. What the SDK logs is made and sent for each attribute, and Terraform throws it away unless it was told
// to log. And the provider is short-lived, so that memory is rather used than looked through.
func quicken() {
	if !slices.ContainsFunc(os.Environ(), func(e string) bool { return strings.HasPrefix(e, "TF_LOG") }) {
		_ = os.Setenv("TF_LOG_SDK", "off")
	}
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(400)
	}
}
