package image

import (
	"context"
	"fmt"
)

// VerifyLayer reads one layer again and compares it with what was recorded when it was made.
func (s *Store) VerifyLayer(ctx context.Context, diffID string) error {
	l, err := s.readLayer(diffID)
	if err == nil {
		err = s.verifyLayer(ctx, l.Path)
	}
	if isNotExist(err) {
		err = fmt.Errorf("%w in the cache: pull the image again", ErrNotFound)
	}
	if err != nil {
		return fmt.Errorf("layer %s: %w", short(diffID), err)
	}
	return nil
}
