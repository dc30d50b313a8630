// Package guest is the agent of a pod: PID 1 of the VM. It mounts the disks that the host attached, sets up the network, runs the
// pod's containers by their lifecycle and answers the control calls of package wire.
//
// Containers run on a small runtime of its own: the agent assembles a container's root file system below /run/cradle in its own mount
// namespace; then a copy of the agent's executable, the stage, enters the container's namespaces, finishes the view from inside (proc,
// dev, masks, limits, user) and becomes the container's command by execve.
//
// Whatever a container holds is hostile: files of an image are read bounded and after entering its root, paths are resolved inside it.
// An idle agent sleeps: nothing here ticks or polls.
//
// guest imports spec and wire: it is the initramfs, and may import neither Nomad nor a registry client. guest/vdocker, which imports
// this package, answers docker's API; guest/stdio keeps what containers print.
package guest
