package vdocker

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// bulkFile is a new file that goes past the page cache.
func bulkFile(t *testing.T, b *bulk) *os.File {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "file"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if !b.open(f) {
		t.Fatalf("%s is on a file system without direct I/O: set TMPDIR to a directory on ext4 or xfs", f.Name())
	}
	return f
}

func reading(r io.Reader) func([]byte) error {
	return func(p []byte) error {
		_, err := io.ReadFull(r, p)
		return err
	}
}

// What is written comes back: with more holes in a piece than there are parts, and with an odd end.
func TestBulk(t *testing.T) {
	for name, held := range map[string]bool{"small": true, "large": false} {
		t.Run(name, func(t *testing.T) {
			if held {
				large.Lock()
				defer large.Unlock()
			}
			var b bulk
			defer b.close()
			bulkFile(t, &b)
			pieceSize := int(b.size)
			if want := map[bool]int{true: smallPiece, false: largePiece}[held]; pieceSize != want {
				t.Fatalf("pieces have %d bytes, want %d", pieceSize, want)
			}
			testBulk(t, &b, pieceSize)
		})
	}
	if !large.TryLock() {
		t.Fatal("nobody has large pieces any more, and nobody can")
	}
	large.Unlock()
}

func testBulk(t *testing.T, b *bulk, pieceSize int) {
	data := bytes.Repeat([]byte("0123456789abcdef"), 5*pieceSize/16)
	for at := 0; at < 2*pieceSize; at += 2 * hole {
		clear(data[at : at+hole])
	}
	clear(data[3*pieceSize : 4*pieceSize])
	for i, size := range []int{len(data), len(data) - hole, len(data) - 1, 4*pieceSize + 1, pieceSize - hole - 3} {
		f := bulkFile(t, b)
		b.aio.quick = i%2 == 0 // as in a container's own file system
		if err := b.write(f, int64(size), reading(bytes.NewReader(data))); err != nil {
			t.Fatalf("write %d bytes: %v", size, err)
		}
		if got, err := os.ReadFile(f.Name()); err != nil || !bytes.Equal(got, data[:size]) {
			t.Fatalf("%d bytes became %d others: %v", size, len(got), err)
		}
		var st unix.Stat_t
		if err := unix.Fstat(int(f.Fd()), &st); err != nil {
			t.Fatal(err)
		}
		if zeros := min(size, 2*pieceSize) / 2; int(st.Blocks)*512 > size-zeros+64<<10 {
			t.Errorf("a file of %d bytes with more than %d zeros takes %d", size, zeros, st.Blocks*512)
		}
		if !b.open(f) {
			t.Fatal("direct I/O has gone")
		}
		var back bytes.Buffer
		if err := b.read(f, int64(size), func(p []byte) error { back.Write(p); return nil }); err != nil {
			t.Fatalf("read %d bytes: %v", size, err)
		}
		if !bytes.Equal(back.Bytes(), data[:size]) {
			t.Errorf("%d bytes came back as others", size)
		}
	}
}

// A file that has shrunk ends in zeros.
func TestBulkShrunk(t *testing.T) {
	var b bulk
	defer b.close()
	f := bulkFile(t, &b)
	data := bytes.Repeat([]byte("x"), 2*largePiece+12345)
	if _, err := f.WriteAt(data[:2*largePiece], 0); err != nil {
		t.Fatal(err)
	}
	if err := f.Truncate(largePiece + 777); err != nil {
		t.Fatal(err)
	}
	clear(data[largePiece+777:])
	var back bytes.Buffer
	if err := b.read(f, int64(len(data)), func(p []byte) error { back.Write(p); return nil }); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(back.Bytes(), data) {
		t.Error("it does not end in zeros")
	}
}

// After an error, nothing is pending any more and the next file works.
func TestBulkError(t *testing.T) {
	var b bulk
	defer b.close()
	failed := errors.New("failed")
	f := bulkFile(t, &b)
	n := 0
	err := b.write(f, 8*largePiece, func(p []byte) error {
		if n++; n == 3 {
			return failed
		}
		p[0] = 1
		return nil
	})
	if !errors.Is(err, failed) {
		t.Errorf("write: %v", err)
	}
	if !b.open(f) {
		t.Fatal("direct I/O has gone")
	}
	if err := b.read(f, 8*largePiece, func([]byte) error { return failed }); !errors.Is(err, failed) {
		t.Errorf("read: %v", err)
	}

	// The disk refuses what is on its way already.
	var old unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_FSIZE, &old); err != nil {
		t.Fatal(err)
	}
	err = b.write(bulkFile(t, &b), 4*largePiece, func(p []byte) error {
		p[0] = 1
		return unix.Setrlimit(unix.RLIMIT_FSIZE, &unix.Rlimit{Cur: largePiece, Max: old.Max})
	})
	if rerr := unix.Setrlimit(unix.RLIMIT_FSIZE, &old); rerr != nil {
		t.Fatal(rerr)
	}
	if !errors.Is(err, unix.EFBIG) {
		t.Errorf("write beyond the limit: %v", err)
	}

	f = bulkFile(t, &b)
	if err := b.write(f, 2*largePiece, reading(bytes.NewReader(bytes.Repeat([]byte("y"), 2*largePiece)))); err != nil {
		t.Errorf("write after errors: %v", err)
	}
}
