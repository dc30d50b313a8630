//go:build vm && soak

package main

import "testing"

// TestTerraformKilled at length.
func TestSoakTerraformKilled(t *testing.T) { testKilled(t, 20) }
