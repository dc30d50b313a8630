// Package tree tells in what two directories, on different hosts or not, differ, and makes one like the other: names, content, holes, owners, modes,
// times, extended attributes, hard links, special files. What it says of a directory it has read from its files, so that two that are
// the same to it are the same. It imports nothing of ours.
package tree

import "time"

// An Entry is all that there is to a name but its content.
type Entry struct {
	Path       string // below the directory, "." is the directory itself
	Mode       uint32 // of stat(2), with the kind of file
	UID, GID   uint32
	Device     uint64    // of a device node
	Modified   time.Time // of what is no directory: those change as they are filled
	Target     string    // of a symbolic link
	Name       string    // another path of the same file, one that comes earlier; nothing else is set then
	Attributes map[string]string
	Size       int64
	Chunks     map[int64][32]byte // of a file: the SHA-256 of each chunk, by number, but for holes and those that are all zeros: a file may be nothing else
}

// A Difference is one path's.
type Difference struct {
	What string `json:"what"`
	Path string `json:"path"`
}

// What has become of a path.
const (
	Added   = "added"
	Changed = "changed"
	Removed = "removed"
)

// chunk is what content is compared and sent in.
const chunk = 1 << 20

// A message is a step from one directory to the other.
type message struct {
	Remove string // a path, with all below
	Entry  *Entry // make this, or make it so; of a file, the content comes next
	At     int64  // of the file that was named last
	Data   []byte
	End    bool // it is as it should be
}

// Changes are what it took.
type Changes struct {
	Entries int   // made, changed or removed
	Bytes   int64 // of content that were sent
}
