package volume

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// The errors that backends wrap. Whoever speaks to a caller translates them, once.
var (
	ErrNotFound    = errors.New("not found")
	ErrExists      = errors.New("exists, and is another")
	ErrInUse       = errors.New("in use")
	ErrBusy        = errors.New("another call is at work") // for longer than one waits for
	ErrNoSpace     = errors.New("no space")
	ErrRange       = errors.New("size out of range")
	ErrInvalid     = errors.New("invalid")
	ErrForeign     = errors.New("content is not the host's") // a volume whose content the host's kernel must not mount
	ErrHost        = errors.New("not on this host")          // which lacks what it takes
	ErrUnavailable = errors.New("storage unavailable")       // for the moment: the same call may succeed later
	ErrDeleted     = errors.New("it is being deleted")       // a volume, while it was read
)

// letGo is how long who copies a volume has to let go of it.
const letGo = 30 * time.Second

// Reclaiming returns a context for waiting until who copies a volume to cold storage lets go of it: its end is an ErrInUse.
func Reclaiming(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeoutCause(ctx, letGo, fmt.Errorf("%w: it is being copied to cold storage, and a process that does so has not let go of it within %v: delete it again when it is copied", ErrInUse, letGo))
}

// Invalid is an ErrInvalid that names what is wrong.
func Invalid(what, format string, args ...any) error {
	return &invalidError{what + ": " + fmt.Sprintf(format, args...)}
}

type invalidError struct{ message string }

func (e *invalidError) Error() string        { return e.message }
func (e *invalidError) Is(target error) bool { return target == ErrInvalid }
