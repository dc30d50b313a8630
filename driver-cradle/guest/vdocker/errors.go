package vdocker

import (
	"context"
	"errors"
	"io/fs"
	"net/http"

	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/driver-cradle/guest"
	"github.com/cradlestack/cradlestack/internal/dockerhttp"
)

// status is docker's for an error.
func status(err error) int {
	var s dockerhttp.Error
	switch {
	case errors.As(err, &s):
		return s.Status
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
	dockerhttp.AnswerError(w, status(err), err)
}
