package vmm

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// A DiskError is the first failure of a disk's image or device on the host. The guest's programs get it, and all that follow, as errors
// of their own reads and writes.
type DiskError struct {
	LUN       int       `json:"lun"`
	Key       string    `json:"key"`
	Path      string    `json:"path"`
	Mount     string    `json:"mount,omitempty"` // where the host's file system with the image is mounted
	Operation string    `json:"operation"`       // read, write
	NoSpace   bool      `json:"noSpace,omitempty"`
	Reason    string    `json:"reason"`
	At        time.Time `json:"at"`
}

func (e *DiskError) Error() string {
	text := fmt.Sprintf("disk %s: %s %s: %s", e.Key, e.Operation, e.Path, e.Reason)
	if e.NoSpace {
		return text + fmt.Sprintf(": the host's file system %s is full: free space there", e.Mount)
	}
	return text
}

// diskFailed takes note of QEMU's BLOCK_IO_ERROR, once for each disk.
func (m *Machine) diskFailed(data json.RawMessage) {
	var e struct {
		Node      string `json:"node-name"`
		Operation string `json:"operation"`
		Reason    string `json:"reason"`
	}
	if json.Unmarshal(data, &e) != nil {
		return
	}
	number, ok := strings.CutPrefix(e.Node, diskPrefix)
	lun, err := strconv.Atoi(number)
	if !ok || err != nil {
		return
	}
	failed := m.noteDiskError(&DiskError{
		LUN: lun, Operation: e.Operation, NoSpace: e.Reason == noSpace, Reason: printable(e.Reason), At: time.Now(),
	})
	if failed == nil {
		return
	}
	m.log.Warn("a disk of the machine fails", "error", failed)
	if err := m.save(); err != nil {
		m.log.Debug("note the disk's error", "error", err) // the run directory may be on the full disk as well
	}
}

// noSpace is strerror(ENOSPC), in QEMU's locale C. The event's own member for it is there only where the machine would have been stopped.
const noSpace = "No space left on device"

// noteDiskError completes e and adds it to Info, or returns nil if the disk has failed before or is gone.
func (m *Machine) noteDiskError(e *DiskError) *DiskError {
	m.mu.Lock()
	defer m.mu.Unlock()
	d, ok := m.state.Disks[e.LUN]
	if !ok {
		return nil
	}
	errs := m.state.Info.DiskErrors
	for _, known := range errs {
		if known.LUN == e.LUN {
			return nil
		}
	}
	e.Key, e.Path, e.Mount = d.Key, d.Path, mountOf(d.Path)
	m.state.Info.DiskErrors = append(errs[:len(errs):len(errs)], e) // Info has handed out the old slice
	return e
}

// forgetDiskError is for a disk that is unplugged. m.mu is held.
func (m *Machine) forgetDiskError(lun int) {
	var kept []*DiskError
	for _, e := range m.state.Info.DiskErrors {
		if e.LUN != lun {
			kept = append(kept, e)
		}
	}
	m.state.Info.DiskErrors = kept
}

// mountOf finds where the file system that a file is on is mounted, "" if that can't be told.
func mountOf(path string) string {
	var st unix.Statx_t
	if unix.Statx(unix.AT_FDCWD, path, 0, unix.STATX_MNT_ID, &st) != nil || st.Mask&unix.STATX_MNT_ID == 0 {
		return ""
	}
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return ""
	}
	defer f.Close()
	id := strconv.FormatUint(st.Mnt_id, 10)
	for s := bufio.NewScanner(f); s.Scan(); {
		// id parent major:minor root mountpoint … (proc(5))
		if fields := strings.Fields(s.Text()); len(fields) > 4 && fields[0] == id {
			return unescapeMount.Replace(fields[4])
		}
	}
	return ""
}

// unescapeMount undoes what the kernel does to paths in mountinfo.
var unescapeMount = strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)
