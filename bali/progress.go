package main

import (
	"io"
	"time"

	"github.com/schollz/progressbar/v3"
)

// bar counts what is written to it: a progress bar on a terminal, nothing
// anywhere else. size -1 is unknown.
func (c *cli) bar(size int64, what string) io.WriteCloser {
	if !c.terminal() {
		return silent{}
	}
	return progressbar.NewOptions64(size,
		progressbar.OptionSetWriter(c.stderr), progressbar.OptionSetDescription(what),
		progressbar.OptionShowBytes(true), progressbar.OptionThrottle(100*time.Millisecond),
		progressbar.OptionClearOnFinish(), progressbar.OptionUseANSICodes(true))
}

type silent struct{}

func (silent) Write(p []byte) (int, error) { return len(p), nil }
func (silent) Close() error                { return nil }
