package guest

import "errors"

// Sentinels of this package; vdocker translates them to docker's status codes.
var (
	ErrNotFound   = errors.New("not found")
	ErrNotRunning = errors.New("not running")
	ErrConflict   = errors.New("conflict")
	ErrInvalid    = errors.New("invalid")
	// ErrNotModified: the container is in the state that was asked for already (docker's 304).
	ErrNotModified = errors.New("not modified")
)

// A stateError reads like docker's message and is one of the sentinels.
type stateError struct {
	kind error
	text string
}

func (e *stateError) Error() string { return e.text }
func (e *stateError) Unwrap() error { return e.kind }
