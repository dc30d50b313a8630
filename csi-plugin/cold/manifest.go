package cold

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/cradlestack/cradlestack/csi-plugin/volume"
)

// chunkSize is what a volume is cut into: small enough that a database's scattered writes don't send all of it, large enough that a store has
// not too many objects.
const chunkSize = 1 << 20

// maxManifest bounds what a copy's list can have: a name for each chunk of 16 TiB.
const maxManifest = 16 << 20 * 80

// maxSealed bounds what a chunk's object can have, whatever of it does not become smaller, with what age adds.
const maxSealed = 2 * chunkSize

// errTooLarge is an object that is none that was saved.
var errTooLarge = errors.New("it has more")

// readMost reads what a store gives for an object.
func readMost(r io.Reader, most int64) ([]byte, error) {
	data, err := io.ReadAll(io.LimitReader(r, most+1))
	if err == nil && int64(len(data)) > most {
		return nil, fmt.Errorf("%w than %d bytes", errTooLarge, most)
	}
	return data, err
}

// A header is a list's first line.
type header struct {
	Version    int               `json:"version"` // 1
	Volume     string            `json:"volume"`
	Born       time.Time         `json:"born"`
	Taken      time.Time         `json:"taken"`
	Snapshot   string            `json:"snapshot"`
	Created    time.Time         `json:"created,omitzero"` // of the snapshot, where the copy has another time
	Former     []string          `json:"former,omitempty"` // Order's
	Size       int64             `json:"size"`
	Chunk      int64             `json:"chunk"` // chunkSize
	Content    volume.Content    `json:"content,omitempty"`
	Parameters map[string]string `json:"parameters"`
}

// A manifest is the list of a copy's chunks.
type manifest struct {
	header
	chunks map[int64]string // by number; those that are all zeros are left out
}

func (m *manifest) sorted() iter.Seq2[int64, string] {
	return func(yield func(int64, string) bool) {
		for _, i := range slices.Sorted(maps.Keys(m.chunks)) {
			if !yield(i, m.chunks[i]) {
				return
			}
		}
	}
}

// encode writes a list: the header, a line for each chunk, and a line that authenticates all before it.
func (m *manifest) encode(k *Key) []byte {
	first, err := json.Marshal(m.header)
	if err != nil {
		panic(err) // it holds nothing that could not be written
	}
	out := append(first, '\n')
	for i, name := range m.sorted() {
		out = strconv.AppendInt(out, i, 10)
		out = append(append(append(out, ' '), name...), '\n')
	}
	return append(append(append(out, "end "...), k.sum(listUse, out)...), '\n')
}

// decode reads what encode wrote, and refuses everything else.
func decode(data []byte, k *Key) (*manifest, error) {
	body, found := bytes.CutSuffix(data, []byte("\n"))
	at := bytes.LastIndexByte(body, '\n') + 1
	sum, end := bytes.CutPrefix(body[at:], []byte("end "))
	if !found || !end || !equal(string(sum), k.sum(listUse, data[:at])) {
		return nil, errors.New("its list is not what was saved")
	}
	m := &manifest{chunks: map[int64]string{}}
	lines := strings.Split(strings.TrimSuffix(string(data[:at]), "\n"), "\n")
	if err := json.Unmarshal([]byte(lines[0]), &m.header); err != nil {
		return nil, err
	}
	if m.Version != 1 || m.Chunk != chunkSize {
		return nil, fmt.Errorf("its version is %d with chunks of %d bytes; this program reads version 1 with %d", m.Version, m.Chunk, chunkSize)
	}
	for _, line := range lines[1:] {
		number, name, _ := strings.Cut(line, " ")
		i, err := strconv.ParseInt(number, 10, 64)
		raw, herr := hex.DecodeString(name)
		if err != nil || herr != nil || i < 0 || i*chunkSize >= m.Size || len(raw) != nameSize {
			return nil, fmt.Errorf("%.100q is no chunk", line)
		}
		m.chunks[i] = name
	}
	return m, nil
}

// length is how many bytes chunk i of a volume of a size has.
func length(i, size int64) int64 { return min(chunkSize, size-i*chunkSize) }

// readChunk reads chunk i. The last one has zeros behind the volume's end, as the volume will have should it grow.
func readChunk(r io.ReaderAt, i, size int64) ([]byte, error) {
	data := make([]byte, chunkSize)
	want := length(i, size)
	n, err := r.ReadAt(data[:want], i*chunkSize)
	if int64(n) == want {
		err = nil
	}
	return data, err
}

// chunksOf are the numbers of those that have something of the ranges, which are sorted, each once. Their names are not known yet.
func chunksOf(ranges []volume.Range, size int64) iter.Seq2[int64, string] {
	return func(yield func(int64, string) bool) {
		next := int64(0)
		for _, r := range ranges {
			for i := max(next, r.Start/chunkSize); i*chunkSize < min(r.End, size); i++ {
				if !yield(i, "") {
					return
				}
				next = i + 1
			}
		}
	}
}
