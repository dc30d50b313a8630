package dir

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strings"
)

// noteFile is in each pool. Nothing of a volume's can have its name.
const noteFile = "note:"

// Note is volume.Noter's.
func (b *Backend) Note(context.Context) (string, error) {
	var missing error
	for _, p := range b.pools {
		if err := p.there(); err != nil {
			missing = errors.Join(missing, err)
			continue
		}
		if line, err := p.note(); err != nil || line != "" {
			return line, err
		}
	}
	return "", missing
}

func (p *pool) note() (string, error) {
	f, err := p.root.Open(noteFile)
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("pool %s: %w", p.name, err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxRecord))
	return strings.TrimSuffix(string(data), "\n"), err
}

// SetNote is volume.Noter's. It is in all pools: what one that is not there would have said is known then.
func (b *Backend) SetNote(_ context.Context, line string) error {
	for _, p := range b.pools {
		err := p.there()
		if err == nil {
			err = storageError(p.replace(noteFile, []byte(line+"\n")))
		}
		if err != nil {
			return fmt.Errorf("pool %s: %w", p.name, err)
		}
	}
	return nil
}
