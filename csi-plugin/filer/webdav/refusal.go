package webdav

import (
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"syscall"

	"github.com/cradlestack/cradlestack/csi-plugin/filer/gateway"
)

// A refusal is an error that says what is answered.
type refusal struct {
	code      int
	condition string // XML that says it to programs (RFC 4918 §16)
	err       error
}

func (r *refusal) Error() string { return r.err.Error() }
func (r *refusal) Unwrap() error { return r.err }

func bad(format string, args ...any) error {
	return &refusal{code: http.StatusBadRequest, err: fmt.Errorf(format, args...)}
}

// refuse is an answer with a code and what is wrong.
func refuse(code int, format string, args ...any) error {
	return &refusal{code: code, err: fmt.Errorf(format, args...)}
}

// explain is the answer to an error.
func explain(err error) *refusal {
	var r *refusal
	var large *http.MaxBytesError
	var errno syscall.Errno
	code := http.StatusInternalServerError
	switch {
	case errors.As(err, &r):
		return r
	case errors.Is(err, gateway.ErrHeld):
		code = http.StatusServiceUnavailable
	case errors.As(err, &large), errors.Is(err, syscall.EFBIG):
		code = http.StatusRequestEntityTooLarge
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return &refusal{code: http.StatusInsufficientStorage, condition: `<D:quota-not-exceeded/>`, err: errors.New("the volume is full")} // RFC 4331 §6
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ENOTDIR), errors.Is(err, syscall.ELOOP):
		code = http.StatusNotFound
	case errors.Is(err, fs.ErrExist), errors.Is(err, syscall.ENOTEMPTY), errors.Is(err, syscall.EISDIR):
		code = http.StatusConflict
	case errors.Is(err, syscall.ENAMETOOLONG), errors.Is(err, syscall.EINVAL):
		code = http.StatusBadRequest
	case errors.Is(err, fs.ErrPermission), errors.Is(err, syscall.EROFS):
		code = http.StatusForbidden
	case !errors.As(err, &errno):
		var path *fs.PathError
		if errors.As(err, &path) {
			code = http.StatusNotFound // os.Root's word for what leads out of it
		}
	}
	return &refusal{code: code, err: err}
}
