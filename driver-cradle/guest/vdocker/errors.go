package vdocker

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/http"

	"github.com/moby/moby/api/types/common"
	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/driver-cradle/guest"
)

// statusError is an error with the HTTP status that docker gives it.
type statusError struct {
	status  int
	message string
}

func (e statusError) Error() string { return e.message }

func invalid(format string, args ...any) error {
	return statusError{http.StatusBadRequest, fmt.Sprintf(format, args...)}
}

// status is docker's for an error.
func status(err error) int {
	var s statusError
	switch {
	case errors.As(err, &s):
		return s.status
	case errors.Is(err, guest.ErrNotModified):
		return http.StatusNotModified
	case errors.Is(err, guest.ErrInvalid):
		return http.StatusBadRequest
	case errors.Is(err, guest.ErrNotFound):
		return http.StatusNotFound
	case errors.Is(err, guest.ErrConflict), errors.Is(err, guest.ErrNotRunning):
		return http.StatusConflict
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ENOTDIR):
		return http.StatusNotFound
	case errors.Is(err, unix.EROFS), errors.Is(err, fs.ErrPermission):
		return http.StatusForbidden
	}
	return http.StatusInternalServerError
}

// answerError writes an error in docker's shape. Where an answer has begun already, or the client has gone, it does nothing visible.
func answerError(w http.ResponseWriter, err error) {
	if errors.Is(err, context.Canceled) {
		return
	}
	code := status(err)
	if code == http.StatusNotModified {
		w.WriteHeader(code)
		return
	}
	_ = answer(w, code, common.ErrorResponse{Message: err.Error()})
}
