package s3

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// A guide tells a process of cradle-s3 which snapshots its directory has, and opens their roots for it. The process asks for each request anew, so that it
// has none open for longer.
type guide struct {
	l       net.Listener
	working sync.WaitGroup
}

const (
	guideSocket = "past.sock"
	guideTime   = time.Minute // for a question and its answer
	maxQuestion = 64 << 10
)

// A question is for one snapshot, or with "" for the names of all.
type question struct {
	Open string `json:"open"`
}

type told struct {
	Snapshots []toldOf `json:"snapshots,omitempty"`
	Missing   bool     `json:"missing,omitempty"` // there is none of that name
	Error     string   `json:"error,omitempty"`
}

type toldOf struct {
	Name  string    `json:"name"`
	Taken time.Time `json:"taken"`
}

func (g *granted) newGuide(run string) (*guide, error) {
	l, err := net.Listen("unix", filepath.Join(run, guideSocket))
	if err != nil {
		return nil, err
	}
	w := &guide{l: l}
	w.working.Go(func() {
		for {
			conn, err := l.Accept()
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err != nil {
				g.server.log.Warn("snapshots over S3", "grant", g.Key, "error", err)
				time.Sleep(100 * time.Millisecond)
				continue
			}
			w.working.Go(func() {
				defer conn.Close()
				if err := g.tell(conn.(*net.UnixConn)); err != nil {
					g.server.log.Warn("snapshots over S3", "grant", g.Key, "error", err)
				}
			})
		}
	})
	return w, nil
}

// close ends the guide, after what it is answering. A nil guide is none.
func (w *guide) close() {
	if w == nil {
		return
	}
	w.l.Close()
	w.working.Wait()
}

func (g *granted) tell(conn *net.UnixConn) error {
	if err := conn.SetDeadline(time.Now().Add(guideTime)); err != nil {
		return err
	}
	var q question
	if err := json.NewDecoder(io.LimitReader(conn, maxQuestion)).Decode(&q); err != nil {
		return fmt.Errorf("question: %w", err)
	}
	var t told
	var rights []byte
	if q.Open == "" {
		all, err := g.past.List()
		if err != nil {
			t.Error = "they can't be listed now"
		}
		for _, s := range all {
			t.Snapshots = append(t.Snapshots, toldOf{s.Name, s.Taken})
		}
	} else {
		root, leave, err := g.past.Enter(q.Open)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			t.Missing = true
		case err != nil:
			g.server.log.Warn("open a snapshot", "grant", g.Key, "snapshot", q.Open, "error", err)
			t.Error = "it can't be opened now"
		default:
			defer leave()
			d, err := root.Open(".")
			if err != nil {
				return err
			}
			defer d.Close()
			rights = unix.UnixRights(int(d.Fd()))
		}
	}
	data, err := json.Marshal(t)
	switch {
	case err != nil:
	case rights != nil:
		_, _, err = conn.WriteMsgUnix(data, rights, nil)
	default:
		_, err = conn.Write(data)
	}
	return err
}
