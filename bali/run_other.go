//go:build !linux

package main

import (
	"errors"

	"github.com/spf13/cobra"
)

func (c *cli) run() *cobra.Command {
	return &cobra.Command{
		Use:                "run FILE|URL [-- CMD…]",
		Short:              "verify an image and become its service (Linux only)",
		DisableFlagParsing: true,
		RunE: func(*cobra.Command, []string) error {
			return &refusal{errors.New("images run on Linux: here bali builds, verifies, inspects and extracts them")}
		},
	}
}
