// Package nomad runs what examples/nomad shows on a cluster of real agents, by the real command line.
package nomad
