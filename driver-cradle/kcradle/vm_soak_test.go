//go:build vm && soak

package main

func init() { rounds = 100 }
