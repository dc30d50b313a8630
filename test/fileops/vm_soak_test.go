//go:build vm && soak

package main

import "testing"

func TestVMSoakFileOperations(t *testing.T) { fileOperations(t, "-for", "3m") }
