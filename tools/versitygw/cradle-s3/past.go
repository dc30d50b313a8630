package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/url"
	"os"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"
	"github.com/versity/versitygw/backend"
	"github.com/versity/versitygw/backend/posix"
	"github.com/versity/versitygw/s3err"
	"github.com/versity/versitygw/s3response"
	"golang.org/x/sys/unix"
)

// snapshotsDir is what keys of objects in snapshots begin with, followed by the snapshot's name and the key that the object had.
const snapshotsDir = ".snapshots"

// A past is the gateway with the directory's snapshots, in which nothing is changed: keys are decided about here, as this is where they are what files are named by.
// cradle-filer says at a socket which snapshots there are, and gives what it opens of them, one directory at a time for one request.
type past struct {
	*posix.Posix
	bucket string
	socket string
}

// served are the directories of what helps to serve the volume otherwise (filer/webdav, Hidden): nothing of it is an object, nor can be made one.
var served = []string{".cradle-webdav", ".zfs"}

// former says whether a key is of the snapshots, or of what is no object at all. Posix cleans keys so as well.
func former(key string) bool {
	first, _, _ := strings.Cut(path.Clean("/" + key)[1:], "/")
	return first == snapshotsDir || slices.Contains(served, first)
}

func isFormer(key *string) bool { return key != nil && former(*key) }

// split is a key's snapshot, and the key in it, with the slash at its end by which a directory is named.
func split(key string) (name, inner string) {
	clean := strings.TrimPrefix(path.Clean("/"+key), "/"+snapshotsDir)
	name, inner, _ = strings.Cut(strings.TrimPrefix(clean, "/"), "/")
	if inner != "" && strings.HasSuffix(key, "/") {
		inner += "/"
	}
	return name, inner
}

// A told answer is one of cradle-filer's.
type told struct {
	Snapshots []snapshot `json:"snapshots"`
	Missing   bool       `json:"missing"` // there is none of that name
	Error     string     `json:"error"`
}

type snapshot struct {
	Name  string    `json:"name"`
	Taken time.Time `json:"taken"`
}

// ask asks cradle-filer for one snapshot's root directory, or with "" for the names of all.
func (p *past) ask(ctx context.Context, name string) (t told, root *os.File, err error) {
	failed := func(err error) (told, *os.File, error) {
		if root != nil {
			root.Close()
		}
		return t, nil, fmt.Errorf("snapshots: %w", err)
	}
	c, err := new(net.Dialer).DialContext(ctx, "unix", p.socket)
	if err != nil {
		return failed(err)
	}
	defer c.Close()
	conn := c.(*net.UnixConn)
	if err := json.NewEncoder(conn).Encode(map[string]string{"open": name}); err != nil {
		return failed(err)
	}
	data, rights := make([]byte, 4096), make([]byte, unix.CmsgSpace(4))
	n, nr, _, _, err := conn.ReadMsgUnix(data, rights)
	if err != nil {
		return failed(err)
	}
	if messages, err := unix.ParseSocketControlMessage(rights[:nr]); err == nil && len(messages) == 1 {
		if fds, err := unix.ParseUnixRights(&messages[0]); err == nil && len(fds) == 1 {
			root = os.NewFile(uintptr(fds[0]), name)
		}
	}
	rest, err := io.ReadAll(conn)
	if err == nil {
		err = json.Unmarshal(append(data[:n], rest...), &t)
	}
	if err == nil && t.Error != "" {
		err = errors.New(t.Error)
	}
	if err == nil && name != "" && root == nil && !t.Missing {
		err = errors.New("no directory came")
	}
	if err != nil {
		return failed(err)
	}
	return t, root, nil
}

// at is a snapshot's root directory as Posix names a bucket.
func at(root *os.File) string { return fmt.Sprintf("/proc/self/fd/%d", root.Fd()) }

// enter finds the object that a key names: in which bucket, by which key, until leave is called.
func (p *past) enter(ctx context.Context, key string) (bucket, inner string, leave func(), err error) {
	name, inner := split(key)
	if name == "" || inner == "" {
		return "", "", nil, s3err.GetAPIError(s3err.ErrNoSuchKey)
	}
	_, root, err := p.ask(ctx, name)
	if err != nil {
		return "", "", nil, err
	}
	if root == nil {
		return "", "", nil, s3err.GetAPIError(s3err.ErrNoSuchKey)
	}
	return at(root), inner, func() { root.Close() }, nil
}

// GetObject is backend.Backend's.
func (p *past) GetObject(ctx context.Context, in *s3.GetObjectInput) (*s3.GetObjectOutput, error) {
	if isFormer(in.Key) {
		bucket, key, leave, err := p.enter(ctx, *in.Key)
		if err != nil {
			return nil, err
		}
		defer leave()
		there := *in
		there.Bucket, there.Key = &bucket, &key
		in = &there
	}
	return p.Posix.GetObject(ctx, in)
}

// HeadObject is backend.Backend's.
func (p *past) HeadObject(ctx context.Context, in *s3.HeadObjectInput) (*s3.HeadObjectOutput, error) {
	if isFormer(in.Key) {
		bucket, key, leave, err := p.enter(ctx, *in.Key)
		if err != nil {
			return nil, err
		}
		defer leave()
		there := *in
		there.Bucket, there.Key = &bucket, &key
		in = &there
	}
	return p.Posix.HeadObject(ctx, in)
}

// GetObjectAttributes is backend.Backend's.
func (p *past) GetObjectAttributes(ctx context.Context, in *s3.GetObjectAttributesInput) (s3response.GetObjectAttributesResponse, error) {
	if isFormer(in.Key) {
		bucket, key, leave, err := p.enter(ctx, *in.Key)
		if err != nil {
			return s3response.GetObjectAttributesResponse{}, err
		}
		defer leave()
		there := *in
		there.Bucket, there.Key = &bucket, &key
		in = &there
	}
	return p.Posix.GetObjectAttributes(ctx, in)
}

// GetObjectTagging is backend.Backend's.
func (p *past) GetObjectTagging(ctx context.Context, bucket, key, version string) (map[string]string, error) {
	if former(key) {
		there, inner, leave, err := p.enter(ctx, key)
		if err != nil {
			return nil, err
		}
		defer leave()
		bucket, key = there, inner
	}
	return p.Posix.GetObjectTagging(ctx, bucket, key, version)
}

// source is what a copy is made of, as Posix reads it. It keeps to the bucket's name, which a source begins with, and goes on from there.
func (p *past) source(ctx context.Context, header *string) (source *string, leave func(), err error) {
	nothing := func() {}
	if header == nil {
		return header, nothing, nil
	}
	bucket, key, version, err := backend.ParseCopySource(*header)
	if err != nil || bucket != p.bucket || !former(key) {
		return header, nothing, err
	}
	root, inner, leave, err := p.enter(ctx, key)
	if err != nil {
		return nil, nil, err
	}
	text := p.bucket + "/../.." + root + "/" + inner
	if version != "" {
		text += "?versionId=" + version
	}
	text = url.QueryEscape(text)
	return &text, leave, nil
}

// CopyObject is backend.Backend's.
func (p *past) CopyObject(ctx context.Context, in s3response.CopyObjectInput) (s3response.CopyObjectOutput, error) {
	if isFormer(in.Key) {
		return s3response.CopyObjectOutput{}, denied
	}
	source, leave, err := p.source(ctx, in.CopySource)
	if err != nil {
		return s3response.CopyObjectOutput{}, err
	}
	defer leave()
	in.CopySource = source
	return p.Posix.CopyObject(ctx, in)
}

// UploadPartCopy is backend.Backend's.
func (p *past) UploadPartCopy(ctx context.Context, in *s3.UploadPartCopyInput) (s3response.CopyPartResult, error) {
	if isFormer(in.Key) {
		return s3response.CopyPartResult{}, denied
	}
	source, leave, err := p.source(ctx, in.CopySource)
	if err != nil {
		return s3response.CopyPartResult{}, err
	}
	defer leave()
	there := *in
	there.CopySource = source
	return p.Posix.UploadPartCopy(ctx, &there)
}

// ListObjects is backend.Backend's.
func (p *past) ListObjects(ctx context.Context, in *s3.ListObjectsInput) (s3response.ListObjectsResult, error) {
	if !listsFormer(in.Prefix) {
		out, err := p.Posix.ListObjects(ctx, in)
		out.Contents, out.CommonPrefixes = present(out.Contents), presentPrefixes(out.CommonPrefixes)
		return out, err
	}
	found, err := p.list(ctx, in.Prefix, in.Delimiter, value(in.Marker), in.MaxKeys, true)
	if err != nil {
		return s3response.ListObjectsResult{}, err
	}
	return s3response.ListObjectsResult{
		Name: in.Bucket, Prefix: in.Prefix, Delimiter: given(in.Delimiter), Marker: given(in.Marker), MaxKeys: in.MaxKeys, EncodingType: in.EncodingType,
		Contents: found.Objects, CommonPrefixes: found.CommonPrefixes, IsTruncated: &found.Truncated, NextMarker: given(&found.NextMarker),
	}, nil
}

// ListObjectsV2 is backend.Backend's.
func (p *past) ListObjectsV2(ctx context.Context, in *s3.ListObjectsV2Input) (s3response.ListObjectsV2Result, error) {
	if !listsFormer(in.Prefix) {
		out, err := p.Posix.ListObjectsV2(ctx, in)
		out.Contents, out.CommonPrefixes = present(out.Contents), presentPrefixes(out.CommonPrefixes)
		if err == nil {
			count := int32(len(out.Contents) + len(out.CommonPrefixes))
			out.KeyCount = &count
		}
		return out, err
	}
	found, err := p.list(ctx, in.Prefix, in.Delimiter, max(value(in.StartAfter), value(in.ContinuationToken)), in.MaxKeys, in.FetchOwner != nil && *in.FetchOwner)
	if err != nil {
		return s3response.ListObjectsV2Result{}, err
	}
	count := int32(len(found.Objects) + len(found.CommonPrefixes))
	return s3response.ListObjectsV2Result{
		Name: in.Bucket, Prefix: in.Prefix, Delimiter: given(in.Delimiter), StartAfter: given(in.StartAfter), ContinuationToken: given(in.ContinuationToken), MaxKeys: in.MaxKeys,
		EncodingType: in.EncodingType, Contents: found.Objects, CommonPrefixes: found.CommonPrefixes, IsTruncated: &found.Truncated, NextContinuationToken: given(&found.NextMarker), KeyCount: &count,
	}, nil
}

// ListObjectVersions is backend.Backend's: of what is in snapshots there are no versions.
func (p *past) ListObjectVersions(ctx context.Context, in *s3.ListObjectVersionsInput) (s3response.ListVersionsResult, error) {
	out, err := p.Posix.ListObjectVersions(ctx, in)
	out.CommonPrefixes = presentPrefixes(out.CommonPrefixes)
	out.Versions = slices.DeleteFunc(out.Versions, func(v s3response.ObjectVersion) bool { return isFormer(v.Key) })
	return out, err
}

// listsFormer says whether a listing is asked for of the snapshots: others do not have them.
func listsFormer(prefix *string) bool { return strings.HasPrefix(value(prefix), snapshotsDir+"/") }

// present leaves out what lies in the directory where the snapshots are seen, which hides it.
func present(all []s3response.Object) []s3response.Object {
	return slices.DeleteFunc(all, func(o s3response.Object) bool { return isFormer(o.Key) })
}

func presentPrefixes(all []types.CommonPrefix) []types.CommonPrefix {
	return slices.DeleteFunc(all, func(c types.CommonPrefix) bool { return isFormer(c.Prefix) })
}

func value(s *string) string {
	if s == nil {
		return ""
	}
	return *s
}

// given is nil for what was not given.
func given(s *string) *string {
	if value(s) == "" {
		return nil
	}
	return s
}

// list lists snapshots, and what is in them.
func (p *past) list(ctx context.Context, prefix, delimiter *string, marker string, keys *int32, owner bool) (backend.WalkResults, error) {
	t, _, err := p.ask(ctx, "")
	if err != nil {
		return backend.WalkResults{}, err
	}
	s := &shelf{past: p, ctx: ctx, all: t.Snapshots, opened: map[string]*os.File{}}
	slices.SortFunc(s.all, func(a, b snapshot) int { return cmp.Compare(a.Name, b.Name) })
	defer s.close()
	var most int32
	if keys != nil {
		most = *keys
	}
	found, err := backend.Walk(ctx, s, value(prefix), value(delimiter), marker, most, func(key string, d fs.DirEntry) (s3response.Object, error) {
		name, inner := split(key)
		if inner == "" {
			return s3response.Object{}, backend.ErrSkipObj
		}
		root, err := s.open(name)
		if errors.Is(err, fs.ErrNotExist) {
			return s3response.Object{}, backend.ErrSkipObj
		}
		if err != nil {
			return s3response.Object{}, err
		}
		o, err := p.FileToObj(at(root), owner)(inner, d)
		o.Key = &key
		return o, err
	}, []string{posix.MetaTmpDir})
	if err != nil {
		return backend.WalkResults{}, fmt.Errorf("list snapshots: %w", err)
	}
	return found, nil
}

// A shelf is the snapshots in their directory, as a listing walks through them. It opens those that it comes to.
type shelf struct {
	*past
	ctx    context.Context
	all    []snapshot
	opened map[string]*os.File
}

func (s *shelf) close() {
	for _, root := range s.opened {
		root.Close()
	}
}

func (s *shelf) open(name string) (*os.File, error) {
	if root := s.opened[name]; root != nil {
		return root, nil
	}
	_, root, err := s.ask(s.ctx, name)
	if err != nil {
		return nil, err
	}
	if root == nil {
		return nil, fs.ErrNotExist
	}
	s.opened[name] = root
	return root, nil
}

// Open is fs.FS's.
func (s *shelf) Open(name string) (fs.File, error) {
	return nil, &fs.PathError{Op: "open", Path: name, Err: fs.ErrInvalid}
}

// within is the file system of the snapshot that a path is in, and the path there.
func (s *shelf) within(op, name string) (fs.FS, string, error) {
	is, inner := split(name)
	if !fs.ValidPath(name) || !former(name) {
		return nil, "", &fs.PathError{Op: op, Path: name, Err: fs.ErrNotExist}
	}
	root, err := s.open(is)
	if err != nil {
		return nil, "", &fs.PathError{Op: op, Path: name, Err: err}
	}
	return os.DirFS(at(root)), cmp.Or(inner, "."), nil
}

// ReadDir is fs.ReadDirFS's.
func (s *shelf) ReadDir(name string) (entries []fs.DirEntry, err error) {
	switch name {
	case ".":
		return []fs.DirEntry{fs.FileInfoToDirEntry(label{snapshot{Name: snapshotsDir}})}, nil
	case snapshotsDir:
		for _, one := range s.all {
			entries = append(entries, fs.FileInfoToDirEntry(label{one}))
		}
		return entries, nil
	}
	in, inner, err := s.within("readdir", name)
	if err != nil {
		return nil, err
	}
	return fs.ReadDir(in, inner)
}

// Stat is fs.StatFS's.
func (s *shelf) Stat(name string) (fs.FileInfo, error) {
	if name == "." || name == snapshotsDir {
		return label{snapshot{Name: name}}, nil
	}
	in, inner, err := s.within("stat", name)
	if err != nil {
		return nil, err
	}
	return fs.Stat(in, inner)
}

// A label is what is told of a snapshot that is not opened.
type label struct{ is snapshot }

func (l label) Name() string       { return l.is.Name }
func (l label) ModTime() time.Time { return l.is.Taken }
func (label) Size() int64          { return 0 }
func (label) Mode() fs.FileMode    { return fs.ModeDir | 0o555 }
func (label) IsDir() bool          { return true }
func (label) Sys() any             { return nil }

// denied is the answer to what would change a snapshot.
var denied = s3err.GetAPIError(s3err.ErrAccessDenied)

// PutObject is backend.Backend's.
func (p *past) PutObject(ctx context.Context, in s3response.PutObjectInput) (s3response.PutObjectOutput, error) {
	if isFormer(in.Key) {
		return s3response.PutObjectOutput{}, denied
	}
	return p.Posix.PutObject(ctx, in)
}

// DeleteObject is backend.Backend's.
func (p *past) DeleteObject(ctx context.Context, in *s3.DeleteObjectInput) (*s3.DeleteObjectOutput, error) {
	if isFormer(in.Key) {
		return nil, denied
	}
	return p.Posix.DeleteObject(ctx, in)
}

// DeleteObjects is backend.Backend's: what is allowed of it is done.
func (p *past) DeleteObjects(ctx context.Context, in *s3.DeleteObjectsInput) (s3response.DeleteResult, error) {
	var refused []types.Error
	here := *in
	here.Delete = &types.Delete{Quiet: in.Delete.Quiet}
	for _, o := range in.Delete.Objects {
		if isFormer(o.Key) {
			refused = append(refused, s3err.ObjectDeleteError(o.Key, o.VersionId, denied))
		} else {
			here.Delete.Objects = append(here.Delete.Objects, o)
		}
	}
	out, err := p.Posix.DeleteObjects(ctx, &here)
	out.Error = append(out.Error, refused...)
	return out, err
}

// CreateMultipartUpload is backend.Backend's. What is not created can be neither filled nor completed.
func (p *past) CreateMultipartUpload(ctx context.Context, in s3response.CreateMultipartUploadInput) (s3response.InitiateMultipartUploadResult, error) {
	if isFormer(in.Key) {
		return s3response.InitiateMultipartUploadResult{}, denied
	}
	return p.Posix.CreateMultipartUpload(ctx, in)
}

// UploadPart is backend.Backend's.
func (p *past) UploadPart(ctx context.Context, in *s3.UploadPartInput) (*s3.UploadPartOutput, error) {
	if isFormer(in.Key) {
		return nil, denied
	}
	return p.Posix.UploadPart(ctx, in)
}

// CompleteMultipartUpload is backend.Backend's.
func (p *past) CompleteMultipartUpload(ctx context.Context, in *s3.CompleteMultipartUploadInput) (s3response.CompleteMultipartUploadResult, string, error) {
	if isFormer(in.Key) {
		return s3response.CompleteMultipartUploadResult{}, "", denied
	}
	return p.Posix.CompleteMultipartUpload(ctx, in)
}

// AbortMultipartUpload is backend.Backend's.
func (p *past) AbortMultipartUpload(ctx context.Context, in *s3.AbortMultipartUploadInput) error {
	if isFormer(in.Key) {
		return denied
	}
	return p.Posix.AbortMultipartUpload(ctx, in)
}

// PutObjectTagging is backend.Backend's.
func (p *past) PutObjectTagging(ctx context.Context, bucket, key, version string, tags map[string]string) error {
	if former(key) {
		return denied
	}
	return p.Posix.PutObjectTagging(ctx, bucket, key, version, tags)
}

// DeleteObjectTagging is backend.Backend's.
func (p *past) DeleteObjectTagging(ctx context.Context, bucket, key, version string) error {
	if former(key) {
		return denied
	}
	return p.Posix.DeleteObjectTagging(ctx, bucket, key, version)
}

// PutObjectLegalHold is backend.Backend's.
func (p *past) PutObjectLegalHold(ctx context.Context, bucket, key, version string, held bool) error {
	if former(key) {
		return denied
	}
	return p.Posix.PutObjectLegalHold(ctx, bucket, key, version, held)
}

// PutObjectRetention is backend.Backend's.
func (p *past) PutObjectRetention(ctx context.Context, bucket, key, version string, retention []byte) error {
	if former(key) {
		return denied
	}
	return p.Posix.PutObjectRetention(ctx, bucket, key, version, retention)
}
