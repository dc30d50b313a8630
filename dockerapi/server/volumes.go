package server

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/nomad/api"
	"github.com/moby/moby/api/types/events"
	"github.com/moby/moby/api/types/mount"
	"github.com/moby/moby/api/types/volume"
	"golang.org/x/sync/errgroup"

	"github.com/cradlestack/cradlestack/dockerapi/translate"
	"github.com/cradlestack/cradlestack/internal/dockerhttp"
	"github.com/cradlestack/cradlestack/internal/nomadjob"
)

// A volume is a CSI volume of the namespace, by docker's name. What docker wants to know of it beside that is a variable.
const (
	volumePrefix = "docker/volumes/" // + name: a volumeRecord
	volumeItem   = "volume"
)

// releaseTimeout is how long is waited for Nomad to take a volume back from a pod that has ended.
const releaseTimeout = time.Minute

func (s *Server) volumeRoutes(on *router) {
	on.on("GET /volumes", s.listVolumes)
	on.on("POST /volumes/create", func(w http.ResponseWriter, r *http.Request, t *tenant) error {
		var request volume.CreateRequest
		if err := dockerhttp.Decode(w, r, &request); err != nil {
			return err
		}
		v, err := t.createVolume(r.Context(), &request, "")
		if err != nil {
			return err
		}
		return dockerhttp.Answer(w, http.StatusCreated, v.docker())
	})
	on.on("GET /volumes/{name}", func(w http.ResponseWriter, r *http.Request, t *tenant) error {
		v, err := t.volume(r.Context(), r.PathValue("name"))
		if err != nil {
			return err
		}
		return dockerhttp.Answer(w, http.StatusOK, v.docker())
	})
	on.on("DELETE /volumes/{name}", func(w http.ResponseWriter, r *http.Request, t *tenant) error {
		err := t.removeVolume(r.Context(), r.PathValue("name"))
		if err != nil && (!isNotFound(err) || !dockerhttp.Truth(r, "force")) {
			return err
		}
		w.WriteHeader(http.StatusNoContent)
		return nil
	})
	on.on("POST /volumes/prune", s.pruneVolumes)
}

// A volumeRecord is what a CSI volume has no place for.
type volumeRecord struct {
	Name    string            `json:"name"`
	Created time.Time         `json:"created"`
	Class   string            `json:"class"`
	Options map[string]string `json:"options,omitempty"`
	Labels  map[string]string `json:"labels,omitempty"`
}

// A namedVolume is one that is there.
type namedVolume struct {
	volumeRecord
	capacity int64
	users    []string // containers that have it, where all volumes are asked for
}

func (v *namedVolume) docker() volume.Volume {
	scope := "global"
	if v.Class == onDisk {
		scope = "local"
	}
	return volume.Volume{
		Name: v.Name, Driver: v.Class, Mountpoint: volumeSource(v.Name), CreatedAt: v.Created.UTC().Format(time.RFC3339), Scope: scope,
		Labels: v.Labels, Options: v.Options,
	}
}

const (
	// onDisk is the driver of volumes without a name, which lie on their container's disk and go with it.
	onDisk = "local"
	// anonymousLabel is docker's, of volumes whose name nobody has chosen (moby daemon/volume/service).
	anonymousLabel = "com.docker.volume.anonymous"
)

// anonymousOf are a container's volumes without a name, by those that docker inspect shows.
func anonymousOf(c *record) (all []*namedVolume) {
	for _, m := range mountPoints(c) {
		if m.Type == mount.TypeVolume && m.Driver == onDisk {
			all = append(all, &namedVolume{
				volumeRecord: volumeRecord{Name: m.Name, Created: c.Created, Class: onDisk, Labels: map[string]string{anonymousLabel: ""}}, users: []string{c.ID},
			})
		}
	}
	return all
}

// anonymousIn are the volumes without a name of all containers, each with those that have it, or are to have it.
func anonymousIn(containers []*record) (all []*namedVolume) {
	byName := map[string]*namedVolume{}
	for _, c := range containers {
		for _, v := range anonymousOf(c) {
			if known := byName[v.Name]; known != nil {
				known.users = append(known.users, c.ID)
				continue
			}
			byName[v.Name], all = v, append(all, v)
		}
	}
	return all
}

// volumeSource is where docker says that a volume is. Nobody finds it there: its node has it.
func volumeSource(name string) string { return "/volumes/" + name }

func noVolume(name string) error {
	return dockerhttp.Errorf(http.StatusNotFound, "get %s: no such volume", name)
}

// volume finds one, also one that was not made by docker's clients.
func (t *tenant) volume(ctx context.Context, name string) (*namedVolume, error) {
	if !translate.VolumeRule.MatchString(name) {
		return nil, noVolume(name)
	}
	v, _, err := t.nomad.CSIVolumes().Info(name, t.query(ctx))
	if isStatus(err, http.StatusNotFound) || err == nil && v.PluginID != t.server.VolumePlugin {
		return t.anonymous(ctx, name)
	}
	if err != nil {
		return nil, err
	}
	n := &namedVolume{capacity: v.Capacity, volumeRecord: volumeRecord{Name: name, Created: time.Unix(0, v.CreateTime), Class: v.Context["class"]}}
	kept, _, err := t.nomad.Variables().Read(volumePrefix+nomadjob.VariableName(name), t.query(ctx))
	if errors.Is(err, api.ErrVariablePathNotFound) {
		return n, nil
	}
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal([]byte(kept.Items[volumeItem]), &n.volumeRecord); err != nil {
		return nil, fmt.Errorf("variable %s: %w", kept.Path, err)
	}
	return n, nil
}

// anonymous finds a volume without a name, by the one that docker inspect shows.
func (t *tenant) anonymous(ctx context.Context, name string) (*namedVolume, error) {
	if len(name) != hex.EncodedLen(sha256.Size) {
		return nil, noVolume(name)
	}
	containers, err := t.list(ctx)
	if err != nil {
		return nil, err
	}
	for _, v := range anonymousIn(containers) {
		if v.Name == name {
			return v, nil
		}
	}
	return nil, noVolume(name)
}

// volumes are all of the namespace.
func (t *tenant) volumes(ctx context.Context) ([]*namedVolume, error) {
	containers, err := t.list(ctx)
	if err != nil {
		return nil, err
	}
	all, _, err := t.nomad.CSIVolumes().List(t.query(ctx))
	if err != nil {
		return nil, err
	}
	all = slices.DeleteFunc(all, func(v *api.CSIVolumeListStub) bool { return v.PluginID != t.server.VolumePlugin })
	found := make([]*namedVolume, len(all))
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(readers)
	for i, v := range all {
		g.Go(func() error {
			n, err := t.volume(ctx, v.ID)
			if isNotFound(err) {
				return nil
			}
			found[i] = n
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	found = slices.DeleteFunc(found, func(v *namedVolume) bool { return v == nil })
	for _, v := range found {
		v.users = usersOf(containers, v.Name)
	}
	found = append(found, anonymousIn(containers)...)
	slices.SortFunc(found, func(a, b *namedVolume) int { return strings.Compare(a.Name, b.Name) })
	return found, nil
}

// createVolume makes a volume, or finds one of the same name, as docker does. zone is where it is made if its options do not say.
func (t *tenant) createVolume(ctx context.Context, r *volume.CreateRequest, zone string) (*namedVolume, error) {
	if r.Name == "" {
		r.Name, r.Labels = newID(), union(maps.Clone(r.Labels))
		r.Labels[anonymousLabel] = ""
	}
	wanted, err := translate.CreateVolume(r, t.server.VolumeDriver)
	if err != nil {
		return nil, err
	}
	there, err := t.volume(ctx, r.Name)
	if err == nil && there.Class == onDisk {
		return nil, dockerhttp.Errorf(http.StatusConflict, "volume %s is on the disk of container %s: give it a name there (-v NAME:…), so that others can have it", r.Name, there.users[0][:12])
	}
	if err == nil && r.Driver != "" && r.Driver != "local" && r.Driver != there.Class {
		return nil, dockerhttp.Errorf(http.StatusConflict, "create %s: conflict: volume name must be unique: it exists with driver %s", r.Name, there.Class)
	}
	if err == nil || !isNotFound(err) {
		return there, err
	}
	made := &namedVolume{volumeRecord: volumeRecord{Name: r.Name, Created: time.Now().UTC().Truncate(time.Second), Class: wanted.Class, Options: r.DriverOpts, Labels: r.Labels}}
	text, err := json.Marshal(made.volumeRecord)
	if err != nil {
		return nil, err
	}
	record := &api.Variable{Path: volumePrefix + nomadjob.VariableName(r.Name), Items: api.VariableItems{volumeItem: string(text)}}
	if _, _, err := t.nomad.Variables().Update(record, t.write(ctx)); err != nil {
		return nil, err
	}
	all, _, err := t.nomad.CSIVolumes().Create(t.csiVolume(r.Name, wanted, or(wanted.Zone, zone)), t.write(ctx))
	if err != nil {
		return nil, t.notMade(context.WithoutCancel(ctx), record.Path, r.Name, err)
	}
	if len(all) == 1 {
		made.capacity = all[0].Capacity
	}
	t.emitVolume(events.ActionCreate, made.Name, map[string]string{"driver": made.Class})
	return made, nil
}

func (t *tenant) csiVolume(name string, v *translate.Volume, zone string) *api.CSIVolume {
	made := nomadjob.Volume{Name: name, Namespace: t.Namespace, Plugin: t.server.VolumePlugin, Parameters: v.Parameters, Size: v.Size, Zone: zone}
	return made.CSI()
}

// notMade takes back what was kept of a volume that could not be made, unless somebody else has made it, and says why in docker's way.
func (t *tenant) notMade(ctx context.Context, path, name string, why error) error {
	if _, err := t.volume(ctx, name); isNotFound(err) {
		if _, err := t.nomad.Variables().Delete(path, t.write(ctx)); err != nil {
			return errors.Join(why, err)
		}
	}
	_, text := statusOf(why)
	text = strings.TrimPrefix(text, "Nomad: ")
	if strings.Contains(text, "no CSI plugin") || strings.Contains(text, "no such plugin") || strings.Contains(text, "plugin not found") {
		text = fmt.Sprintf("Nomad has no CSI plugin %s: its operator has to run one (docs/csi.md), or start this server with another --volume-plugin", t.server.VolumePlugin)
	}
	if i := strings.LastIndex(text, "desc = "); i >= 0 { // the plugin's own words
		text = text[i+len("desc = "):]
	}
	if status, _ := statusOf(why); status != http.StatusInternalServerError {
		return why
	}
	return dockerhttp.Errorf(http.StatusInternalServerError, "create %s: %s", name, strings.TrimSpace(text))
}

// usersOf are the containers that have a volume with a name.
func usersOf(containers []*record, name string) (ids []string) {
	for _, c := range containers {
		if slices.Contains(c.Volumes, name) {
			ids = append(ids, c.ID)
		}
	}
	return ids
}

func (t *tenant) removeVolume(ctx context.Context, name string) error {
	v, err := t.volume(ctx, name)
	if err != nil {
		return err
	}
	ids := v.users
	if v.Class != onDisk {
		containers, err := t.list(ctx)
		if err != nil {
			return err
		}
		ids = usersOf(containers, name)
	}
	if len(ids) > 0 {
		return dockerhttp.Errorf(http.StatusConflict, "remove %s: volume is in use - [%s]", name, strings.Join(ids, ", "))
	}
	return t.deleteVolume(ctx, name)
}

// deleteVolume removes a volume that no container has.
func (t *tenant) deleteVolume(ctx context.Context, name string) error {
	v, err := t.released(ctx, name, "")
	if err != nil {
		return err
	}
	if err := t.deleteFreed(ctx, name); err != nil {
		return fmt.Errorf("remove %s: %w", name, err)
	}
	if _, err := t.nomad.Variables().Delete(volumePrefix+nomadjob.VariableName(name), t.write(ctx)); err != nil {
		return err
	}
	t.emitVolume(events.ActionDestroy, name, map[string]string{"driver": v.Context["class"]})
	return nil
}

// deleteFreed removes a volume when its node has let go of it: Nomad has forgotten the pod of a container that docker rm has ended while its machine still ends.
func (t *tenant) deleteFreed(ctx context.Context, name string) error {
	ctx, cancel := context.WithTimeout(ctx, releaseTimeout)
	defer cancel()
	for {
		err := t.nomad.CSIVolumes().DeleteOpts(&api.CSIVolumeDeleteRequest{ExternalVolumeID: name}, t.write(ctx))
		if err == nil || nomadjob.IsVolumeGone(err, name) {
			return nil
		}
		if !strings.Contains(err.Error(), "in use") {
			return err
		}
		select {
		case <-time.After(freedRetry):
		case <-ctx.Done():
			return err
		}
	}
}

// freedRetry is the time until a volume that a node still has is asked for again: it tells nobody when it lets go.
const freedRetry = 300 * time.Millisecond

// released waits until Nomad has taken a volume back from pods that have ended, but for those of one job. One that is in use is an error.
func (t *tenant) released(ctx context.Context, name, own string) (*api.CSIVolume, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, releaseTimeout, dockerhttp.Errorf(http.StatusConflict, "volume %s is still held by a pod that has ended: Nomad has not taken it back from its node", name))
	defer cancel()
	q := t.query(ctx)
	q.WaitTime = releaseLook
	for {
		v, meta, err := t.nomad.CSIVolumes().Info(name, q)
		if isStatus(err, http.StatusNotFound) {
			return nil, noVolume(name)
		}
		if err != nil {
			if ctx.Err() != nil {
				err = context.Cause(ctx)
			}
			return nil, err
		}
		held := false
		for _, id := range slices.Concat(slices.Collect(maps.Keys(v.ReadAllocs)), slices.Collect(maps.Keys(v.WriteAllocs))) {
			i := slices.IndexFunc(v.Allocations, func(a *api.AllocationListStub) bool { return a.ID == id })
			switch {
			case i < 0: // Nomad has forgotten it
				held = true
			case v.Allocations[i].JobID == own:
			case isOver(v.Allocations[i]) || v.Allocations[i].DesiredStatus != api.AllocDesiredStatusRun:
				held = true
			default:
				user, err := t.userOf(ctx, v.Allocations[i].JobID)
				if err != nil {
					return nil, err
				}
				if user != "" {
					return nil, dockerhttp.Errorf(http.StatusConflict, "volume %s is in use by %s", name, user)
				}
				held = true
			}
		}
		if !held {
			return v, nil
		}
		q.WaitIndex = meta.LastIndex
	}
}

// releaseLook is how long one query waits for a volume to be taken back. The index that Nomad gives with a volume may be that of a change which came after it was read (1.11,
// CSIVolume.Get): who waits for the next one would wait for nothing.
const releaseLook = 2 * time.Second

// userOf is who has a volume, by the job; "" where that is a container that has ended or is gone, which Nomad hears later, or somebody who looks at
// the disk of one for a moment.
func (t *tenant) userOf(ctx context.Context, job string) (string, error) {
	id, ours := strings.CutPrefix(job, jobPrefix)
	if !ours {
		return "Nomad's job " + job, nil
	}
	if strings.HasPrefix(id, attendantPrefix) {
		return "", nil
	}
	c, err := t.get(ctx, id)
	if isNotFound(err) || err == nil && c.ended() {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	return "container " + c.Name, nil
}

// awaitVolumes waits until a container's job can have its volumes. One with a single writer is another container's as long as that runs.
func (t *tenant) awaitVolumes(ctx context.Context, r *record, job string) error {
	for _, v := range r.Pod.Volumes {
		if v.Class != "lv2" {
			continue
		}
		if _, err := t.released(ctx, v.Name, job); err != nil {
			if text := err.Error(); strings.Contains(text, " is in use by ") {
				return dockerhttp.Errorf(http.StatusConflict, "%s, and of class lv2, which one container has at a time: stop that one, or take a volume of another class (docker volume create --driver nfs)", text)
			}
			return err
		}
	}
	return nil
}

// useVolumes finds the volumes that a container wants, and makes those that are not there.
func (t *tenant) useVolumes(ctx context.Context, c *translate.Container) error {
	for i := range c.Volumes {
		v, err := t.createVolume(ctx, &c.Volumes[i], c.Zone)
		if err != nil {
			return err
		}
		for j := range c.Pod.Volumes {
			if p := &c.Pod.Volumes[j]; p.Class != "" && p.Name == v.Name {
				p.Class = v.Class
			}
		}
	}
	return nil
}

// inherited are the mounts of the containers that --volumes-from names: CONTAINER[:ro].
func (t *tenant) inherited(ctx context.Context, from []string) ([]mount.Mount, error) {
	var all []mount.Mount
	for _, text := range from {
		name, mode, _ := strings.Cut(text, ":")
		switch mode {
		case "", "rw", "ro", "z", "Z":
		default:
			return nil, dockerhttp.Invalid("invalid mode: %s", mode)
		}
		c, err := t.find(ctx, name)
		if isNotFound(err) {
			err = dockerhttp.Invalid("%v", err)
		}
		if err != nil {
			return nil, err
		}
		for _, p := range mountPoints(c) {
			m := mount.Mount{Type: p.Type, Source: p.Name, Target: p.Destination, ReadOnly: !p.RW || mode == "ro"}
			switch {
			case p.Type == mount.TypeTmpfs:
				continue
			case p.Type == mount.TypeBind:
				m.Source = p.Source
			case !slices.Contains(c.Volumes, p.Name):
				return nil, dockerhttp.Errorf(http.StatusNotImplemented, "--volumes-from %s: its volume at %s has no name and is on its own disk: give it one (-v NAME:%[2]s)", c.Name, p.Destination)
			}
			all = append(all, m)
		}
	}
	return all, nil
}

func (s *Server) listVolumes(w http.ResponseWriter, r *http.Request, t *tenant) error {
	f, err := dockerhttp.ParseFilters(r, "dangling", "driver", "label", "name")
	if err != nil {
		return err
	}
	dangling, err := oneTruth(f, "dangling")
	if err != nil {
		return err
	}
	all, err := t.volumes(r.Context())
	if err != nil {
		return err
	}
	answer := volume.ListResponse{Volumes: []volume.Volume{}, Warnings: []string{}}
	for _, v := range all {
		if dangling != nil && *dangling != (len(v.users) == 0) ||
			!f.Any("driver", func(d string) bool { return d == v.Class }) || !f.Labels("label", v.Labels, false) ||
			!f.Any("name", func(n string) bool { return strings.Contains(v.Name, n) }) {
			continue
		}
		answer.Volumes = append(answer.Volumes, v.docker())
	}
	return dockerhttp.Answer(w, http.StatusOK, answer)
}

// pruneVolumes removes volumes that no container has; those whose name nobody has chosen, where nothing else is said.
func (s *Server) pruneVolumes(w http.ResponseWriter, r *http.Request, t *tenant) error {
	f, err := dockerhttp.ParseFilters(r, "all", "label", "label!")
	if err != nil {
		return err
	}
	named, err := oneTruth(f, "all")
	if err != nil {
		return err
	}
	report := volume.PruneReport{VolumesDeleted: []string{}}
	every := named != nil && *named || versions.Version(r) < 42 // before, docker pruned all
	all, err := t.volumes(r.Context())
	if err != nil {
		return err
	}
	for _, v := range all {
		_, anonymous := v.Labels[anonymousLabel]
		if len(v.users) > 0 || !every && !anonymous || !f.Labels("label", v.Labels, false) || !f.Labels("label!", v.Labels, true) {
			continue
		}
		if err := t.deleteVolume(r.Context(), v.Name); isTaken(err) {
			continue // a job that is not docker's has it
		} else if err != nil {
			return err
		}
		report.VolumesDeleted = append(report.VolumesDeleted, v.Name)
		report.SpaceReclaimed += uint64(v.capacity)
	}
	t.emitPrune(events.VolumeEventType, report.SpaceReclaimed)
	return dockerhttp.Answer(w, http.StatusOK, report)
}

// volumeUsage is docker system df, its volumes: how large they may become, as what they take only their nodes know.
func (t *tenant) volumeUsage(ctx context.Context) (*volume.DiskUsage, error) {
	all, err := t.volumes(ctx)
	if err != nil {
		return nil, err
	}
	u := &volume.DiskUsage{TotalCount: int64(len(all)), Items: []volume.Volume{}}
	for _, v := range all {
		one := v.docker()
		one.UsageData = &volume.UsageData{RefCount: int64(len(v.users)), Size: v.capacity}
		u.Items = append(u.Items, one)
		u.TotalSize += v.capacity
		if one.UsageData.RefCount > 0 {
			u.ActiveCount++
		} else {
			u.Reclaimable += v.capacity
		}
	}
	return u, nil
}

func (t *tenant) emitVolume(action events.Action, name string, attributes map[string]string) {
	t.emit(event{Message: events.Message{Type: events.VolumeEventType, Action: action, Actor: events.Actor{ID: name, Attributes: attributes}}})
}

// volumeEvents are those of a container's volumes when it begins and ends to run.
func volumeEvents(r *record, action events.Action) (all []event) {
	for _, m := range mountPoints(r) {
		if m.Type != mount.TypeVolume {
			continue
		}
		attributes := map[string]string{"container": r.ID, "driver": m.Driver}
		if action == events.ActionMount {
			attributes["destination"], attributes["read/write"], attributes["propagation"] = m.Destination, fmt.Sprint(m.RW), string(m.Propagation)
		}
		all = append(all, event{Message: events.Message{Type: events.VolumeEventType, Action: action, Actor: events.Actor{ID: m.Name, Attributes: attributes}}})
	}
	return all
}
