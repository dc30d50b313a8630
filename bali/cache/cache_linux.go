// Package cache keeps verified images unpacked in a folder, so that a service
// starts without fetching and unpacking, and while the image's server is away.
//
// Nothing in the folder is believed: an entry holds the image's signature, and
// every use computes the tree's digest again and checks it against that, file
// by file, from the digests that fs-verity keeps in the kernel where the file
// system can, else by reading. It imports bali/seal and nothing else of this
// repository.
package cache

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/bali/seal"
)

// Store is a cache folder:
//
//	v1/KEY/signature   the signature record
//	v1/KEY/tree/       the unpacked image
//	sources/HASH       the KEY that a source had last
//	tmp-*              being filled; removed by the next run if that was killed
type Store struct{ dir string }

// Entry is one image in a store.
type Entry struct{ Path, key string }

// Tree is the folder with the image's files.
func (e *Entry) Tree() string { return filepath.Join(e.Path, "tree") }

// Open makes the folder if it is missing. One that somebody else can write to is
// refused: they could change files after they were verified.
func Open(dir string) (*Store, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	for _, d := range []string{dir, filepath.Join(dir, "v1"), filepath.Join(dir, "sources")} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return nil, err
		}
	}
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		return nil, err
	}
	if int(st.Uid) != os.Geteuid() || st.Mode&0o077 != 0 {
		return nil, fmt.Errorf("cache %s: others can reach into it: chown and chmod 700 it", dir)
	}
	s := &Store{dir}
	return s, s.sweep()
}

// sweep removes what a killed run left half filled, unless one is filling now.
func (s *Store) sweep() error {
	lock, err := s.lock(unix.LOCK_EX | unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return nil
	}
	if err != nil {
		return err
	}
	defer lock.Close()
	left, err := os.ReadDir(s.dir)
	if err != nil {
		return err
	}
	for _, e := range left {
		if strings.HasPrefix(e.Name(), "tmp-") {
			if err := os.RemoveAll(filepath.Join(s.dir, e.Name())); err != nil {
				return err
			}
		}
	}
	return nil
}

// lock holds the folder until the handle is closed: shared by those who fill
// it, exclusively by the one who sweeps.
func (s *Store) lock(how int) (*os.File, error) {
	d, err := os.Open(s.dir)
	if err != nil {
		return nil, err
	}
	for err = unix.EINTR; errors.Is(err, unix.EINTR); {
		err = unix.Flock(int(d.Fd()), how)
	}
	if err != nil {
		d.Close()
		return nil, fmt.Errorf("lock %s: %w", s.dir, err)
	}
	return d, nil
}

// key is the digest of what a file says about its signature at its end, known
// before the file is read.
func key(s *seal.Signature) (string, error) {
	claim := *s
	claim.Payload = [64]byte{}
	b, err := claim.MarshalBinary()
	if err != nil {
		return "", err
	}
	h := sha256.Sum256(b)
	return hex.EncodeToString(h[:]), nil
}

// Find looks for the image whose end ParseTrailer has read; nil is none.
func (s *Store) Find(claim *seal.Signature) *Entry {
	k, err := key(claim)
	if err != nil {
		return nil
	}
	return s.entry(k)
}

func (s *Store) entry(k string) *Entry {
	p := filepath.Join(s.dir, "v1", k)
	if _, err := os.Stat(p); err != nil {
		return nil
	}
	return &Entry{p, k}
}

func (s *Store) sourceFile(source string) string {
	h := sha256.Sum256([]byte(source))
	return filepath.Join(s.dir, "sources", hex.EncodeToString(h[:]))
}

// Remember notes which image a source has.
func (s *Store) Remember(source string, e *Entry) error {
	name := s.sourceFile(source)
	if b, err := os.ReadFile(name); err == nil && string(b) == e.key {
		return nil
	}
	lock, err := s.lock(unix.LOCK_SH)
	if err != nil {
		return err
	}
	defer lock.Close()
	tmp := filepath.Join(s.dir, fmt.Sprintf("tmp-%d", os.Getpid()))
	f, err := os.OpenFile(tmp, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.WriteString(e.key)
	// synced, or an empty one could be there after a power cut
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	return os.Rename(tmp, name)
}

// Recall gives the image that a source had last; nil is none.
func (s *Store) Recall(source string) *Entry {
	b, err := os.ReadFile(s.sourceFile(source))
	if err != nil || len(b) != sha256.Size*2 || strings.ContainsAny(string(b), "/.") {
		return nil
	}
	return s.entry(string(b))
}

// Add reads an image into a file without a name, verifies it there, asks accept
// about the signature, and only then unpacks it into the store.
func (s *Store) Add(ctx context.Context, src io.Reader, l seal.Limits, devices bool, accept func(*seal.Signature, error) error) (*Entry, error) {
	spool, err := s.spool()
	if err != nil {
		return nil, err
	}
	defer spool.Close()
	sig, err := seal.Verify(ctx, io.TeeReader(src, spool))
	if err := accept(sig, err); err != nil {
		return nil, err
	}
	if e := s.Find(sig); e != nil {
		return e, nil // the source could not say beforehand what it has
	}
	if _, err := spool.Seek(0, io.SeekStart); err != nil {
		return nil, err
	}
	lock, err := s.lock(unix.LOCK_SH)
	if err != nil {
		return nil, err
	}
	defer lock.Close()
	tmp, err := os.MkdirTemp(s.dir, "tmp-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(tmp) // nothing is there any more if it succeeded
	sig, err = fill(ctx, spool, l, devices, tmp)
	if err != nil {
		return nil, err
	}
	k, err := key(sig)
	if err != nil {
		return nil, err
	}
	to := filepath.Join(s.dir, "v1", k)
	if err := os.Rename(tmp, to); err != nil {
		if e := s.entry(k); e != nil {
			return e, nil // another run was faster
		}
		return nil, err
	}
	return &Entry{to, k}, nil
}

func (s *Store) spool() (*os.File, error) {
	fd, err := unix.Open(s.dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err == nil {
		return os.NewFile(uintptr(fd), s.dir), nil
	}
	f, err := os.CreateTemp(s.dir, "tmp-") // a file system without O_TMPFILE
	if err != nil {
		return nil, err
	}
	return f, os.Remove(f.Name())
}

func fill(ctx context.Context, image io.Reader, l seal.Limits, devices bool, to string) (*seal.Signature, error) {
	tree := filepath.Join(to, "tree")
	if err := os.Mkdir(tree, 0o700); err != nil {
		return nil, err
	}
	dir, err := os.Open(tree)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	if err := dir.Chmod(0o755); err != nil { // whatever the umask
		return nil, err
	}
	r, err := seal.NewReader(image, l)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	u := seal.Unpack{Owners: true, Setid: true, Devices: devices, Exact: true}
	sig, err := u.Into(ctx, r, dir)
	if err != nil {
		return nil, err
	}
	if err := protect(tree); err != nil {
		return nil, err
	}
	sum, err := seal.TreeOf(ctx, dir, measure)
	if err != nil {
		return nil, err
	}
	if sum != sig.Tree {
		return nil, fmt.Errorf("%w: the files are not the tree that was signed: build the image again", seal.ErrSignature)
	}
	record, err := sig.MarshalBinary()
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(to, "signature"), record, 0o600); err != nil {
		return nil, err
	}
	return sig, unix.Syncfs(int(dir.Fd()))
}

// Verify checks an entry against its signature, and gives the signature and the
// handle of the tree it is about. Whether the identity is trusted is the
// caller's question.
func (e *Entry) Verify(ctx context.Context) (*seal.Signature, *os.File, error) {
	b, err := os.ReadFile(filepath.Join(e.Path, "signature"))
	if err != nil {
		return nil, nil, err
	}
	s := new(seal.Signature)
	if err := s.UnmarshalBinary(b); err != nil {
		return nil, nil, err
	}
	if err := s.Verify(); err != nil {
		return nil, nil, err
	}
	dir, err := os.Open(e.Tree())
	if err != nil {
		return nil, nil, err
	}
	sum, err := seal.TreeOf(ctx, dir, measure)
	if err == nil && sum != s.Tree {
		err = fmt.Errorf("%w: the files in it are not what %s signed: remove %s", seal.ErrSignature, s.Identity, e.Path)
	}
	if err != nil {
		dir.Close()
		return nil, nil, err
	}
	return s, dir, nil
}

// Image reads the description in a tree that Verify gave.
func Image(dir *os.File) (*seal.Image, error) {
	fd, err := unix.Openat(int(dir.Fd()), seal.ImagePath, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), seal.ImagePath)
	defer f.Close()
	i := new(seal.Image)
	if err := json.NewDecoder(f).Decode(i); err != nil {
		return nil, err
	}
	return i, i.Validate()
}

// linux/fsverity.h
const (
	fsIocEnableVerity  = 0x40806685
	fsIocMeasureVerity = 0xc0046686
	hashSHA256         = 1
	verityBlock        = 4096
)

type enableArg struct {
	version, hash, block, saltSize uint32
	salt                           uint64
	sigSize, _                     uint32
	sig                            uint64
	_                              [11]uint64
}

type digestArg struct {
	algorithm, size uint16
	digest          [32]byte
}

// measure asks the kernel for a file's fs-verity digest.
func measure(fd int) ([32]byte, bool) {
	d := digestArg{size: sha256.Size}
	_, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), fsIocMeasureVerity, uintptr(unsafe.Pointer(&d)))
	return d.digest, e == 0 && d.algorithm == hashSHA256 && d.size == sha256.Size
}

// protect turns fs-verity on for every file, where the file system has it: the
// kernel then refuses to read a page that was changed.
func protect(tree string) error {
	return filepath.WalkDir(tree, func(p string, d os.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		f, err := os.Open(p)
		if err != nil {
			return err
		}
		defer f.Close()
		var st unix.Stat_t
		if err := unix.Fstat(int(f.Fd()), &st); err != nil {
			return err
		}
		arg := enableArg{version: 1, hash: hashSHA256, block: verityBlock}
		_, _, e := unix.Syscall(unix.SYS_IOCTL, f.Fd(), fsIocEnableVerity, uintptr(unsafe.Pointer(&arg)))
		switch e {
		case 0:
			// ext4 makes the file new, and its time is part of what is signed
			return unix.UtimesNanoAt(int(f.Fd()), "", []unix.Timespec{st.Atim, st.Mtim}, unix.AT_EMPTY_PATH)
		case unix.EEXIST: // another name of the same file
			return nil
		case unix.ENOTTY, unix.EOPNOTSUPP, unix.EINVAL:
			return filepath.SkipAll // not this file system, or not this kernel
		}
		return fmt.Errorf("enable fs-verity for %s: %w", p, e)
	})
}
