package nfs

import (
	"bytes"
	"crypto/sha256"
	"encoding/gob"
	"io"
	"net/netip"
	"sync"
)

// replies are the last ones of an export to calls that can't be done twice. A client whose connection has ended before it got a reply makes the same call
// again, on another one, and is answered by what it would have got: it is not told that what it has made is there already.
type replies struct {
	mu    sync.Mutex
	of    map[callID]*replied
	order []callID // oldest first
}

// maxReplied of one export are kept.
const maxReplied = 512

// A callID is a client's address and all of a call, whose number no other call of the client has for a long time.
type callID [sha256.Size]byte

// A replied call has its reply once done is closed; none where it was not done.
type replied struct {
	done  chan struct{}
	reply []byte
}

func newReplies() *replies { return &replies{of: map[callID]*replied{}} }

func identify(client netip.Addr, record []byte) (id callID) {
	h := sha256.New()
	at := client.As16()
	h.Write(at[:])
	h.Write(record)
	h.Sum(id[:0])
	return id
}

// once says whether a call can't be done twice.
func (c call) once() bool {
	return c.program == programNFS && c.version == version3 && c.proc < uint32(len(nfsProcedures)) && nfsProcedures[c.proc].once
}

// begin says whether a call is new, and is to be done and ended.
func (r *replies) begin(id callID) (of *replied, isNew bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if of = r.of[id]; of != nil {
		return of, false
	}
	of = &replied{done: make(chan struct{})}
	r.of[id] = of
	r.order = append(r.order, id)
	if len(r.order) > maxReplied {
		delete(r.of, r.order[0])
		r.order = r.order[1:]
	}
	return of, true
}

// end keeps the reply; without one the call may be done yet.
func (r *replies) end(id callID, of *replied, reply []byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	of.reply = bytes.Clone(reply)
	if reply == nil && r.of[id] == of {
		delete(r.of, id)
	}
	close(of.done)
}

// A savedReply is one that the next process knows.
type savedReply struct {
	Path  string // of the export
	Call  callID
	Reply []byte
}

// Save writes the replies that the next process is to know, once Serve has returned.
func (s *Server) Save(w io.Writer) error {
	s.mu.RLock()
	defer s.mu.RUnlock()
	var all []savedReply
	for path, r := range s.replied {
		for _, id := range r.order {
			if of := r.of[id]; of != nil && of.reply != nil {
				all = append(all, savedReply{path, id, of.reply})
			}
		}
	}
	return gob.NewEncoder(w).Encode(all)
}

// Load reads what Save has written, before anything is exported.
func (s *Server) Load(r io.Reader) error {
	var all []savedReply
	if err := gob.NewDecoder(r).Decode(&all); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, saved := range all {
		of := s.replied[saved.Path]
		if of == nil {
			of = newReplies()
			s.replied[saved.Path] = of
		}
		one, _ := of.begin(saved.Call)
		of.end(saved.Call, one, saved.Reply)
	}
	return nil
}
