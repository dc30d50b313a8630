package main

import (
	"io"
	"os"
	"sync"

	"github.com/schollz/progressbar/v3"
	"golang.org/x/term"

	"github.com/cradlestack/cradlestack/driver-cradle/image"
	"github.com/cradlestack/cradlestack/driver-cradle/wire"
)

// A pullProgress draws one bar for all layers of a pull, on a terminal only.
type pullProgress struct {
	mu     sync.Mutex
	w      io.Writer // nil: draw nothing
	bar    *progressbar.ProgressBar
	layers map[string]image.Progress
}

func (c *cli) progress(quiet bool) *pullProgress {
	p := &pullProgress{layers: map[string]image.Progress{}}
	if !quiet && isTerminal(c.stderr) {
		p.w = c.stderr
	}
	return p
}

func isTerminal(w any) bool {
	f, ok := w.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}

func (p *pullProgress) update(l image.Progress) {
	if p.w == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.layers[l.Layer] = l
	if p.bar == nil {
		if l.Phase == image.Ready {
			return // in the cache
		}
		p.bar = progressbar.NewOptions64(1, progressbar.OptionSetWriter(p.w), progressbar.OptionShowBytes(true), progressbar.OptionClearOnFinish(),
			progressbar.OptionSetDescription("pulling"), progressbar.OptionSetWidth(30))
	}
	var done, total int64
	for _, l := range p.layers {
		if l.Phase == image.Downloading {
			done += l.Done
		} else if l.Phase == image.Converting || l.Phase == image.Ready {
			done += l.Total
		}
		total += l.Total
	}
	p.bar.ChangeMax64(max(total, 1))
	p.bar.Set64(min(done, total))
}

func (p *pullProgress) done() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.bar != nil {
		p.bar.Clear()
	}
}

// A fillProgress draws a bar for each volume that an image's content is copied into.
type fillProgress struct {
	w      io.Writer
	bar    *progressbar.ProgressBar
	volume string
}

// fillProgress is for a start; it is nil where nobody looks.
func (c *cli) fillProgress(quiet bool) *fillProgress {
	if quiet || !isTerminal(c.stderr) {
		return nil
	}
	return &fillProgress{w: c.stderr}
}

// tell is for pod.StartOptions.Progress, which costs nothing where it is nil.
func (p *fillProgress) tell() func(wire.Filling) {
	if p == nil {
		return nil
	}
	return p.update
}

func (p *fillProgress) update(f wire.Filling) {
	if p.bar == nil || p.volume != f.Volume {
		p.done()
		total := f.Total
		if total == 0 {
			total = -1 // unknown: a spinner
		}
		p.volume, p.bar = f.Volume, progressbar.NewOptions64(total, progressbar.OptionSetWriter(p.w), progressbar.OptionShowBytes(true),
			progressbar.OptionClearOnFinish(), progressbar.OptionSetDescription("copying the image's content into a volume"), progressbar.OptionSetWidth(30))
	}
	done := f.Done
	if f.Total > 0 {
		done = min(done, f.Total)
	}
	p.bar.Set64(done)
}

func (p *fillProgress) done() {
	if p != nil && p.bar != nil {
		p.bar.Clear()
		p.bar = nil
	}
}
