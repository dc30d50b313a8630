package mount

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Patiently unmounts, and again while what is mounted is busy, for a moment: who has looked whether it answers, and was answered only now, has it open for as long.
func Patiently(ctx context.Context, unmount func() error) error {
	err := unmount()
	for pause := time.Millisecond; errors.Is(err, unix.EBUSY) && pause <= time.Second && ctx.Err() == nil; pause *= 2 {
		time.Sleep(pause)
		err = unmount()
	}
	return err
}

// unanswered are the paths that somebody asks, each with a channel that is closed when there is an answer.
var unanswered sync.Map

// Answered does something to what is mounted at a path, unless that does not answer for so long: then silent is the error, with the path. What was begun goes on until the mount
// answers, or ends; until then nothing else is done to the path here, or who asks again and again would end up with all the threads that a process can have.
func Answered(path string, patience time.Duration, silent error, do func() error) error {
	timeout := time.After(patience)
	for {
		done := make(chan struct{})
		earlier, busy := unanswered.LoadOrStore(path, done)
		if busy {
			select {
			case <-earlier.(chan struct{}):
				continue
			case <-timeout:
				return fmt.Errorf("%s: %w: what is mounted there does not answer", path, silent)
			}
		}
		var err error
		go func() {
			err = do()
			unanswered.Delete(path)
			close(done)
		}()
		select {
		case <-done:
			return err
		case <-timeout:
			return fmt.Errorf("%s: %w: what is mounted there does not answer", path, silent)
		}
	}
}
