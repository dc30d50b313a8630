package nfs

import (
	"errors"
	"syscall"
)

// A status is nfsstat3 (RFC 1813 §2.6).
type status uint32

const (
	ok             status = 0
	errPerm        status = 1
	errNoEnt       status = 2
	errIO          status = 5
	errNXIO        status = 6
	errAcces       status = 13
	errExist       status = 17
	errXDev        status = 18
	errNoDev       status = 19
	errNotDir      status = 20
	errIsDir       status = 21
	errInval       status = 22
	errFBig        status = 27
	errNoSpc       status = 28
	errROFS        status = 30
	errMLink       status = 31
	errNameTooLong status = 63
	errNotEmpty    status = 66
	errDQuot       status = 69
	errStale       status = 70
	errBadHandle   status = 10001
	errNotSync     status = 10002
	errNotSupp     status = 10004
	errTooSmall    status = 10005
	errServerFault status = 10006
	errJukebox     status = 10008 // later: the client asks again by itself

	// No statuses of the protocol:
	garbage  status = ^status(0)  // the arguments can't be read
	mustWait status = garbage - 1 // the call is one that does not wait, and nothing was done
)

var statusNames = map[status]string{
	ok: "OK", errPerm: "PERM", errNoEnt: "NOENT", errIO: "IO", errNXIO: "NXIO", errAcces: "ACCES", errExist: "EXIST", errXDev: "XDEV", errNoDev: "NODEV", errNotDir: "NOTDIR",
	errIsDir: "ISDIR", errInval: "INVAL", errFBig: "FBIG", errNoSpc: "NOSPC", errROFS: "ROFS", errMLink: "MLINK", errNameTooLong: "NAMETOOLONG", errNotEmpty: "NOTEMPTY",
	errDQuot: "DQUOT", errStale: "STALE", errBadHandle: "BADHANDLE", errNotSync: "NOT_SYNC", errNotSupp: "NOTSUPP", errTooSmall: "TOOSMALL", errServerFault: "SERVERFAULT",
	errJukebox: "JUKEBOX", garbage: "GARBAGE",
}

// String is the status as RFC 1813 names it, without NFS3ERR_.
func (s status) String() string {
	if name, known := statusNames[s]; known {
		return name
	}
	return "other"
}

// statuses are the errors that clients can be told; what is not here is errIO.
var statuses = map[syscall.Errno]status{
	syscall.EPERM: errPerm, syscall.ENOENT: errNoEnt, syscall.ENXIO: errNXIO, syscall.EACCES: errAcces, syscall.EEXIST: errExist,
	syscall.EXDEV: errXDev, syscall.ENODEV: errNoDev, syscall.ENOTDIR: errNotDir, syscall.EISDIR: errIsDir, syscall.EINVAL: errInval,
	syscall.ELOOP: errInval, syscall.EFBIG: errFBig, syscall.ENOSPC: errNoSpc, syscall.EROFS: errROFS, syscall.EMLINK: errMLink,
	syscall.ENAMETOOLONG: errNameTooLong, syscall.ENOTEMPTY: errNotEmpty, syscall.EDQUOT: errDQuot, syscall.ESTALE: errStale,
	syscall.EOPNOTSUPP: errNotSupp, syscall.EAGAIN: errJukebox, syscall.ENOMEM: errJukebox, syscall.EMFILE: errJukebox, syscall.ENFILE: errJukebox,
}

func statusOf(err error) status {
	if err == nil {
		return ok
	}
	var errno syscall.Errno
	if errors.As(err, &errno) {
		if s, known := statuses[errno]; known {
			return s
		}
	}
	return errIO
}
