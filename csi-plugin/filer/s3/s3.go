// Package s3 serves directories over S3 to those who have a grant for them: one bucket for each, with the directory's name. It knows directories, not
// volumes.
//
// The server itself is the program cradle-s3 (tools/versitygw/cradle-s3), one process for each grant that is in use, confined to that grant's directory. This
// package starts it when it is needed, again when it has died, ends it when nobody needs it, and forwards to it by the access key that a request names, whose
// signature that process alone can check.
package s3

import (
	"fmt"
	"net/http"
	"strings"

	"github.com/cradlestack/cradlestack/csi-plugin/filer/gateway"
	"github.com/cradlestack/cradlestack/csi-plugin/filer/snapshots"
)

// A Grant lets whoever knows its secret use a directory.
type Grant struct {
	Key      string // access key
	Secret   string
	Volume   string // the bucket
	Root     string // its directory
	ReadOnly bool
	UID, GID int    // whom belongs what is made
	Owner    string // whose the grant is, with others of his

	Snapshots *snapshots.Source // of the directory; nil for none
	Gate      *gateway.Gate     // that changes of the directory go through; nil for none
}

// CheckBucket says why a name can't be a bucket's, as clients have it (AWS, "General purpose bucket naming rules").
func CheckBucket(name string) error {
	ok := len(name) >= 3 && len(name) <= 63 && !strings.Contains(name, "..")
	for i := range len(name) {
		c := name[i]
		letter := c >= 'a' && c <= 'z' || c >= '0' && c <= '9'
		ok = ok && (letter || (c == '-' || c == '.') && i > 0 && i < len(name)-1)
	}
	if !ok {
		return fmt.Errorf("%.80q is no name of a bucket, which has 3 to 63 lower-case letters, digits, hyphens and dots", name)
	}
	return nil
}

// accessKey is the key whose secret has signed a request (AWS Signature Version 4: by a header, or in a presigned URL). "" is nobody's.
func accessKey(r *http.Request) string {
	credential := r.URL.Query().Get("X-Amz-Credential")
	if header := r.Header.Get("Authorization"); header != "" {
		rest, ok := strings.CutPrefix(header, "AWS4-HMAC-SHA256 ")
		if !ok {
			return ""
		}
		credential = ""
		for field := range strings.SplitSeq(rest, ",") {
			if value, ok := strings.CutPrefix(strings.TrimSpace(field), "Credential="); ok {
				credential = value
				break
			}
		}
	}
	key, _, ok := strings.Cut(credential, "/")
	if !ok {
		return ""
	}
	return key
}
