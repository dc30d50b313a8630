// Package zfs keeps volumes on ZFS: block volumes as zvols, file volumes as file systems with a quota. It imports volume, mount and spec.
//
// A pool is a dataset; each volume is a dataset right below it, of its own name. What ZFS does not know of a volume is in one user
// property of it, org.cradlestack:volume, so that everything travels with the pool, and with a send stream. The program zfs is what is
// called: each of its calls is done as a whole by the kernel, and repeated ones find out that they were.
package zfs
