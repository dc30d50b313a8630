package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"
)

// An audit is a file with a line for each thing that somebody has done to a volume's snapshots and a namespace's grants. Each is on stable storage before the caller
// gets an answer. What somebody was not let do is in a file of its own: anybody can try, and nobody is to push out by that what was done.
type audit struct {
	path    string
	refused string
	log     *slog.Logger
	mu      sync.Mutex
}

// maxAudit is the size at which the file is put aside, and the former one removed.
const maxAudit = 16 << 20

func newAudit(state string, log *slog.Logger) *audit {
	return &audit{path: filepath.Join(state, "audit.log"), refused: filepath.Join(state, "refused.log"), log: log}
}

// maxTold bounds what a line has of each text that a caller may have made up. A path may be as long as the kernel lets it.
const maxTold = 4 << 10

func bounded(text string) string {
	if len(text) > maxTold {
		return strings.ToValidUTF8(text[:maxTold], "") + "…"
	}
	return text
}

// An event is one line.
type event struct {
	Time      time.Time `json:"time"`
	What      string    `json:"what"`
	Who       string    `json:"who"`
	Namespace string    `json:"namespace,omitempty"` // Nomad's, where Who is one of its users
	Volume    string    `json:"volume"`
	Snapshot  string    `json:"snapshot,omitempty"`
	Path      string    `json:"path,omitempty"`
	Schedule  string    `json:"schedule,omitempty"`
	Undo      string    `json:"undo,omitempty"`
	Grant     string    `json:"grant,omitempty"` // its name in the namespace
	Error     string    `json:"error,omitempty"`
}

// write adds a line, with how it came out. That it can't is told in the log: what has been done is done.
func (a *audit) write(e event, outcome error) {
	if err := a.add(a.path, e, outcome); err != nil {
		a.log.Error("what was done is not in the audit log", "event", fmt.Sprintf("%+v", e), "outcome", outcome, "error", err)
	}
}

// refuse adds a line about what somebody was not let do.
func (a *audit) refuse(e event, why error) {
	if err := a.add(a.refused, e, why); err != nil {
		a.log.Error("what was refused is not in the log of that", "event", fmt.Sprintf("%+v", e), "why", why, "error", err)
	}
}

func (a *audit) add(path string, e event, outcome error) error {
	e.Time = time.Now().UTC()
	if outcome != nil {
		e.Error = outcome.Error()
	}
	for _, text := range []*string{&e.Who, &e.Namespace, &e.Volume, &e.Snapshot, &e.Path, &e.Schedule, &e.Undo, &e.Grant, &e.Error} {
		*text = bounded(*text)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if fi, err := os.Stat(path); err == nil && fi.Size() > maxAudit {
		if err := os.Rename(path, path+".old"); err != nil {
			return err
		}
	} else if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	line, err := json.Marshal(e)
	if err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(append(line, '\n'))
	if path == a.path {
		err = errors.Join(err, f.Sync())
	}
	return errors.Join(err, f.Close())
}
