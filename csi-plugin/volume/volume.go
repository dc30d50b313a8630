// Package volume is the model of stored data that all of csi-plugin shares: a Volume has a class, a size and parameters, a
// Backend keeps volumes, and what more a backend can do is an upgrade interface. It knows neither CSI nor Nomad, and it
// imports only spec. volume/volumetest holds what every backend has to pass.
package volume

import (
	"context"
	"fmt"
	"io"
	"os"
	"path"
	"strings"
	"time"

	"github.com/cradlestack/cradlestack/spec"
)

// A Backend keeps volumes.
//
// Its methods may be called at the same time by several goroutines and several processes. Each is idempotent: called again
// after it was interrupted at any point, it completes what it began or removes it. State is what the storage itself says;
// a backend has no other. Errors wrap this package's sentinels where one fits.
type Backend interface {
	// Create makes an empty volume, or finds the one that is there already. ErrExists is one of that name that does not fit the
	// request.
	Create(ctx context.Context, r Request) (Volume, error)

	// Delete removes a volume and its automatic snapshots; one that is not there is no error. ErrInUse is one that is staged,
	// or that has snapshots which somebody took.
	Delete(ctx context.Context, id string) error

	// Get returns ErrNotFound where there is no such volume.
	Get(ctx context.Context, id string) (Volume, error)

	// List returns all volumes by id; with an ErrUnavailable, those of the pools that are there.
	List(ctx context.Context) ([]Volume, error)

	// Stage makes a volume's content reachable on this host. Repeated with the same use, it returns the same source.
	Stage(ctx context.Context, id string, use Use) (Source, error)

	// Unstage releases what Stage took, as far as nothing on this host uses it any more. A volume that is not there, or not
	// staged, is no error.
	Unstage(ctx context.Context, id string) error

	// Capacity returns how many bytes a new volume with these parameters can have.
	Capacity(ctx context.Context, p Parameters) (int64, error)

	// Pools are the names that the parameter pool can have, the default's first.
	Pools() []string

	// Ready says why nothing can be kept at the moment, nil where it can.
	Ready(ctx context.Context) error
}

// A Snapshotter keeps read-only states of volumes.
type Snapshotter interface {
	// Snapshot records the volume's present state, or finds the snapshot of that name. ErrExists is one that another volume has,
	// ErrInUse a volume that is written to and can't be copied meanwhile.
	Snapshot(ctx context.Context, r SnapshotRequest) (Snapshot, error)

	// DeleteSnapshot removes a snapshot; one that is not there is no error.
	DeleteSnapshot(ctx context.Context, id SnapshotID) error

	// Snapshots returns those of one volume, or all where id is "", by id. A volume that is not there has none.
	Snapshots(ctx context.Context, id string) ([]Snapshot, error)
}

// A SnapshotRequest is a snapshot that is to exist.
type SnapshotRequest struct {
	ID        SnapshotID
	Automatic bool // by schedule: it goes with its volume, and its name may be another volume's snapshot's as well
	Hold      Hold
}

// Check is an ErrInvalid where a snapshot can't be called so. A name of the schedule's is not for others: with it taken, the snapshot of that hour would be missing, and
// whoever found that one in its place would see it go with the schedule.
func (r SnapshotRequest) Check() error {
	err := CheckName("snapshot name", r.ID.Name)
	if err == nil && !r.Automatic && ofSchedule(r.ID.Name) {
		err = Invalid("snapshot name", "%s is what a snapshot is called that is taken by schedule; choose another name", r.ID.Name)
	}
	return err
}

// A Hold makes what writes to a volume from outside this host's kernel, a guest, hold still until release is called. It is called only
// for the time of copying. An error of release says that it had not held still all the time. Without a guest it is nil.
type Hold func(ctx context.Context) (release func() error, err error)

// A Browser shows what is in snapshots of file volumes.
type Browser interface {
	// Browse opens the root directory of a snapshot's files. Nothing can be changed through it. The snapshot can be deleted meanwhile: what is opened
	// shows the same until it is closed, or nothing any more. ErrNotFound is a snapshot that is not there, or that was taken before anything was written.
	Browse(ctx context.Context, id SnapshotID) (*os.Root, error)

	// BrowseAt mounts them at a path likewise, until they are unmounted there.
	BrowseAt(ctx context.Context, id SnapshotID, path string) error
}

// A Cloner makes volumes of others.
type Cloner interface {
	// Clone is Create for a request with an origin: the volume's first content is that of a snapshot or of another volume, which
	// has the same class. ErrNotFound is an origin that is not there. hold is the other volume's.
	Clone(ctx context.Context, r Request, hold Hold) (Volume, error)
}

// A Noter keeps a line of text with its pools, for who copies their volumes: what it has to know after its next start.
type Noter interface {
	// Note is the line, "" where there is none yet. ErrUnavailable is a pool that is missing and may have it.
	Note(ctx context.Context) (string, error)

	// SetNote replaces it.
	SetNote(ctx context.Context, line string) error
}

// An Attacher has file volumes that guests mount from the storage itself, with attach=direct.
type Attacher interface {
	// Attach returns what the guest at the target mounts, with a secret of its own. Repeated, it returns the same.
	Attach(ctx context.Context, id, target string, readOnly bool) (spec.Volume, error)

	// Detach makes the secret worthless: a guest that is still there writes nothing any more. A volume that is not there, or not attached, is no error.
	Detach(ctx context.Context, id, target string) error
}

// An Expander makes volumes larger, also while they are in use.
type Expander interface {
	// Expand gives the volume at least size bytes and at most limit (0 is no limit), and returns how many it has. It never
	// shrinks one: a volume that is large enough already is left as it is.
	Expand(ctx context.Context, id string, size, limit int64) (int64, error)
}

// A FilesStager stages many volumes faster than one by one.
type FilesStager interface {
	// StageFiles says where those of these volumes are, each of which has been staged for files before, that need nothing but to be mounted. One that can't be mounted is to
	// be staged by itself, which says why.
	StageFiles(ctx context.Context, ids []string) (map[string]Source, error)
}

// A Stager knows by itself what is staged on this host, where Get has to ask somebody who may be away: a volume can be unpublished then, too.
type Stager interface {
	Staged(id string) (bool, error)
}

// A Scheduler keeps with a volume what of its automatic snapshots is kept.
type Scheduler interface {
	// Reschedule puts a schedule in the place of the parameter snapshots, as Volume.Schedule has it.
	Reschedule(ctx context.Context, id, schedule string) error
}

// A Sender opens snapshots of block volumes to be copied elsewhere.
type Sender interface {
	// Open opens a snapshot's blocks. Where it can, it tells them apart from those of since, an earlier snapshot of the same volume; the zero
	// value is none. ErrNotFound is a snapshot that is not there. Who deletes the volume waits for nobody that reads it: reading ends with an ErrDeleted then.
	Open(ctx context.Context, id, since SnapshotID) (*Blocks, error)
}

// Blocks are a snapshot's. They stay as they are until they are closed.
type Blocks struct {
	io.ReaderAt
	io.Closer
	Size  int64
	Data  []Range // outside of which all is zeros, or as in the earlier snapshot; sorted
	Whole bool    // zeros: nothing is known of an earlier snapshot
}

// A Range of bytes.
type Range struct{ Start, End int64 }

// A Receiver makes volumes of blocks that come from elsewhere.
type Receiver interface {
	// Receive is Create for a block volume with an origin in cold storage, whose first content, of r.Size bytes that content has written, fill
	// writes. The disk holds zeros, or what an interrupted call for the same origin has written. There is no volume before fill has
	// succeeded. Of a volume that is there already fill is not called.
	Receive(ctx context.Context, r Request, content Content, fill func(ctx context.Context, disk *os.File) error) (Volume, error)
}

// A Repairer knows what a crash can leave on its storage and on this host.
type Repairer interface {
	// Repair ends what a killed process has left: each thing is reported, and removed unless it is only looked for. What is in
	// use, or being worked on by another process, is left alone.
	Repair(ctx context.Context, look bool, report func(found string)) error
}

// A Request is a volume that is to exist.
type Request struct {
	Name       string
	Size       int64 // bytes at least; 0 leaves it to the backend
	Limit      int64 // bytes at most; 0 is no limit
	Origin     Origin
	Generation int
	After      time.Time // the volume is one that was made later than that, whatever the clock says
	Parameters
}

// Born is when the volume of a request is made, which is now.
func (r Request) Born() time.Time {
	now := time.Now().UTC()
	if !now.After(r.After) {
		return r.After.UTC().Add(1)
	}
	return now
}

// An Origin is where a volume's first content comes from. At most one of its fields is set.
type Origin struct {
	Volume   string     `json:"volume,omitempty"`
	Snapshot SnapshotID `json:"snapshot,omitzero"`
	Copy     string     `json:"copy,omitempty"` // in cold storage
}

// A Volume as it is.
type Volume struct {
	ID      string    `json:"id"`
	Size    int64     `json:"size,omitempty"` // bytes; 0 is a file volume without a quota
	Origin  Origin    `json:"origin,omitzero"`
	Created time.Time `json:"created"`
	Content Content   `json:"content,omitempty"`

	// Generation tells apart the volumes of one name that several hosts have: one that was restored elsewhere has the next of the lost one's.
	Generation int `json:"generation,omitempty"`

	// Used says of a volume that was restored from cold storage that it was staged since.
	Used bool

	// Schedule is what somebody has put in place of the parameter snapshots, as ParseRetention reads it; "" is the parameter's.
	Schedule string `json:"schedule,omitempty"`
	Parameters
}

// Content says who has written a volume's file system, and so whether the host's kernel may mount it.
type Content string

// What is on a volume.
const (
	Blank   Content = ""        // nothing yet
	Trusted Content = "trusted" // made and only ever mounted by this software's hosts
	Guest   Content = "guest"   // a machine or task has had it as a block device: never mounted or checked by a host's kernel
)

// A SnapshotID names a snapshot: VOLUME@NAME.
type SnapshotID struct{ Volume, Name string }

// String is VOLUME@NAME, "" for none.
func (s SnapshotID) String() string {
	if s == (SnapshotID{}) {
		return ""
	}
	return s.Volume + "@" + s.Name
}

// MarshalText is String.
func (s SnapshotID) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText is ParseSnapshotID.
func (s *SnapshotID) UnmarshalText(text []byte) (err error) {
	*s, err = ParseSnapshotID(string(text))
	return err
}

// ParseSnapshotID reads VOLUME@NAME. The error is ErrNotFound: no such snapshot can exist.
func ParseSnapshotID(s string) (SnapshotID, error) {
	id, name, ok := strings.Cut(s, "@")
	if !ok || !ValidName(id) || !ValidName(name) {
		return SnapshotID{}, fmt.Errorf("%w: %q is no snapshot; write VOLUME@NAME", ErrNotFound, abbreviate(s))
	}
	return SnapshotID{id, name}, nil
}

// A Snapshot is a volume's state at one time.
type Snapshot struct {
	ID      SnapshotID `json:"id"`
	Size    int64      `json:"size,omitempty"` // bytes that a volume made of it has at least
	Created time.Time  `json:"created"`
	// Copied says that the storage could not share the data with the volume and that all of it was written a second time.
	Copied    bool `json:"copied,omitempty"`
	Automatic bool `json:"automatic,omitempty"` // SnapshotRequest.Automatic
}

// A Use is what a volume is staged for.
type Use struct {
	As       As
	ReadOnly bool // AsRaw only: the device refuses writes
}

// As says who reads a volume's blocks.
type As int

// What a volume is staged as.
const (
	AsFiles As = iota // mounted by this host: Source.Device with a file system, or Source.Directory
	AsRaw             // given to a task as a block device of this host: Source.Device
	AsGuest           // given to a guest, which attaches it itself: Source.Guest
)

// A Source is where a staged volume's content is.
type Source struct {
	Device    string // block device of this host
	Directory string
	FSType    string // of the file system on Device; "" where it was staged raw
	Guest     spec.Volume
}

// ValidName says whether a volume or snapshot can be called so: letters, digits, _ . and -, a letter or digit first, at most
// 128. Every backend can use such a name in a path.
func ValidName(name string) bool {
	ok := name != "" && len(name) <= MaxName && alphanumeric(name[0])
	for i := range len(name) {
		ok = ok && (alphanumeric(name[i]) || strings.IndexByte("_.-", name[i]) >= 0)
	}
	return ok
}

// SplitPool reads a pool as command lines name it: WHERE, or NAME=WHERE.
func SplitPool(s string) (name, where string, err error) {
	name, where, ok := strings.Cut(s, "=")
	if !ok {
		name, where = "default", s
	}
	if !ValidName(name) {
		return "", "", fmt.Errorf("--pool %s: %q is no name of a pool; write NAME=WHERE", s, name)
	}
	return name, where, nil
}

// CheckPools refuses pools as command lines name them of which two have one name, so that one is never chosen, or one place, whose volumes would be listed twice.
func CheckPools(texts []string) error {
	names, places := map[string]string{}, map[string]string{}
	for _, text := range texts {
		name, where, err := SplitPool(text)
		if err != nil {
			return err
		}
		where = path.Clean(where)
		if other, ok := names[name]; ok {
			return fmt.Errorf("--pool %s: --pool %s is called %s as well; write another NAME=%s", text, other, name, where)
		}
		if other, ok := places[where]; ok {
			return fmt.Errorf("--pool %s: --pool %s is the same place; leave one of them out", text, other)
		}
		names[name], places[where] = text, text
	}
	return nil
}

// NoPool is an ErrInvalid for the name of a pool that is none of the known ones.
func NoPool(name string, known []string) error {
	return Invalid("parameter pool", "there is no pool %q; known are %s", abbreviate(name), strings.Join(known, ", "))
}

// MaxName is the length of the longest name (CSI spec, "Size Limits").
const MaxName = 128

// CheckName is an ErrInvalid where ValidName is false.
func CheckName(kind, name string) error {
	if !ValidName(name) {
		return Invalid(kind, "%q is no name; letters, digits, _ . and -, a letter or digit first, at most %d", abbreviate(name), MaxName)
	}
	return nil
}

func alphanumeric(c byte) bool {
	return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9'
}

// abbreviate keeps a message on its line.
func abbreviate(s string) string {
	if len(s) > 80 {
		return s[:80] + "…"
	}
	return s
}
