// Package nfs serves directories over NFS version 3 (RFC 1813) to Linux clients. An Engine does it: Server is the embedded one, in this
// process; another is in filer/ganesha. It knows exports, not volumes, and imports the lease and the snapshots alone.
//
// Whoever can send packets is hostile until it has named an export's path, which holds a secret. Every length is bounded before
// memory is taken for it; file handles are authenticated; no path is ever resolved, only one name in one directory at a time, and no symbolic link is
// followed. What is answered as done is on stable storage.
package nfs

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/cradlestack/cradlestack/csi-plugin/filer/snapshots"
)

// An Engine serves exports.
type Engine interface {
	// Export begins to serve an export, or changes the one of the same path.
	Export(e Export) error

	// Unexport ends what is served at path: from its return on no call changes anything there. One that is not there is no error.
	Unexport(path string) error

	// Hold calls do while no call is at work in a volume's exports: clients ask again, by themselves, until it is done. What ends by lease.ErrEnded is not: another
	// process will do it, and none of their calls is done here any more. Where the storage keeps calls for longer than Patience it is ErrStuck, and do is not called.
	Hold(volume string, do func() error) error

	// Close ends all exports. Nothing of them is open from its return on.
	Close() error
}

// Patience is how long Hold waits for calls that have begun: as slow storage may need to have it all on disk.
const Patience = time.Minute

// An Export is a directory as some clients may see it.
type Export struct {
	Path     string         // that clients mount: /NAME/SECRET
	Root     string         // the directory, which is a mount of its own: nothing above it can be reached
	Volume   string         // clients that see the same volume by several exports can tell by the file system's id
	ReadOnly bool           // nothing is changed through it
	Clients  []netip.Prefix // whose calls are answered; others learn nothing
	Hidden   []string       // names in the root, of files that help to serve it otherwise: they are neither shown nor changed

	Snapshots *snapshots.Source // nil for none
}

// MaxPath is the length of the longest path that can be mounted (RFC 1813 §5.1.1, MNTPATHLEN).
const MaxPath = 1024

func (e Export) check() error {
	if !strings.HasPrefix(e.Path, "/") || len(e.Path) > MaxPath {
		return fmt.Errorf("export %.80q is no path of at most %d bytes", e.Path, MaxPath)
	}
	return nil
}

// admits says whether the export is for the client at an address.
func (e Export) admits(client netip.Addr) bool {
	return slices.ContainsFunc(e.Clients, func(p netip.Prefix) bool { return p.Contains(client) })
}
