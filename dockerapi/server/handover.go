package server

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"path"
	"slices"

	"github.com/cradlestack/cradlestack/dockerapi/translate"
	"github.com/cradlestack/cradlestack/internal/dockerhttp"
	"github.com/cradlestack/cradlestack/internal/nomadjob"
	"github.com/cradlestack/cradlestack/spec"
)

// A volume without a name is on its container's disk. Where a new container wants it, as that has which docker compose makes in another one's place, it is handed over when its
// container is removed: what is in it is copied to the new one's disk before the old one goes. Until then the new one can't start.

// An inheritance is a volume without a name that was another container's first.
type inheritance struct {
	Name string `json:"name"`           // that it has kept
	From string `json:"from,omitempty"` // the container that has it still, by its id
}

// inherit finds among the volumes that a new container wants those without a name, which are other containers' until these are removed, and gives it places for them on its own disk.
func (t *tenant) inherit(ctx context.Context, c *translate.Container, r *record) error {
	for i := 0; i < len(c.Volumes); {
		name := c.Volumes[i].Name
		from, at, err := t.holderOf(ctx, name)
		if err != nil {
			return err
		}
		if from == nil {
			i++
			continue
		}
		place, err := t.placeFor(ctx, c, r, name, from, at)
		if err != nil {
			return err
		}
		for j := range c.Pod.Volumes {
			if v := &c.Pod.Volumes[j]; v.Class != "" && v.Name == name {
				*v = spec.Volume{Name: place, Scratch: &spec.ScratchVolume{}}
			}
		}
		own := inheritance{Name: name, From: from.ID}
		if from.Run == 0 && from.Node == "" { // it has no disk
			own.From = ""
		}
		for j := range c.Pod.Containers[0].Mounts {
			if m := &c.Pod.Containers[0].Mounts[j]; m.Volume == name {
				m.Volume, m.NoCopy = place, own.From != "" // what the other one has removed is not to come from the image again
			}
		}
		if r.Inherits == nil {
			r.Inherits = map[string]inheritance{}
		}
		r.Inherits[place] = own
		c.Volumes = slices.Delete(c.Volumes, i, i+1)
	}
	return nil
}

// placeFor is how the pod of a new container calls a volume that it inherits from another one, which has it at a path.
func (t *tenant) placeFor(ctx context.Context, c *translate.Container, r *record, name string, from *record, at string) (string, error) {
	refuse := func(why string) (string, error) {
		return "", dockerhttp.Errorf(http.StatusConflict, "volume %s is on the disk of container %s, and %s: give it a name there (-v NAME:%s), or begin with an empty one (docker compose up --renew-anon-volumes)", name, from.ID[:12], why, at)
	}
	i := slices.IndexFunc(c.Pod.Containers[0].Mounts, func(m spec.Mount) bool { return m.Volume == name })
	m := &c.Pod.Containers[0].Mounts[i]
	others, err := t.list(ctx)
	if err != nil {
		return "", err
	}
	switch {
	case from.Joins != "" || r.Joins != "":
		return refuse("in another one's machine")
	case from.Host.AutoRemove:
		return refuse("goes with it (--rm)")
	case m.ReadOnly || m.Subpath != "" || c.Host.ReadonlyRootfs || path.Base(m.Path) != path.Base(at):
		return refuse("can be another one's only as a whole, to be written to, and at the same path")
	case slices.ContainsFunc(others, func(o *record) bool { return o.inherits(name) }):
		return refuse("is to be another one's already")
	}
	return translate.AnonymousVolume(m.Path), nil
}

// inherits says whether a volume is to be handed over to the container.
func (r *record) inherits(name string) bool {
	for _, v := range r.Inherits {
		if v.Name == name && v.From != "" {
			return true
		}
	}
	return false
}

// anonymousName is how docker calls a volume without a name, by the one that it has in its container's pod.
func (r *record) anonymousName(volume string) string {
	if v, ok := r.Inherits[volume]; ok {
		return v.Name
	}
	sum := sha256.Sum256([]byte(r.ID + volume))
	return hex.EncodeToString(sum[:])
}

// holderOf finds the container on whose disk a volume without a name is, and its path there; nil where there is none.
func (t *tenant) holderOf(ctx context.Context, name string) (*record, string, error) {
	if len(name) != hex.EncodedLen(sha256.Size) {
		return nil, "", nil
	}
	all, err := t.list(ctx)
	if err != nil {
		return nil, "", err
	}
	for _, r := range all {
		for _, m := range mountPoints(r) {
			if m.Name == name && m.Driver == onDisk && !r.inherits(name) {
				return r, m.Destination, nil
			}
		}
	}
	return nil, "", nil
}

// stillInherits is an error while a container's volumes are on the disks of others.
func (r *record) stillInherits() error {
	for place, v := range r.Inherits {
		if v.From != "" {
			at := ""
			for _, m := range r.Pod.Containers[0].Mounts {
				if m.Volume == place {
					at = m.Path
				}
			}
			return dockerhttp.Errorf(http.StatusConflict, "volume %s at %s is on the disk of container %s, and is this one's when that is removed (docker rm %[3]s)", v.Name, at, v.From[:12])
		}
	}
	return nil
}

// checkHolders is asked when a new container's record is there: a container that is removed from now on finds it. One that was removed just before has not.
func (t *tenant) checkHolders(ctx context.Context, r *record) error {
	for _, v := range r.Inherits {
		if v.From == "" {
			continue
		}
		from, err := t.get(ctx, v.From)
		if err == nil && from.Want == wantRemoved || isNotFound(err) {
			return dockerhttp.Errorf(http.StatusConflict, "volume %s is gone: container %s, on whose disk it was, was removed at the same time", v.Name, v.From[:12])
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// handOver gives a container's volumes to those who inherit them, before it is removed. It can be called again where it was interrupted.
func (t *tenant) handOver(ctx context.Context, r *record) error {
	if r.Host.AutoRemove || len(anonymousOf(r)) == 0 {
		return nil
	}
	all, err := t.list(ctx)
	if err != nil {
		return err
	}
	for _, heir := range all {
		for place, v := range heir.Inherits {
			if v.From != r.ID {
				continue
			}
			if err := t.moveVolume(ctx, r, heir, place, v); err != nil {
				return fmt.Errorf("hand volume %s over to container %s (which may be removed first): %w", v.Name, heir.Name, err)
			}
		}
	}
	return nil
}

// moveVolume copies a volume from one container's disk to another one's, which has not started since it is to have it.
func (t *tenant) moveVolume(ctx context.Context, r, heir *record, place string, v inheritance) error {
	at := func(c *record) string {
		for _, m := range mountPoints(c) {
			if m.Name == v.Name {
				return m.Destination
			}
		}
		return ""
	}
	from, done, err := t.disk(ctx, r)
	if err != nil {
		return err
	}
	defer done()
	to, done, err := t.disk(ctx, heir)
	if err != nil {
		return err
	}
	defer done()
	// Its pod is one that does not run it, as long as this is so.
	if heir, err = t.get(ctx, heir.ID); isNotFound(err) {
		return nil
	} else if err != nil || heir.Inherits[place].From != r.ID {
		return err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	archive, err := from.read(ctx, from.inside("/archive"), url.Values{"path": {at(r)}})
	if err != nil {
		return err
	}
	defer archive.Close()
	put, err := to.request(ctx, http.MethodPut, to.inside("/archive"), url.Values{"path": {path.Dir(at(heir))}}, &cancelingReader{archive, cancel})
	if err != nil {
		return err
	}
	put.Header.Set("Content-Type", "application/x-tar")
	answer, _, err := to.send(ctx, put)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	if answer.StatusCode != http.StatusOK {
		return refusal(answer)
	}
	_, err = t.change(ctx, heir.ID, func(now *record) (bool, error) {
		now.Inherits = maps.Clone(now.Inherits) // others may read it
		now.Inherits[place] = inheritance{Name: v.Name}
		return true, nil
	})
	if isNotFound(err) { // it was removed meanwhile
		return nil
	}
	return err
}

// A cancelingReader ends what it is read for where it breaks: half an archive is not to be waited for, and no whole one.
type cancelingReader struct {
	io.Reader
	cancel context.CancelCauseFunc
}

func (r *cancelingReader) Read(p []byte) (int, error) {
	n, err := r.Reader.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		r.cancel(err)
	}
	return n, err
}

// takeBack removes what was kept of a container that could not be made.
func (t *tenant) takeBack(ctx context.Context, r *record) error {
	_, verr := t.nomad.Variables().Delete(nomadjob.EnvPath(r.jobID()), t.write(ctx))
	_, rerr := t.nomad.Variables().Delete(recordPrefix+r.ID, t.write(ctx))
	return errors.Join(t.freeName(ctx, r.Name, r.ID), verr, rerr)
}

// withoutDisks is a pod without the volumes that one container has at a time, for one that is to look at its container's disk alone.
func withoutDisks(p *spec.Pod) *spec.Pod {
	bare := *p
	isDisk := func(name string) bool {
		return slices.ContainsFunc(p.Volumes, func(v spec.Volume) bool { return v.Name == name && v.Class == translate.Classes[0] })
	}
	bare.Volumes = slices.DeleteFunc(slices.Clone(p.Volumes), func(v spec.Volume) bool { return isDisk(v.Name) })
	bare.Containers = slices.Clone(p.Containers)
	bare.Containers[0].Mounts = slices.DeleteFunc(slices.Clone(p.Containers[0].Mounts), func(m spec.Mount) bool { return isDisk(m.Volume) })
	return &bare
}
