package main

import "github.com/spf13/cobra"

func (c *cli) service() []*cobra.Command { return nil }
