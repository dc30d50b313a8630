package vmm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// maxLUN is virtio-scsi's last logical unit (virtio-v1.2 §5.6.6.1 has 14 bits).
const maxLUN = 16383

// diskPrefix and the LUN are the name of a disk's block node.
const diskPrefix = "disk"

func diskNode(lun int) string   { return fmt.Sprintf("%s%d", diskPrefix, lun) }
func diskDevice(lun int) string { return fmt.Sprintf("lun%d", lun) }

// AddDisk plugs a disk in and returns its LUN.
func (m *Machine) AddDisk(ctx context.Context, d Disk) (lun int, err error) {
	for {
		lun, err = m.addDisk(ctx, d)
		if !errors.Is(err, errTaken) {
			return lun, err
		}
	}
}

// addDisk is AddDisk at the first place that this process knows to be free.
func (m *Machine) addDisk(ctx context.Context, d Disk) (lun int, err error) {
	m.mu.Lock()
	for lun = m.state.Places; lun <= maxLUN; lun++ {
		if _, used := m.state.Disks[lun]; !used {
			break
		}
	}
	if lun > maxLUN {
		m.mu.Unlock()
		return 0, fmt.Errorf("attach disk %s: the machine has %d disks already", d.Key, maxLUN+1)
	}
	m.state.Disks[lun] = d // taken
	m.mu.Unlock()
	if err := m.plug(ctx, lun, d); err != nil {
		m.mu.Lock()
		delete(m.state.Disks, lun)
		if errors.Is(err, errTaken) {
			m.state.Disks[lun] = Disk{Internal: true}
		}
		m.mu.Unlock()
		return 0, err
	}
	return lun, m.save()
}

// save writes the state for whoever takes the machine up.
func (m *Machine) save() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.state.write(m.dir)
}

// LUN tells where the guest finds a disk.
func (m *Machine) LUN(key string) (lun int, ok bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for lun, d := range m.state.Disks {
		if d.Key == key {
			return lun, true
		}
	}
	return 0, false
}

// A place is one that the machine has for a disk from its beginning on.
type place struct {
	readOnly bool
	disk     *Disk // nil: empty, as all are in a template
	protocol protocol
	number   int // of its file in the QEMU process
}

// emptySize is what an empty place, and so the place of any internal disk, seems to hold. It is more than any of them has, and little enough
// for a file system's arithmetic.
const emptySize = 1 << 50

// placesNeeded is how many places the template for c's internal disks has: one for the first that is written to, and for those that are
// only read a power of two less one, so that few templates serve pods with any number of layers.
func (c *Config) placesNeeded() int {
	reads, writes := 0, 0
	for _, d := range c.Disks {
		switch {
		case !d.Internal:
		case d.ReadOnly:
			reads++
		default:
			writes++
		}
	}
	if reads+writes == 0 {
		return 0
	}
	n := 1
	for n <= min(reads, maxPlaces-1) {
		n *= 2
	}
	return n
}

// maxPlaces of a template; an image with more layers than that is rare.
const maxPlaces = 64

// emptyPlaces are those of a template: one for a disk that is written to, then those for disks that are only read.
func emptyPlaces(n int) []place {
	places := make([]place, n)
	for i := range places {
		places[i].readOnly = i > 0
	}
	return places
}

// arrange gives the disks their places; those that are plugged in later get the LUNs behind them. A machine that boots finds all at once.
func (c *Config) arrange(fromTemplate bool) (places []place, later []Disk) {
	if !fromTemplate {
		for i := range c.Disks {
			places = append(places, place{readOnly: c.Disks[i].ReadOnly, disk: &c.Disks[i]})
		}
		return places, nil
	}
	places = emptyPlaces(c.placesNeeded())
	for i := range c.Disks {
		d := &c.Disks[i]
		at := slices.IndexFunc(places, func(p place) bool { return d.Internal && p.disk == nil && p.readOnly == d.ReadOnly })
		if at < 0 {
			later = append(later, *d)
			continue
		}
		places[at].disk = d
	}
	return places, later
}

// arguments are QEMU's for the place with this LUN.
func (p *place) arguments(lun int) (args []string) {
	node := map[string]any{"driver": "null-co", "node-name": diskNode(lun), "read-only": p.readOnly, "size": int64(emptySize), "read-zeroes": true}
	if p.disk != nil {
		args = []string{"-add-fd", fmt.Sprintf("fd=%d,set=%d", p.number, lun)}
		node = blockNode(lun, p.protocol, p.readOnly)
	}
	return append(args, "-blockdev", option(node), "-device", option(scsiDisk(lun)))
}

// option writes an object of QMP as an option's value.
func option(v map[string]any) string {
	text, err := json.Marshal(v)
	if err != nil {
		panic(err) // maps of strings, numbers and truths
	}
	return string(text)
}

// A protocol is how QEMU reads and writes a disk's file.
type protocol struct {
	driver  string
	ioUring bool // not by threads
}

// blockNode reads and writes the file in the set with the LUN's number.
func blockNode(lun int, p protocol, readOnly bool) map[string]any {
	file := map[string]any{
		"driver": p.driver, "filename": fmt.Sprintf("/dev/fdset/%d", lun), "node-name": diskNode(lun) + "-file",
		"read-only": readOnly, "auto-read-only": false, "discard": "unmap",
	}
	if p.ioUring {
		file["aio"] = "io_uring"
	}
	return map[string]any{
		"driver": "raw", "node-name": diskNode(lun), "read-only": readOnly, "discard": "unmap", "file": file,
	}
}

// scsiDisk is the device that the guest sees.
func scsiDisk(lun int) map[string]any {
	return map[string]any{
		"driver": "scsi-hd", "id": diskDevice(lun), "drive": diskNode(lun), "bus": "scsi.0", "scsi-id": 0, "lun": lun,
		"rotation_rate": 1, // as SSDs say
		// By default a write beyond the host's disk space stops the machine, without a word to anybody.
		"werror": "report", "rerror": "report",
	}
}

// open opens a disk's file to be passed to QEMU, which sees no path of the host.
func (d *Disk) open(ioUring bool) (f *os.File, p protocol, err error) {
	flags := os.O_RDWR
	if d.ReadOnly {
		flags = os.O_RDONLY
	}
	if f, err = os.OpenFile(d.Path, flags|unix.O_NONBLOCK, 0); err != nil {
		return nil, protocol{}, err
	}
	if p.driver, err = blockDriver(f); err == nil && ioUring && p.driver == "file" {
		p.ioUring, err = answersAtOnce(f)
	}
	if err != nil {
		return nil, protocol{}, errors.Join(err, f.Close())
	}
	return f, p, nil
}

// plug plugs a disk into a machine that is there.
func (m *Machine) plug(ctx context.Context, lun int, d Disk) (err error) {
	m.mu.Lock()
	ioUring := m.state.IOUring
	m.mu.Unlock()
	f, p, err := d.open(ioUring)
	if err != nil {
		return fmt.Errorf("attach disk %s: %w", d.Key, err)
	}
	defer f.Close()
	if err := m.monitor.call(ctx, "add-fd", map[string]any{"fdset-id": lun}, nil, f); err != nil {
		return fmt.Errorf("attach disk %s: %w", d.Key, err)
	}
	// QEMU drops a set whose files nobody has open, so failing below needs to undo only what it did.
	if err := m.addNode(ctx, lun, p, d.ReadOnly); err != nil && strings.Contains(err.Error(), "uplicate node") {
		return errTaken
	} else if err != nil {
		_ = m.QMP(ctx, "remove-fd", map[string]any{"fdset-id": lun}, nil)
		return fmt.Errorf("attach disk %s: %w", d.Key, inUse(err, d))
	}
	if err := m.QMP(ctx, "device_add", scsiDisk(lun), nil); err != nil {
		_ = m.QMP(ctx, "blockdev-del", map[string]any{"node-name": diskNode(lun)}, nil)
		_ = m.QMP(ctx, "remove-fd", map[string]any{"fdset-id": lun}, nil)
		return fmt.Errorf("attach disk %s: %w", d.Key, inUse(err, d))
	}
	m.mu.Lock()
	m.state.Disks[lun] = d
	m.mu.Unlock()
	return nil
}

// addNode adds a disk's block node, with threads where QEMU may not use io_uring.
func (m *Machine) addNode(ctx context.Context, lun int, p protocol, readOnly bool) error {
	err := m.QMP(ctx, "blockdev-add", blockNode(lun, p, readOnly), nil)
	if err == nil || !p.ioUring || !ioUringRefused(err.Error()) {
		return err
	}
	m.log.Warn("disks are served by threads", "error", err)
	m.mu.Lock()
	m.state.IOUring = false
	m.mu.Unlock()
	return m.QMP(ctx, "blockdev-add", blockNode(lun, protocol{driver: p.driver}, readOnly), nil)
}

// errTaken is that QEMU has a disk at a place that is free as far as this process knows: one that was killed has plugged it in, before it could note that.
var errTaken = errors.New("the place has a disk already")

// ErrDiskInUse is part of the error of attaching an image that another machine writes, or would be written under another's eyes.
var ErrDiskInUse = errors.New("another machine or program uses it")

// inUse recognises QEMU's failure to lock an image.
func inUse(err error, d Disk) error {
	if strings.Contains(err.Error(), " lock") {
		return fmt.Errorf("%s: %w: %w", d.Path, ErrDiskInUse, err)
	}
	return err
}

// lockedSet is in QEMU's message about an image that it could not lock, which names the set of files.
var lockedSet = regexp.MustCompile(`lock\n.*\[/dev/fdset/([0-9]+)\]`)

// contended finds the disk that QEMU could not have because it is in use.
func (m *Machine) contended() (Disk, bool) {
	found := lockedSet.FindStringSubmatch(m.stderr.String())
	if found == nil {
		return Disk{}, false
	}
	lun, err := strconv.Atoi(found[1])
	if err != nil {
		return Disk{}, false
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	d, ok := m.state.Disks[lun]
	return d, ok
}

func blockDriver(f *os.File) (string, error) {
	fi, err := f.Stat()
	if err != nil {
		return "", err
	}
	switch {
	case fi.Mode().IsRegular():
		if fi.Size() == 0 || fi.Size()%512 != 0 {
			return "", fmt.Errorf("%s has %d bytes, a disk has a multiple of 512", f.Name(), fi.Size())
		}
		return "file", nil
	case fi.Mode()&os.ModeDevice != 0 && fi.Mode()&os.ModeCharDevice == 0:
		return "host_device", nil
	default:
		return "", fmt.Errorf("%s is neither a file nor a block device", f.Name())
	}
}

// RemoveDisk unplugs a disk. The guest has to let go of it.
func (m *Machine) RemoveDisk(ctx context.Context, lun int) error {
	d, err := m.disk(lun)
	if err != nil {
		return err
	}
	gone := m.expect("deleted " + diskDevice(lun))
	err = m.QMP(ctx, "device_del", map[string]any{"id": diskDevice(lun)}, nil)
	if err == nil {
		_, err = m.await(ctx, gone, nil)
	}
	if err == nil {
		err = m.QMP(ctx, "blockdev-del", map[string]any{"node-name": diskNode(lun)}, nil)
	}
	if err != nil {
		return fmt.Errorf("detach disk %s: %w", d.Key, err)
	}
	// QEMU may have dropped the set with the last use of its file.
	_ = m.QMP(ctx, "remove-fd", map[string]any{"fdset-id": lun}, nil)
	m.mu.Lock()
	delete(m.state.Disks, lun)
	m.forgetDiskError(lun)
	m.mu.Unlock()
	return m.save()
}

func (m *Machine) disk(lun int) (Disk, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	d, ok := m.state.Disks[lun]
	if !ok {
		return Disk{}, fmt.Errorf("machine has no disk with LUN %d", lun)
	}
	return d, nil
}

// ErrShrink is what ResizeDisk returns for a size below the present one.
var ErrShrink = errors.New("a disk can't shrink")

// ResizeDisk grows an image to size, or takes note that a block device has grown to it, and tells the guest.
func (m *Machine) ResizeDisk(ctx context.Context, lun int, size int64) error {
	d, err := m.disk(lun)
	if err != nil {
		return err
	}
	var nodes []struct {
		Name  string `json:"node-name"`
		Image struct {
			Size int64 `json:"virtual-size"`
		} `json:"image"`
	}
	if err := m.QMP(ctx, "query-named-block-nodes", nil, &nodes); err != nil {
		return fmt.Errorf("resize disk %s: %w", d.Key, err)
	}
	for _, n := range nodes {
		if n.Name == diskNode(lun) && size < n.Image.Size {
			return fmt.Errorf("resize disk %s from %d to %d bytes: %w", d.Key, n.Image.Size, size, ErrShrink)
		}
	}
	if err := m.QMP(ctx, "block_resize", map[string]any{"node-name": diskNode(lun), "size": size}, nil); err != nil {
		return fmt.Errorf("resize disk %s: %w", d.Key, err)
	}
	return nil
}

// A Throttle bounds a disk's traffic, per second. Zero is no bound.
type Throttle struct {
	Bytes, Ops                               int64 // of reads and writes together; not beside those of one direction
	ReadBytes, WriteBytes, ReadOps, WriteOps int64
}

// Throttle sets a disk's bounds; the zero Throttle takes them away.
func (m *Machine) Throttle(ctx context.Context, lun int, t Throttle) error {
	d, err := m.disk(lun)
	if err != nil {
		return err
	}
	if err := m.QMP(ctx, "block_set_io_throttle", map[string]any{
		"id": diskDevice(lun), "bps": t.Bytes, "bps_rd": t.ReadBytes, "bps_wr": t.WriteBytes, "iops": t.Ops, "iops_rd": t.ReadOps, "iops_wr": t.WriteOps,
	}, nil); err != nil {
		return fmt.Errorf("throttle disk %s: %w", d.Key, err)
	}
	return nil
}
