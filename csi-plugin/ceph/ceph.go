// Package ceph keeps file volumes of class gfs on CephFS, where many hosts have them at once. It imports volume, mount, tree and spec.
//
// A pool is a subvolume group of a file system, which belongs to this package alone; each volume is a subvolume of it with a namespace of its own in the data
// pool. What Ceph does not know of a volume, and of its snapshots, is in the subvolume's metadata. The program ceph is what is called.
//
// Whoever has a volume mounted, a host or a guest, has a key for that alone, which reads and writes the volume's files and objects and nothing else. The key is
// made when the volume is attached, and ends with that.
package ceph
