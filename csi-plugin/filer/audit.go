package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"
)

// An audit is a file with a line for each thing that somebody has done to a volume's snapshots and a namespace's grants, or was not let do. Each is on stable storage before the caller
// gets an answer.
type audit struct {
	path string
	log  *slog.Logger
	mu   sync.Mutex
}

// maxAudit is the size at which the file is put aside, and the former one removed.
const maxAudit = 16 << 20

func newAudit(state string, log *slog.Logger) *audit {
	return &audit{path: filepath.Join(state, "audit.log"), log: log}
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
	Undo      string    `json:"undo,omitempty"`
	Grant     string    `json:"grant,omitempty"` // its name in the namespace
	Error     string    `json:"error,omitempty"`
}

// write adds a line, with how it came out. That it can't is told in the log: what has been done is done.
func (a *audit) write(e event, outcome error) {
	e.Time = time.Now().UTC()
	if outcome != nil {
		e.Error = outcome.Error()
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if err := a.add(e); err != nil {
		a.log.Error("what was done is not in the audit log", "event", fmt.Sprintf("%+v", e), "error", err)
	}
}

func (a *audit) add(e event) error {
	if fi, err := os.Stat(a.path); err == nil && fi.Size() > maxAudit {
		if err := os.Rename(a.path, a.path+".old"); err != nil {
			return err
		}
	} else if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	line, err := json.Marshal(e)
	if err != nil {
		return err
	}
	f, err := os.OpenFile(a.path, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(append(line, '\n'))
	return errors.Join(err, f.Sync(), f.Close())
}
