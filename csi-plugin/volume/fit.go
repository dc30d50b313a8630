package volume

import (
	"fmt"

	"github.com/cradlestack/cradlestack/spec"
)

// Fits says, with an ErrExists, why a volume is not what a request asks for.
func (v Volume) Fits(r Request) error {
	if r.Pool == "" {
		r.Pool = v.Pool
	}
	switch {
	case v.Parameters != r.Parameters:
		return fmt.Errorf("volume %s %w: it has %v, and %v is asked for", v.ID, ErrExists, v.Map(), r.Map())
	case v.Origin != r.Origin:
		return fmt.Errorf("volume %s %w: it was made of %s, and %s is asked for", v.ID, ErrExists, v.Origin, r.Origin)
	case v.Generation != r.Generation:
		return fmt.Errorf("volume %s %w: it is of generation %d, and %d is asked for", v.ID, ErrExists, v.Generation, r.Generation)
	case v.Size < r.Size || r.Limit > 0 && (v.Size > r.Limit || v.Size == 0):
		return fmt.Errorf("volume %s %w: it has %v, and %s is asked for", v.ID, ErrExists, spec.Bytes(v.Size), sizes(r.Size, r.Limit))
	}
	return nil
}

// String names the origin for a message.
func (o Origin) String() string {
	switch {
	case o.Volume != "":
		return "volume " + o.Volume
	case o.Snapshot != (SnapshotID{}):
		return "snapshot " + o.Snapshot.String()
	case o.Copy != "":
		return "copy " + o.Copy
	}
	return "nothing"
}

func sizes(least, most int64) string {
	switch {
	case most == 0:
		return fmt.Sprintf("at least %v", spec.Bytes(least))
	case least == 0:
		return fmt.Sprintf("at most %v", spec.Bytes(most))
	}
	return fmt.Sprintf("%v to %v", spec.Bytes(least), spec.Bytes(most))
}

// Choose is the size of a new volume: what the request asks for, else fallback, as a multiple of step that is at least least.
// ErrRange is a request without such a size.
func (r Request) Choose(fallback, least, step int64) (int64, error) {
	size := r.Size
	if size == 0 {
		if size = fallback; r.Limit > 0 {
			size = min(size, r.Limit/step*step)
		}
	}
	size = max(size, least)
	if size > MaxSize {
		return 0, fmt.Errorf("volume %s: %w: %v is more than %v", r.Name, ErrRange, spec.Bytes(size), spec.Bytes(MaxSize))
	}
	size = (size + step - 1) / step * step
	if r.Limit > 0 && size > r.Limit {
		return 0, fmt.Errorf("volume %s: %w: %s is asked for, and it would have %v (at least %v, in steps of %v)", r.Name, ErrRange, sizes(r.Size, r.Limit), spec.Bytes(size), spec.Bytes(least), spec.Bytes(step))
	}
	return size, nil
}

// MaxSize of a volume.
const MaxSize = 1 << 50
