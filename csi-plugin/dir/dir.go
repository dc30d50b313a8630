// Package dir keeps volumes of all classes in directories of the host's file system: the backend for one machine, with neither
// ZFS nor Ceph. It imports volume, mount and spec.
//
// A pool is a directory. In it each volume has a folder of its own name:
//
//	NAME/volume.json            what the volume is
//	NAME/image                  its content: a sparse image (block volumes, and file volumes that have a quota)
//	NAME/data/                  or a directory (file volumes without one)
//	NAME/snapshots/SNAPSHOT/    the same three of each snapshot
//
// A folder is made under a name that begins with a dot and renamed when it is whole; one that goes is renamed back first. So
// what has such a name is rubbish, which whoever next has that volume's lock removes.
package dir
