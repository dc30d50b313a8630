package seal

import (
	"archive/tar"
	"crypto/sha512"
	"fmt"
	"hash"
	"io"
	"runtime"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/klauspost/pgzip"
	"golang.org/x/crypto/ssh"
)

// gzipBlock is what one compressor gets. It decides where deflate blocks end,
// so it is part of what makes the same input give the same bytes: it never
// follows from the machine.
const gzipBlock = 1 << 20

// Writer makes an image. The same entries give the same bytes on every machine.
type Writer struct {
	out     io.Writer
	hash    hash.Hash
	comp    Compression
	payload io.WriteCloser
	tar     *tar.Writer
	guard   *guard
	tree    *Tree
	verity  Verity
	open    *Entry // the File being written
	left    int64
	// Progress, if set, gets the content of every file too.
	Progress io.Writer
}

// NewWriter starts an image with its description. mtime is the description's
// time stamp, seconds since 1970.
func NewWriter(out io.Writer, image *Image, comp Compression, mtime int64) (*Writer, error) {
	if err := image.Validate(); err != nil {
		return nil, err
	}
	description, err := image.marshal()
	if err != nil {
		return nil, err
	}
	w := &Writer{out: out, hash: sha512.New(), comp: comp, guard: newGuard(maxEntriesCeiling), tree: NewTree()}
	both := io.MultiWriter(out, w.hash)
	switch comp {
	case Gzip:
		z := pgzip.NewWriter(both)
		z.ModTime, z.OS = time.Unix(0, 0), 255
		if err := z.SetConcurrency(gzipBlock, runtime.GOMAXPROCS(0)); err != nil {
			return nil, err
		}
		w.payload = z
	case Zstd:
		if w.payload, err = zstd.NewWriter(both, zstd.WithEncoderLevel(zstd.SpeedDefault), zstd.WithWindowSize(zstdWindow)); err != nil {
			return nil, err
		}
	}
	w.tar = tar.NewWriter(w.payload)
	if err := w.WriteEntry(&Entry{Path: ImageDir, Kind: Dir, Mode: 0o755, ModTime: mtime}); err != nil {
		return nil, err
	}
	if err := w.WriteEntry(&Entry{Path: ImagePath, Kind: File, Mode: 0o644, ModTime: mtime, Size: int64(len(description))}); err != nil {
		return nil, err
	}
	_, err = w.Write(description)
	return w, err
}

// WriteEntry starts the next entry. Entries come in CompareDepthFirst's order,
// parents included; the content of a File follows by Write.
func (w *Writer) WriteEntry(e *Entry) error {
	if err := w.finish(); err != nil {
		return err
	}
	if err := e.check(); err != nil {
		return err
	}
	if err := w.guard.admit(e); err != nil {
		return err
	}
	if err := w.tar.WriteHeader(e.header()); err != nil {
		return fmt.Errorf("write %s: %w", e.Path, err)
	}
	if e.Kind != File {
		w.tree.Add(e, [32]byte{})
		return nil
	}
	w.open, w.left = e, e.Size
	w.verity.Reset()
	return nil
}

// Write adds content to the File that WriteEntry began.
func (w *Writer) Write(p []byte) (int, error) {
	n, err := w.tar.Write(p)
	_, _ = w.verity.Write(p[:n]) // never fails
	w.left -= int64(n)
	if w.Progress != nil {
		_, _ = w.Progress.Write(p[:n])
	}
	return n, err
}

func (w *Writer) finish() error {
	if w.open == nil {
		return nil
	}
	if w.left != 0 {
		return fmt.Errorf("write %s: %d bytes are missing: the file changed while it was read", w.open.Path, w.left)
	}
	w.tree.Add(w.open, w.verity.Sum())
	w.open = nil
	return nil
}

// Seal ends the payload and signs it. With a nil signer the file stays
// unsigned, and only bali run --insecure takes it.
func (w *Writer) Seal(signer ssh.Signer) (*Signature, error) {
	if err := w.finish(); err != nil {
		return nil, err
	}
	if err := w.tar.Close(); err != nil {
		return nil, err
	}
	if err := w.payload.Close(); err != nil {
		return nil, err
	}
	s := &Signature{Tree: w.tree.Sum()}
	w.hash.Sum(s.Payload[:0])
	if signer == nil {
		return s, nil
	}
	if err := s.sign(signer); err != nil {
		return nil, err
	}
	_, err := w.out.Write(s.trailer(w.comp))
	return s, err
}
