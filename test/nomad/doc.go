// Package nomad runs what examples/nomad shows on a cluster of real agents, by the real command line, and ends agents and machines at random moments.
package nomad
