// Package network connects a pod's machine with the network: with the interface that a container runtime or CNI has prepared in a
// network namespace, and with the host's resolvers.
//
// Take moves traffic, not addresses: whatever arrives at the namespace's interface is handed to a tap that belongs to the machine, and what the
// machine sends leaves by the interface. The guest has the interface's addresses and its MAC, so that from outside the namespace looks
// as if the containers were in it; the namespace's own network stack hears nothing any more and answers nobody.
//
// network imports spec and wire, and never Nomad.
package network
