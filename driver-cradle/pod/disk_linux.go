package pod

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/driver-cradle/hostfile"
	"github.com/cradlestack/cradlestack/driver-cradle/image"
	"github.com/cradlestack/cradlestack/internal/durable"
	"github.com/cradlestack/cradlestack/spec"
)

// A Disk is a scratch disk that outlives its pods: what their containers have written to their images and to volumes of the pod, and
// their logs, is there for the next pod on it, which has the same id. It is a directory:
//
//	disk.json     what was written on it
//	scratch.img   the disk
//
// It comes to be and goes in one step each, whatever is killed on the way; who makes pods on it sees to it that there is one at a time.
type Disk struct {
	ID         string          `json:"id"` // of the pods
	Created    time.Time       `json:"created"`
	Size       spec.Bytes      `json:"size"`
	Containers []DiskContainer `json:"containers"`

	path string
}

// A DiskContainer is a container with a writable layer on a Disk. That means something over the same layers only.
type DiskContainer struct {
	ID     string     `json:"id"`
	Name   string     `json:"name"`
	Image  spec.Image `json:"image"`
	Layers []string   `json:"layers"` // diff ids, lowest first
}

const diskFile = "disk.json"

// ErrUnfit is part of the error where a pod can't go on with what is on a disk.
var ErrUnfit = errors.New("the kept disk does not fit")

// OpenDisk opens the disk in the directory path. It fails with fs.ErrNotExist where there is none.
func OpenDisk(path string) (*Disk, error) {
	data, err := hostfile.Read(filepath.Join(path, diskFile), spec.MaxDocument)
	if err != nil {
		return nil, err
	}
	d := Disk{path: path}
	if err := json.Unmarshal(data, &d); err != nil {
		return nil, fmt.Errorf("%s: %w", filepath.Join(path, diskFile), err)
	}
	return &d, nil
}

// Use tells what the disk takes of the host's space, and when it was written to for the last time.
func (d *Disk) Use() (used spec.Bytes, written time.Time, err error) {
	path := filepath.Join(d.path, scratchFile)
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return 0, written, &os.PathError{Op: "stat", Path: path, Err: err}
	}
	return spec.Bytes(st.Blocks * 512), time.Unix(st.Mtim.Unix()), nil
}

// Names in the directory of disks begin so while they come to be and while they go.
const unfinished = "."

// RemoveDisk removes a disk that no pod uses.
func RemoveDisk(path string) error {
	dying := filepath.Join(filepath.Dir(path), unfinished+filepath.Base(path)+".old")
	if err := os.RemoveAll(dying); err != nil { // of one that was killed
		return err
	}
	if err := os.Rename(path, dying); err != nil {
		return err
	}
	return errors.Join(os.RemoveAll(dying), durable.SyncDir(filepath.Dir(path)))
}

// TidyDisks removes from a directory of disks what was killed while it made or removed one. Nobody may be doing either.
func TidyDisks(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), unfinished) {
			errs = append(errs, os.RemoveAll(filepath.Join(dir, e.Name())))
		}
	}
	return errors.Join(errs...)
}

// containersOf are what a launch's containers are to a disk.
func containersOf(l *spec.Launch) (all []DiskContainer) {
	for _, c := range l.Containers {
		d := DiskContainer{ID: c.ID, Name: c.Name, Image: c.Image}
		for _, layer := range c.Layers {
			d.Layers = append(d.Layers, layer.DiffID)
		}
		all = append(all, d)
	}
	return all
}

// fits says why a launch can't go on with what is on the disk.
func (d *Disk) fits(l *spec.Launch) error {
	if l.Scratch.Size != d.Size {
		return fmt.Errorf("%w: it has %v and %v are asked for: ask for no size, or remove the disk", ErrUnfit, d.Size, l.Scratch.Size)
	}
	want := containersOf(l)
	if len(want) != len(d.Containers) {
		return fmt.Errorf("%w: it is that of %d containers (%s), and this pod has %d: use another disk, or remove it", ErrUnfit, len(d.Containers), d.names(), len(want))
	}
	for i, has := range d.Containers {
		switch {
		case has.ID != want[i].ID:
			return fmt.Errorf("%w: it has no container %s, but %s: use another disk, or remove it", ErrUnfit, want[i].Name, d.names())
		case !slices.Equal(has.Layers, want[i].Layers):
			return fmt.Errorf("%w: what container %s has on it was written over image %s, and can't be read over %s: use the same image, or another disk, or remove it",
				ErrUnfit, want[i].Name, describe(has.Image), describe(want[i].Image))
		}
	}
	return nil
}

func (d *Disk) names() string {
	var names []string
	for _, c := range d.Containers {
		names = append(names, c.Name)
	}
	return strings.Join(names, ", ")
}

func describe(i spec.Image) string {
	if i.ID == "" {
		return i.Reference
	}
	return fmt.Sprintf("%s (%.19s)", i.Reference, i.ID)
}

// makeDisk makes the disk of a launch at path.
func makeDisk(ctx context.Context, path string, l *spec.Launch, now time.Time) (err error) {
	growing := filepath.Join(filepath.Dir(path), unfinished+filepath.Base(path)+".new")
	if err := os.RemoveAll(growing); err != nil { // of one that was killed
		return err
	}
	if err := os.Mkdir(growing, 0o700); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(growing))
		}
	}()
	if err := makeScratch(ctx, filepath.Join(growing, scratchFile), l.Scratch.Size); err != nil {
		return err
	}
	d := Disk{ID: l.ID, Created: now, Size: l.Scratch.Size, Containers: containersOf(l)}
	if err := writeJSON(filepath.Join(growing, diskFile), &d); err != nil {
		return err
	}
	if err := os.Rename(growing, path); err != nil {
		return err
	}
	return durable.SyncDir(filepath.Dir(path))
}

// keep makes the pod directory's scratch disk that of the disk at path, and sees to it that its layers stay in the cache as long as it.
func keep(ctx context.Context, podDir, path string, launch *spec.Launch, images map[string]*image.Image, store *image.Store) error {
	if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
		if err := makeDisk(ctx, path, launch, time.Now()); err != nil {
			return err
		}
	}
	for _, img := range images {
		if _, err := store.Hold(img, path); err != nil { // it ends with the disk
			return err
		}
	}
	return os.Symlink(filepath.Join(path, scratchFile), filepath.Join(podDir, scratchFile))
}
