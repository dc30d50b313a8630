package guest

import (
	"net/http"

	"github.com/cradlestack/cradlestack/driver-cradle/guest/stdio"
	"github.com/cradlestack/cradlestack/driver-cradle/wire"
)

// output answers wire.PathOutput.
func (p *Pod) output(w http.ResponseWriter, r *http.Request) {
	c, err := p.Lookup(r.FormValue("container"))
	if err != nil {
		answer(w, nil, err)
		return
	}
	after, err := wire.ParseMark(r.FormValue("after"))
	if err != nil {
		answer(w, nil, &stateError{ErrInvalid, "after: " + err.Error()})
		return
	}
	ctx := r.Context()
	ended := make(chan struct{})
	watched := make(chan struct{})
	wait := c.Awaiting(WaitRemoved)
	go func() {
		defer close(watched)
		if _, _, err := wait(ctx); err == nil {
			close(ended)
		}
	}()
	defer func() { <-watched }() // the container has ended, or ctx does with this request
	w.Header().Set("Content-Type", "application/octet-stream")
	out := http.NewResponseController(w)
	if err := out.Flush(); err != nil {
		return
	}
	var buf []byte
	give := func(stream stdio.Stream, next stdio.Mark, data []byte) error {
		buf = wire.AppendPiece(buf[:0], wire.Piece{Stream: byte(stream), Next: wire.Mark(next), Data: data})
		_, err := w.Write(buf)
		return err
	}
	if err := c.IO().Transcript(ctx, stdio.Mark(after), ended, give, out.Flush); err != nil {
		panic(http.ErrAbortHandler) // what has been sent is not all: the host must see that
	}
}
