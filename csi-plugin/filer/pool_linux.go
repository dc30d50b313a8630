package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// A pool is what the members of a set share, and one at a time uses.
type pool interface {
	// take takes it into use here. Whoever had it before can't write any more: the lock is held, and its lease has passed. id is what the pool was known by, or ""
	// of one that no member has taken yet. settled says that whoever had the lock
	// before is past its own take.
	take(ctx context.Context, id string, settled bool) (at place, now string, err error)

	// give gives it back, also what a former process had. Nothing of it is open any more.
	give(ctx context.Context) error

	// lost says why this host can do nothing with it any more, nor give it back; nil if it can. What was begun in it comes to no end, and reaches no disk.
	lost() error
}

// sharedDirectories are directories of a file system that all members have mounted, which shows to each at once what another has written.
type sharedDirectories struct {
	server *server
	paths  []string
	state  string
	opened interface{ Close() error }
}

func (s *server) sharedDirectories() (*sharedDirectories, error) {
	p := &sharedDirectories{server: s, state: s.state}
	pools, err := s.directories()
	if err != nil {
		return nil, err
	}
	for _, d := range pools {
		p.paths = append(p.paths, d.Path)
	}
	if p.state == "" {
		p.state = filepath.Join(p.paths[0], setState)
	}
	return p, nil
}

// setState is no name that a volume or what goes of one could have in a pool.
const setState = ".cradle-filer@state"

// take refuses what is not the set's pool, such as an empty directory that its file system is not mounted on.
func (p *sharedDirectories) take(ctx context.Context, id string, _ bool) (at place, now string, err error) {
	for _, path := range p.paths {
		if _, err := os.Stat(path); err != nil {
			return at, "", fmt.Errorf("pool: %w: mount the file system that the set shares", err)
		}
	}
	if id != "" {
		if _, err := os.Stat(filepath.Join(p.state, handlesKey)); errors.Is(err, fs.ErrNotExist) {
			return at, "", fmt.Errorf("%s is not there, and the set has had it: mount the file system that it shares", p.state)
		}
	}
	if now, err = identify(p.state, id); err != nil {
		return at, "", err
	}
	b, err := p.server.open(ctx)
	if err != nil {
		return at, "", err
	}
	p.opened = b
	return place{backend: b, state: p.state, kept: p.state, shared: true, images: true}, now, nil
}

// identify says what a pool is known by, which is not to be another one than before.
func identify(state, id string) (now string, err error) {
	key, err := readKey(state)
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(append([]byte("pool of "), key[:]...))
	if now = hex.EncodeToString(sum[:8]); id != "" && id != now {
		return "", fmt.Errorf("%s is of another set of volumes than this one has had: mount the file system that it shares, or restore handles.key", state)
	}
	return now, nil
}

func (p *sharedDirectories) lost() error { return nil }

func (p *sharedDirectories) give(context.Context) error {
	if p.opened == nil {
		return nil
	}
	err := p.opened.Close()
	p.opened = nil
	return err
}
