package pod

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net/http"
	"net/url"

	"github.com/cradlestack/cradlestack/driver-cradle/wire"
)

// An Output is what a container puts out, piece by piece.
type Output struct {
	*wire.PieceReader
	body io.Closer
}

// Output reads a container's output behind a mark, what is there and what comes, until the container has ended for good. While somebody
// reads, nothing is lost: the container waits for a reader that is slower than its whole log. It lasts until ctx ends.
func (g *Guest) Output(ctx context.Context, container string, after wire.Mark) (*Output, error) {
	q := url.Values{"container": {container}, "after": {after.String()}}
	resp, err := g.Get(ctx, http.MethodGet, wire.PathOutput, q, nil) //nolint:bodyclose // the Output closes it
	if err != nil {
		return nil, fmt.Errorf("output of container %s: %w", container, err)
	}
	return &Output{wire.NewPieceReader(bufio.NewReaderSize(resp.Body, 64<<10)), resp.Body}, nil
}

// Close ends it.
func (o *Output) Close() error { return o.body.Close() }
