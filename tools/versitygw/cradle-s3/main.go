// Command cradle-s3 serves one directory over S3, for cradle-filer, which starts it and forwards to it what is for that directory. It is versitygw's
// posix gateway with tags of its own for files that were not written over S3, and with the directory's snapshots.
//
// It is confined first: it sees a file system of its own that holds the directory and nothing else, has no network, is the user to whom new files are to
// belong, and has no capabilities but those over files. It ends with the process that has started it.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"runtime"

	"github.com/versity/versitygw/backend"
	"github.com/versity/versitygw/backend/meta"
	"github.com/versity/versitygw/backend/posix"
	"github.com/versity/versitygw/embedgw"
	"golang.org/x/sys/unix"
)

// A config is what cradle-filer says, in JSON in file 3. File 4 is a pipe whose other end it holds for as long as it lives.
type config struct {
	Root     string `json:"root"` // the directory
	Bucket   string `json:"bucket"`
	Run      string `json:"run"`   // directory for the socket, s3.sock
	Mount    string `json:"mount"` // an empty directory to begin from
	Key      string `json:"key"`
	Secret   string `json:"secret"`
	ReadOnly bool   `json:"readOnly"`
	UID      int    `json:"uid"`
	GID      int    `json:"gid"`

	Snapshots string `json:"snapshots"` // name of the socket in Run where cradle-filer tells of the directory's snapshots; "" where there are none
}

func main() {
	if err := run(); err != nil {
		fmt.Fprintf(os.Stderr, "cradle-s3: %v\n", err)
		os.Exit(1)
	}
}

const confined = "confined"

func run() error {
	file, leash := os.NewFile(3, "configuration"), os.NewFile(4, "leash")
	if len(os.Args) != 2 || file == nil || leash == nil {
		return errors.New("this is no command: cradle-filer starts it")
	}
	var c config
	if _, err := file.Seek(0, io.SeekStart); err != nil {
		return err
	}
	if err := json.NewDecoder(file).Decode(&c); err != nil {
		return fmt.Errorf("configuration: %w", err)
	}
	if os.Args[1] != confined {
		runtime.LockOSThread() // most of what follows is a thread's own
		return c.confine()
	}
	if err := file.Close(); err != nil { // before a link to /proc/self/fd could lead to the secret
		return err
	}
	go func() {
		_, _ = leash.Read(make([]byte, 1)) // until the other end is closed
		os.Exit(0)
	}()
	return c.serve()
}

// serve serves until this process is killed.
func (c config) serve() error {
	files, err := posix.New("/volumes", tags{}, posix.PosixOpts{ValidateBucketNames: false, Concurrency: 256, CopyObjectThreshold: math.MaxInt64})
	if err != nil {
		return err
	}
	var objects backend.Backend = files
	if c.Snapshots != "" {
		objects = &past{files, c.Bucket, "/run/" + c.Snapshots}
	}
	return embedgw.RunVersityGW(context.Background(), whole{objects}, &embedgw.Config{
		RootUserAccess: c.Key, RootUserSecret: c.Secret, Ports: []string{"/run/s3.sock"}, AdminPorts: []string{"/run/admin.sock"}, SocketPerm: "0600",
		MaxConnections: 1024, MaxRequests: 512, AdminMaxConnections: 1, AdminMaxRequests: 1, MultipartMaxParts: 10_000,
		Readonly: c.ReadOnly, Quiet: true, DisableACLs: true, DisableStrictBucketNames: true,
	})
}

// tags keeps what S3 knows of files in their extended attributes. An entity tag counts only for the content that it was made of.
type tags struct{ meta.XattrMeta }

const (
	etag   = "etag"
	etagOf = "etag-of"
)

// identity is a file's content, as far as the kernel's clock tells. Directories have none.
func identity(f *os.File, bucket, object string) (string, error) {
	var st unix.Stat_t
	var err error
	if f != nil {
		err = unix.Fstat(int(f.Fd()), &st)
	} else {
		err = unix.Stat(filepath.Join(bucket, object), &st)
	}
	if err != nil || st.Mode&unix.S_IFMT != unix.S_IFREG {
		return "", err
	}
	return fmt.Sprintf("%016x%016x-1", uint64(st.Mtim.Nano()), uint64(st.Size)^st.Ino<<32), nil
}

// RetrieveAttribute is meta.MetadataStorer's. A tag with a hyphen is no digest of the content, as clients know from uploads in parts.
func (t tags) RetrieveAttribute(f *os.File, bucket, object, attribute string) ([]byte, error) {
	value, err := t.XattrMeta.RetrieveAttribute(f, bucket, object, attribute)
	if errors.Is(err, unix.ENOTSUP) { // a link leads to where there are none
		err = meta.ErrNoSuchKey
	}
	if attribute != etag || err != nil && !errors.Is(err, meta.ErrNoSuchKey) {
		return value, err
	}
	now, ierr := identity(f, bucket, object)
	if ierr != nil || now == "" {
		return value, err
	}
	if err == nil {
		if of, oerr := t.XattrMeta.RetrieveAttribute(f, bucket, object, etagOf); oerr == nil && string(of) == now {
			return value, nil
		}
	}
	return []byte(now), nil
}

// StoreAttribute is meta.MetadataStorer's.
func (t tags) StoreAttribute(f *os.File, bucket, object, attribute string, value []byte) error {
	if attribute == etag {
		now, err := identity(f, bucket, object)
		if err != nil {
			return err
		}
		if now != "" {
			if err := t.XattrMeta.StoreAttribute(f, bucket, object, etagOf, []byte(now)); err != nil {
				return err
			}
		}
	}
	return t.XattrMeta.StoreAttribute(f, bucket, object, attribute, value)
}

// ListAttributes is meta.MetadataStorer's: nothing of what others keep with a file is S3's.
func (t tags) ListAttributes(bucket, object string) ([]string, error) {
	all, err := t.XattrMeta.ListAttributes(bucket, object)
	mine := all[:0]
	for _, a := range all {
		if a != etagOf && a != "cradle.webdav" {
			mine = append(mine, a)
		}
	}
	return mine, err
}
