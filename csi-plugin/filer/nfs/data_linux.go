package nfs

import (
	"errors"
	"io"

	"golang.org/x/sys/unix"
)

// file opens a regular file for READ, WRITE or COMMIT. Its owner may always: a client has checked that when the file was opened, and its
// mode may be another since.
func (x *exchange) file(handle []byte, flags int, mode uint32) (object, status) {
	o, s := x.object(handle, flags)
	switch {
	case s != ok:
		return o, s
	case o.kind() == unix.S_IFDIR:
		s = errIsDir
	case o.kind() != unix.S_IFREG:
		s = errInval
	case o.st.Uid != x.user.uid && mode != 0:
		err := o.may(x.user, mode)
		if errors.Is(err, unix.EACCES) && mode == unix.R_OK {
			err = o.may(x.user, unix.X_OK) // to execute it, a client reads it
		}
		s = statusOf(err)
	}
	if s != ok {
		o.close()
	}
	return o, s
}

func read(x *exchange) status {
	handle := x.args.opaque(maxHandle)
	offset, count := x.args.uint64(), x.args.uint32()
	if x.args.bad {
		return garbage
	}
	if !x.waits && x.first().export != nil && x.first().export.slow.Load() {
		return mustWait
	}
	o, s := x.file(handle, unix.O_RDONLY, unix.R_OK)
	if s != ok {
		return s
	}
	defer o.close()
	n := min(uint64(count), maxData)
	if size := uint64(o.st.Size); offset >= size {
		n = 0
	} else {
		n = min(n, size-offset)
	}
	at := len(x.out.b) + beforeData
	x.buffer = take(at + int(n) + pad(int(n)))
	buffer := x.buffer
	data := buffer[at : at+int(n)]
	got := 0
	for got < len(data) {
		m, err := x.pread(o.fd, data[got:], int64(offset)+int64(got))
		switch {
		case err == unix.EINTR:
			continue
		case err == unix.EAGAIN && !x.waits:
			return mustWait
		case err != nil:
			return statusOf(err)
		}
		if m == 0 {
			break
		}
		got += m
	}
	// The attributes are those from before: a client that has seen newer data than they say asks again, one with newer attributes than data would not.
	x.out.b = append(buffer[:0], x.out.b...)
	x.out.uint32(uint32(ok))
	x.out.bool(true)
	x.out.fattr(&o)
	x.out.uint32(uint32(got))
	x.out.bool(got < len(data) || offset+uint64(got) >= uint64(o.st.Size))
	x.out.uint32(uint32(got))
	x.out.b = append(buffer[:at+got], zeros[:pad(got)]...)
	return ok
}

// beforeData is what a reply of READ has before the data, which goes to its place at once: status, attributes, count, end, length.
const beforeData = 4 + 4 + fattrSize + 4 + 4 + 4

// pread is pread(2), and where the call does not wait, of what is in memory.
func (x *exchange) pread(fd int, data []byte, offset int64) (int, error) {
	if x.waits {
		return unix.Pread(fd, data, offset)
	}
	n, err := unix.Preadv2(fd, [][]byte{data}, offset, unix.RWF_NOWAIT)
	if err == unix.EOPNOTSUPP {
		x.export.slow.Store(true)
		err = unix.EAGAIN
	}
	return n, err
}

// How stable a WRITE is (RFC 1813 §3.3.7, stable_how).
const (
	unstable = 0
	dataSync = 1
	fileSync = 2
)

func write(x *exchange) status {
	handle := x.args.opaque(maxHandle)
	offset, count, stable := x.args.uint64(), x.args.uint32(), x.args.uint32()
	data := x.args.opaque(maxData)
	if x.args.bad || stable > fileSync || uint64(count) > uint64(len(data)) {
		return garbage
	}
	data = data[:count]
	o, s := x.file(handle, unix.O_WRONLY, unix.W_OK)
	if s != ok {
		return s
	}
	defer o.close()
	if x.export.ReadOnly {
		return errROFS
	}
	if offset > 1<<63-1-maxData {
		return errFBig
	}
	verifier := x.verifier.Load() // before: what is lost from here on is told by another one
	written := 0
	err := x.user.as(func() error {
		for written < len(data) {
			n, err := unix.Pwrite(o.fd, data[written:], int64(offset)+int64(written))
			if err == unix.EINTR {
				continue
			}
			if err == nil && n == 0 {
				err = io.ErrShortWrite
			}
			if err != nil {
				return err
			}
			written += n
		}
		return nil
	})
	if err != nil && written == 0 { // else the client writes the rest, and gets the error then
		return statusOf(err)
	}
	switch stable {
	case dataSync:
		err = x.sync(o.fd, unix.Fdatasync)
	case fileSync:
		err = x.sync(o.fd, unix.Fsync)
	default:
		err = nil
	}
	if err != nil {
		return statusOf(err)
	}
	x.out.uint32(uint32(ok))
	x.out.changed(&o)
	x.out.uint32(uint32(written))
	x.out.uint32(stable)
	x.out.uint64(verifier)
	return ok
}

func commit(x *exchange) status {
	handle := x.args.opaque(maxHandle)
	x.args.uint64() // offset and count: all of the file is as good
	x.args.uint32()
	if x.args.bad {
		return garbage
	}
	o, s := x.file(handle, unix.O_RDONLY, 0)
	if s != ok {
		return s
	}
	defer o.close()
	verifier := x.verifier.Load()
	if err := x.sync(o.fd, unix.Fsync); err != nil {
		return statusOf(err)
	}
	x.out.uint32(uint32(ok))
	x.out.changed(&o)
	x.out.uint64(verifier)
	return ok
}
