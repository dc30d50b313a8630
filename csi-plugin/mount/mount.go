// Package mount is what csi-plugin does to this host's mount table and block devices: mounts and bind mounts, loop devices over
// images, file systems made and grown. Whatever it does can be repeated, and what it finds out it reads from the kernel, so
// that nothing has to be remembered. It imports only spec.
package mount
