package driver

import (
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// aLogmon is a process that looks like Nomad's, with a log file open.
func aLogmon(t *testing.T, dir, file, command string) (gone <-chan struct{}) {
	t.Helper()
	log, err := os.OpenFile(filepath.Join(dir, file), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	if err := unix.Mkfifo(filepath.Join(dir, command), 0o600); err != nil && !errors.Is(err, fs.ErrExist) {
		t.Fatal(err)
	}
	cmd := exec.Command("cat", command) // opens a named pipe, and waits for a writer
	cmd.Dir, cmd.ExtraFiles = dir, []*os.File{log}
	_, gone = launch(t, cmd)
	time.Sleep(30 * time.Millisecond) // processes are told apart by hundredths of a second
	return gone
}

func TestEndStrayReaders(t *testing.T) {
	dir := t.TempDir()
	first, second := aLogmon(t, dir, "web.stdout.0", "logmon"), aLogmon(t, dir, "web.stdout.1", "logmon")
	others := []<-chan struct{}{
		aLogmon(t, dir, "web.stdout.1", "logmon"),         // the client's
		aLogmon(t, dir, "web.stdout.0", "agent"),          // who reads the log for a user
		aLogmon(t, dir, "web.stderr.0", "logmon"),         // no such process
		aLogmon(t, dir, "web2.stdout.0", "logmon"),        // another task's
		aLogmon(t, t.TempDir(), "web.stdout.0", "logmon"), // another allocation's
	}
	for range 2 { // the second time there is nothing to do
		if err := endStrayReaders(t.Context(), filepath.Join(dir, ".web.stdout.fifo")); err != nil {
			t.Fatal(err)
		}
		<-first
		<-second
	}
	if err := endStrayReaders(t.Context(), os.DevNull); err != nil {
		t.Error(err)
	}
	for i, other := range others {
		select {
		case <-other:
			t.Errorf("process %d was ended", i)
		default:
		}
	}
}
