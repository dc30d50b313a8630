// Package docker compares kcradle with docker: the same images, flags and commands on Debian's dockerd and in a microVM, each as one
// case whose output, exit code and inspected state must be the same, except for what docs/docker-differences.md lists with its reason.
package docker
