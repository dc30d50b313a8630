package image

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// VerifyLayer reads a layer's file in a cache, or the one that path links to, and compares it with what was recorded when it was made as diffID.
func VerifyLayer(ctx context.Context, path, diffID string) error {
	return checkLayer(ctx, path, diffID, true)
}

// CheckLayer is VerifyLayer for whoever is about to use the layer: it reads the file only where that was not found to be right before, or where the file system
// says that it has changed since. A file that is in no cache is its owner's business.
func CheckLayer(ctx context.Context, path, diffID string) error {
	return checkLayer(ctx, path, diffID, false)
}

func checkLayer(ctx context.Context, path, diffID string, read bool) error {
	file, err := filepath.EvalSymlinks(path)
	if err != nil {
		return fmt.Errorf("layer %s is missing (%w): pull the image again, or summon the pod again", short(diffID), err)
	}
	base, ok := strings.CutSuffix(file, ".ext4")
	id := "sha256:" + filepath.Base(base)
	switch {
	case !ok || !isDigest(id):
		return nil
	case id != diffID:
		return fmt.Errorf("layer %s: %w: %s is layer %s", short(diffID), ErrCorrupt, path, short(id))
	case !read && isChecked(base):
		return nil
	}
	now, err := identify(file)
	if err == nil {
		err = verifyLayer(ctx, file)
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err != nil {
		return fmt.Errorf("layer %s: %w: remove %s and pull the image again (kcradle images pull)", short(diffID), err, file)
	}
	noteChecked(base, now)
	return nil
}

// An identity is that of a file's content: nobody but root can write to a layer's file, and not even root can do so, by way of the file system, without
// changing one of these.
type identity struct {
	Dev     uint64 `json:"dev"`
	Inode   uint64 `json:"inode"`
	Size    int64  `json:"size"`
	Changed int64  `json:"changed"` // nanoseconds
}

func identify(path string) (identity, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return identity{}, &os.PathError{Op: "stat", Path: path, Err: err}
	}
	return identity{st.Dev, st.Ino, st.Size, st.Ctim.Nano()}, nil
}

// checkedExt is that of the identity of a layer's file whose digest was right.
const checkedExt = ".checked"

func isChecked(base string) bool {
	var then identity
	if readJSON(base+checkedExt, &then) != nil {
		return false
	}
	now, err := identify(base + ".ext4")
	return err == nil && now == then
}

// noteChecked keeps the identity of a layer's file whose content was right. Without it the next one reads the file again.
func noteChecked(base string, i identity) { _ = writeJSON(filepath.Dir(base), base+checkedExt, i) }
