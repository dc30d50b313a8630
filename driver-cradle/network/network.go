// Package network connects a pod's machine with the network: with the interface that a container runtime or CNI has prepared in a
// network namespace, and with the host's resolvers.
//
// Take moves traffic, not addresses: what arrives at the namespace's interface is handed to a tap that belongs to the machine, and what the
// machine sends leaves by the interface. The guest has the interface's addresses and its MAC, so that from outside the namespace looks
// as if the containers were in it.
//
// Other processes in the namespace (a service mesh's proxy, a task of another driver) share the addresses with the guest. BPF programs at the interfaces
// give them what their sockets are for, and take what they send to a port of the namespace's own addresses that none of them listens on to the guest: so from
// inside the namespace, too, it looks as if the containers were in it. The programs know the namespace's sockets and nothing else: they
// need no process, and go when the interfaces are disconnected.
//
// network imports spec and wire, and never Nomad.
package network
