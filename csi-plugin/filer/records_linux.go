package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cradlestack/cradlestack/csi-plugin/volume"
	"github.com/cradlestack/cradlestack/internal/durable"
)

// Records are kept in a directory, as ID.json each.
type records[T any] struct{ dir, kind string }

func (r records[T]) file(id string) string { return filepath.Join(r.dir, id+".json") }

func (r records[T]) read(id string) (record T, err error) {
	data, err := os.ReadFile(r.file(id))
	if err == nil {
		err = json.Unmarshal(data, &record)
	}
	if err != nil {
		err = fmt.Errorf("%s %s: %w", r.kind, id, err)
	}
	return record, err
}

func (r records[T]) write(id string, record T) error {
	data, err := json.MarshalIndent(record, "", "  ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(r.dir, 0o700); err != nil {
		return err
	}
	return durable.WriteFile(r.file(id), append(data, '\n'))
}

// remove removes a record for good: what it was about does not come back after a power cut.
func (r records[T]) remove(id string) error {
	if err := os.Remove(r.file(id)); err != nil {
		return err
	}
	return durable.SyncDir(r.dir)
}

// ids are those of the records that there are.
func (r records[T]) ids() ([]string, error) {
	entries, err := os.ReadDir(r.dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	var ids []string
	for _, e := range entries {
		if id, isRecord := strings.CutSuffix(e.Name(), ".json"); isRecord && volume.ValidName(id) {
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	return ids, nil
}

// all are the records by id.
func (r records[T]) all() ([]T, error) {
	ids, err := r.ids()
	if err != nil {
		return nil, err
	}
	all := []T{}
	for _, id := range ids {
		record, err := r.read(id)
		if errors.Is(err, fs.ErrNotExist) { // it has been removed meanwhile
			continue
		}
		if err != nil {
			return nil, err
		}
		all = append(all, record)
	}
	return all, nil
}
