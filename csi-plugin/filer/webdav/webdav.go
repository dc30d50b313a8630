// Package webdav serves directories over WebDAV (RFC 4918) to those who have a grant for them. It knows directories, not volumes.
//
// The library golang.org/x/net/webdav lists and sets properties. What it refuses or does not keep is done here: locks of both kinds that outlast
// the process, the whole of the If header, stored properties, uploads that are there whole or not at all, and the reason why one is not.
//
// Whoever can send packets is hostile until it has shown a grant's secret, and then still is to everything but that grant's directory: names are
// resolved by os.Root, which follows no link out of it; a directory's FIFOs and devices are not opened; what is read of a request, and what a listing takes, is
// bounded. What is answered as done is on stable storage.
package webdav

import (
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"fmt"
	"strings"

	"github.com/cradlestack/cradlestack/csi-plugin/filer/gateway"
	"github.com/cradlestack/cradlestack/csi-plugin/filer/snapshots"
)

// A Grant lets whoever knows its secret use a directory.
type Grant struct {
	User     string
	Secret   string
	Volume   string // the first step of the URLs' paths, and the name of the file that keeps the locks
	Root     string // its directory
	ReadOnly bool
	UID, GID int    // whom belongs what is made
	Owner    string // whose the grant is, with others of his

	Snapshots *snapshots.Source // of the directory; nil for none
	Gate      *gateway.Gate     // that changes of the directory go through; nil for none
}

func (g Grant) check() error {
	switch {
	case g.User == "" || strings.Contains(g.User, ":"):
		return fmt.Errorf("grant: %.80q is no user of HTTP's basic authentication", g.User)
	case g.Secret == "":
		return errors.New("grant " + g.User + ": it has no secret")
	case g.Volume == "" || g.Volume[0] == '.' || strings.ContainsAny(g.Volume, "/\x00"):
		return fmt.Errorf("grant %s: %.80q is no name", g.User, g.Volume)
	}
	return nil
}

// knows says whether a secret is the grant's, in a time that does not tell how much of it is.
func (g Grant) knows(secret string) bool {
	mine, yours := sha256.Sum256([]byte(g.Secret)), sha256.Sum256([]byte(secret))
	return subtle.ConstantTimeCompare(mine[:], yours[:]) == 1
}

// temporary is the directory in a volume's root for uploads that are not whole and for what is being removed. It is there as long as there is something in it.
const temporary = ".cradle-webdav"

// Hidden are names in a volume's root of files that help to serve it, by this package and over S3, and of what ZFS has there besides: they are none of the volume's.
var Hidden = []string{temporary, ".sgwtmp", ".zfs"}
