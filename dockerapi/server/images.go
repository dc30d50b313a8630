package server

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/distribution/reference"
	"github.com/go-jose/go-jose/v4"
	"github.com/hashicorp/nomad/api"
	"github.com/moby/moby/api/pkg/authconfig"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"
	"github.com/moby/moby/api/types/image"
	"github.com/moby/moby/api/types/jsonstream"
	registrytypes "github.com/moby/moby/api/types/registry"
	"github.com/moby/moby/api/types/storage"
	"github.com/moby/moby/api/types/system"
	"github.com/moby/moby/api/types/volume"
	"github.com/opencontainers/go-digest"

	"github.com/cradlestack/cradlestack/dockerapi/registry"
	"github.com/cradlestack/cradlestack/internal/dockerhttp"
)

func (s *Server) imageRoutes(on *router) {
	on.on("GET /images/json", s.imageList)
	on.on("POST /images/create", s.imageCreate)
	on.on("POST /images/load", s.imageLoad)
	on.on("GET /images/get", s.imageSave)
	on.on("POST /images/prune", s.imagePrune)
	on.on("GET /images/search", func(http.ResponseWriter, *http.Request, *tenant) error {
		return dockerhttp.NewError(http.StatusNotImplemented, "searching is not supported: look on the registry's web page, and docker pull by name")
	})
	on.onName("GET", "/images/", "/json", s.imageInspect)
	on.onName("GET", "/images/", "/history", s.imageHistory)
	on.onName("GET", "/images/", "/get", s.imageSaveOne)
	on.onName("POST", "/images/", "/push", s.imagePush)
	on.onName("POST", "/images/", "/tag", s.imageTag)
	on.onName("DELETE", "/images/", "", s.imageRemove)
	on.onName("GET", "/distribution/", "/json", s.imageDistribution)
	on.on("GET /system/df", s.diskUsage)
	on.on("POST /commit", s.commitContainer)
	on.on("POST /auth", s.login)
}

const noImages = "this server keeps no images: its operator has to start it with --images"

// images are the tenant's.
func (s *Server) images(t *tenant) (*registry.Images, error) {
	if s.Registry == nil {
		return nil, dockerhttp.NewError(http.StatusNotFound, noImages)
	}
	i, err := s.Registry.Images(t.Namespace)
	return i, imageError(err)
}

// imageError gives the registry's errors their status.
func imageError(err error) error {
	for kind, status := range map[error]int{
		registry.ErrInvalid: http.StatusBadRequest, registry.ErrNotFound: http.StatusNotFound, registry.ErrConflict: http.StatusConflict,
		registry.ErrUnauthorized: http.StatusUnauthorized, registry.ErrUnavailable: http.StatusInternalServerError,
	} {
		if errors.Is(err, kind) {
			return dockerhttp.NewError(status, err.Error())
		}
	}
	return err
}

// imageUses are the containers of the tenant's that are made from images. Who knows containers adds to Server.uses.
func (s *Server) imageUses(ctx context.Context, t *tenant) ([]registry.Use, error) {
	var all []registry.Use
	for _, f := range s.uses {
		uses, err := f(ctx, t)
		if err != nil {
			return nil, err
		}
		all = append(all, uses...)
	}
	return all, nil
}

// nothing is what clients before API 1.43 have shown of an image without a name.
const nothing = "<none>"

// A summary is image.Summary with what earlier versions had.
type summary struct {
	image.Summary
	VirtualSize *int64 `json:"VirtualSize,omitempty"` // before 1.44
}

func (s *Server) imageList(w http.ResponseWriter, r *http.Request, t *tenant) error {
	images, err := s.images(t)
	if err != nil {
		return err
	}
	f, err := dockerhttp.ParseFilters(r, "dangling", "label", "label!", "before", "since", "reference", "until")
	if err != nil {
		return err
	}
	if old := dockerhttp.Parameter(r, "filter"); old != "" { // of API 1.24, which clients still send
		f = dockerhttp.Filters{"reference": {old}}
	}
	match, err := imageMatcher(r.Context(), images, f)
	if err != nil {
		return imageError(err)
	}
	all, err := images.List(r.Context())
	if err != nil {
		return imageError(err)
	}
	version := versions.Version(r)
	shared := registry.Usage{}
	if dockerhttp.Truth(r, "shared-size") {
		if shared, err = images.Usage(r.Context(), all); err != nil {
			return imageError(err)
		}
	}
	found := []summary{}
	for _, i := range all {
		tags, digests, ok := match(i)
		if !ok {
			continue
		}
		one, err := summarize(r.Context(), images, i, tags, digests)
		if err != nil {
			return imageError(err)
		}
		if shared.Shared != nil {
			one.SharedSize = shared.Shared[i.ID]
		}
		if version < 43 && len(tags) == 0 {
			one.RepoTags = []string{nothing + ":" + nothing}
			if len(digests) == 0 {
				one.RepoDigests = []string{nothing + "@" + nothing}
			}
		}
		entry := summary{Summary: one}
		if version < 44 {
			entry.VirtualSize = &one.Size
		}
		found = append(found, entry)
	}
	return dockerhttp.Answer(w, http.StatusOK, found)
}

func summarize(ctx context.Context, images *registry.Images, i *registry.Image, tags, digests []string) (image.Summary, error) {
	size, err := images.Size(ctx, i)
	if err != nil {
		return image.Summary{}, err
	}
	return image.Summary{
		ID: i.ID.String(), Created: seconds(i.Config.Created), Labels: i.Config.Config.Labels, RepoTags: tags, RepoDigests: digests,
		Size: size, SharedSize: -1, Containers: -1,
	}, nil
}

func seconds(t *time.Time) int64 {
	if t == nil {
		return time.Time{}.Unix()
	}
	return t.Unix()
}

// names are references as docker shows them; none are an empty list.
func names[T reference.Named](all []T) []string {
	familiar := make([]string, len(all))
	for i, n := range all {
		familiar[i] = reference.FamiliarString(n)
	}
	return familiar
}

// imageMatcher applies docker images' filters, and says which of an image's names are left.
func imageMatcher(ctx context.Context, images *registry.Images, f dockerhttp.Filters) (func(*registry.Image) (tags, digests []string, ok bool), error) {
	dangling, err := oneTruth(f, "dangling")
	if err != nil {
		return nil, err
	}
	var before, after time.Time
	for name, bound := range map[string]*time.Time{"before": &before, "since": &after} {
		for _, ref := range f[name] {
			i, err := images.Resolve(ctx, ref)
			if err != nil {
				return nil, err
			}
			if i.Config.Created != nil {
				*bound = *i.Config.Created
			}
		}
	}
	until, err := untilFilter(f)
	if err != nil {
		return nil, err
	}
	for _, pattern := range f["reference"] {
		if _, err := reference.FamiliarMatch(pattern, anyName); err != nil {
			return nil, dockerhttp.Invalid("invalid reference filter %q: %v", pattern, err)
		}
	}
	return func(i *registry.Image) (tags, digests []string, ok bool) {
		created := time.Time{}
		if i.Config.Created != nil {
			created = *i.Config.Created
		}
		switch {
		case dangling != nil && *dangling != (len(i.Tags) == 0),
			!f.Labels("label", i.Config.Config.Labels, false), !f.Labels("label!", i.Config.Config.Labels, true),
			!before.IsZero() && !created.Before(before), !after.IsZero() && !created.After(after), !until.IsZero() && !created.Before(until):
			return nil, nil, false
		}
		matches := func(n reference.Reference) bool {
			return f.Any("reference", func(pattern string) bool {
				ok, err := reference.FamiliarMatch(pattern, n)
				return err == nil && ok
			})
		}
		for _, n := range i.Tags {
			if matches(n) {
				tags = append(tags, reference.FamiliarString(n))
			}
		}
		for _, n := range i.Digests {
			if matches(n) {
				digests = append(digests, reference.FamiliarString(n))
			}
		}
		if f["reference"] != nil && tags == nil && digests == nil {
			return nil, nil, false
		}
		return emptied(tags), emptied(digests), true
	}, nil
}

var anyName, _ = reference.WithName("x")

func emptied(s []string) []string {
	if s == nil {
		return []string{}
	}
	return s
}

// oneTruth is a filter that is true or false; nil without it.
func oneTruth(f dockerhttp.Filters, name string) (*bool, error) {
	var truth *bool
	for _, v := range f[name] {
		b, err := strconv.ParseBool(v)
		if err != nil || truth != nil && *truth != b {
			return nil, dockerhttp.Invalid("invalid filter '%s=%v'", name, f[name])
		}
		truth = &b
	}
	return truth, nil
}

// untilFilter is the time that until names: one, or how long ago it was. Docker reads relative ones as Go's durations.
func untilFilter(f dockerhttp.Filters) (time.Time, error) {
	values := f["until"]
	switch {
	case len(values) == 0:
		return time.Time{}, nil
	case len(values) > 1:
		return time.Time{}, dockerhttp.Invalid("more than one until filter specified")
	}
	if d, err := time.ParseDuration(values[0]); err == nil {
		return time.Now().Add(-d), nil
	}
	for _, layout := range []string{"2006-01-02T15:04:05", "2006-01-02T15:04", "2006-01-02T15", "2006-01-02"} {
		if at, err := time.ParseInLocation(layout, values[0], time.Local); err == nil {
			return at, nil
		}
	}
	return dockerhttp.ParseTime(values[0])
}

// An inspected image is image.InspectResponse with what earlier versions had.
type inspected struct {
	image.InspectResponse
	Parent      *string `json:"Parent,omitempty"`      // before 1.52
	VirtualSize *int64  `json:"VirtualSize,omitempty"` // before 1.44
}

func (s *Server) imageInspect(w http.ResponseWriter, r *http.Request, t *tenant) error {
	images, err := s.images(t)
	if err != nil {
		return s.inspectLayout(w, r, err)
	}
	i, err := images.Inspect(r.Context(), r.PathValue("name"))
	if err != nil {
		return s.inspectLayout(w, r, imageError(err))
	}
	size, err := images.Size(r.Context(), i)
	if err != nil {
		return imageError(err)
	}
	c := i.Config
	answer := inspected{InspectResponse: image.InspectResponse{
		ID: i.ID.String(), RepoTags: names(i.Tags), RepoDigests: names(i.Digests), Author: c.Author, Config: &c.Config,
		Architecture: c.Architecture, Variant: c.Variant, Os: c.OS, OsVersion: c.OSVersion, Size: size,
		GraphDriver: &storage.DriverData{Name: "overlay2", Data: map[string]string{}},
		Metadata:    image.Metadata{LastTagTime: i.Tagged.UTC()},
	}}
	if n := len(c.History); n > 0 {
		answer.Comment = c.History[n-1].Comment
	}
	if c.Created != nil {
		answer.Created = c.Created.Format(time.RFC3339Nano)
	}
	answer.RootFS.Type = c.RootFS.Type
	for _, d := range c.RootFS.DiffIDs {
		answer.RootFS.Layers = append(answer.RootFS.Layers, d.String())
	}
	switch version := versions.Version(r); {
	case version < 44:
		answer.VirtualSize = &size
		fallthrough
	case version < 52:
		answer.Parent = new(string)
	}
	return dockerhttp.Answer(w, http.StatusOK, answer)
}

// inspectLayout tells what is known of an image that each node has as an OCI layout; where there is none either, the registry's answer stands.
func (s *Server) inspectLayout(w http.ResponseWriter, r *http.Request, answer error) error {
	ref := r.PathValue("name")
	i, err := s.layoutOf(ref)
	if err != nil || !isNotFound(answer) {
		return answer
	}
	return dockerhttp.Answer(w, http.StatusOK, image.InspectResponse{
		ID: i.ID, RepoTags: []string{strings.TrimSuffix(ref, ":latest") + ":latest"}, RepoDigests: []string{}, Config: &i.Config, Architecture: runtime.GOARCH, Os: "linux",
		GraphDriver: &storage.DriverData{Name: "overlay2", Data: map[string]string{}},
	})
}

func (s *Server) imageHistory(w http.ResponseWriter, r *http.Request, t *tenant) error {
	images, err := s.images(t)
	if err != nil {
		return err
	}
	i, err := images.Inspect(r.Context(), r.PathValue("name"))
	if err != nil {
		return imageError(err)
	}
	steps, err := images.History(r.Context(), i)
	if err != nil {
		return imageError(err)
	}
	answer := []image.HistoryResponseItem{}
	for _, h := range steps {
		answer = append(answer, image.HistoryResponseItem{ID: h.ID, Created: h.Created.Unix(), CreatedBy: h.CreatedBy, Comment: h.Comment, Tags: h.Tags, Size: h.Size})
	}
	return dockerhttp.Answer(w, http.StatusOK, answer)
}

// A transferStream is an answer that tells of a transfer while it is under way: a JSON document a line (moby api/types/jsonstream).
type transferStream struct {
	w     http.ResponseWriter
	mu    sync.Mutex
	begun bool
}

// A streamMessage is jsonstream.Message with the error's text where clients before 1.26 look for it.
type streamMessage struct {
	jsonstream.Message
	Text string `json:"error,omitempty"`
}

func (s *transferStream) send(m streamMessage) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.begun {
		s.w.Header().Set("Content-Type", "application/json")
		s.w.WriteHeader(http.StatusOK)
		s.begun = true
	}
	data, err := json.Marshal(m)
	if err != nil {
		return
	}
	_, _ = s.w.Write(append(data, '\r', '\n')) // the client may have gone, which ends the request
	_ = http.NewResponseController(s.w).Flush()
}

func (s *transferStream) progress(p registry.Progress) {
	m := jsonstream.Message{ID: p.ID, Status: p.Status}
	if p.ID != "" {
		m.Progress = &jsonstream.Progress{Current: p.Current, Total: p.Total}
	}
	s.send(streamMessage{Message: m})
}

// end tells of an error: by the status, or where the answer has begun, in it.
func (s *transferStream) end(r *http.Request, err error) error {
	err = imageError(err)
	s.mu.Lock()
	begun := s.begun
	s.mu.Unlock()
	if err == nil || !begun || r.Context().Err() != nil {
		return err
	}
	status, text := statusOf(err)
	s.send(streamMessage{Message: jsonstream.Message{Error: &jsonstream.Error{Code: status, Message: text}}, Text: text})
	return nil
}

// credentials are those that docker's client sends along. What can't be read is none, as with docker.
func credentials(r *http.Request) registrytypes.AuthConfig {
	c, err := authconfig.Decode(r.Header.Get(registrytypes.AuthHeader))
	if err != nil {
		return registrytypes.AuthConfig{}
	}
	return *c
}

// imageCreate is docker pull and docker import.
func (s *Server) imageCreate(w http.ResponseWriter, r *http.Request, t *tenant) error {
	images, err := s.images(t)
	if err != nil {
		return err
	}
	from, source := dockerhttp.Parameter(r, "fromImage"), dockerhttp.Parameter(r, "fromSrc")
	if from == "" {
		return s.imageImport(w, r, t, images, source)
	}
	ref, all, err := toPull(from, dockerhttp.Parameter(r, "tag"))
	if err != nil {
		return imageError(err)
	}
	out := &transferStream{w: w}
	transfer := registry.Transfer{Platform: dockerhttp.Parameter(r, "platform"), Auth: credentials(r), Progress: out.progress}
	if all {
		return out.end(r, images.PullAll(r.Context(), ref, transfer))
	}
	err = images.Pull(r.Context(), ref, transfer)
	if err == nil {
		t.emitImage(events.ActionPull, reference.FamiliarString(ref), reference.FamiliarName(ref))
	}
	return out.end(r, err)
}

// toPull is what docker pull asks for; all the tags where it names none.
func toPull(from, tag string) (ref reference.Named, all bool, err error) {
	switch {
	case strings.HasPrefix(tag, "sha256:"):
		from += "@" + tag
	case tag != "":
		from += ":" + tag
	}
	n, err := reference.ParseNormalizedNamed(from)
	if err != nil {
		return nil, false, dockerhttp.Invalid("%v", err)
	}
	if ref, err = registry.ParseName(from); err != nil {
		return nil, false, err
	}
	return ref, tag == "" && reference.IsNameOnly(n), nil
}

func (s *Server) imageImport(w http.ResponseWriter, r *http.Request, t *tenant, images *registry.Images, source string) error {
	if source != "-" {
		return dockerhttp.Invalid("importing from an address is not supported: fetch it and give it to docker import -")
	}
	n, err := optionalName(dockerhttp.Parameter(r, "repo"), dockerhttp.Parameter(r, "tag"))
	if err != nil {
		return imageError(err)
	}
	c := registry.Commit{Comment: dockerhttp.Parameter(r, "message")}
	if c.Comment == "" {
		c.Comment = "Imported from " + source
	}
	if err := registry.Change(&c.Config, r.URL.Query()["changes"]); err != nil {
		return imageError(err)
	}
	out := &transferStream{w: w}
	id, err := images.Import(r.Context(), r.Body, dockerhttp.Parameter(r, "platform"), c, n)
	if err == nil {
		out.send(streamMessage{Message: jsonstream.Message{Status: id.String()}})
		named := id.String()
		if n != nil {
			named = reference.FamiliarString(n)
		}
		t.emitImage(events.ActionImport, id.String(), named)
	}
	return out.end(r, err)
}

// optionalName is a name that an image gets; nil for none.
func optionalName(repo, tag string) (reference.NamedTagged, error) {
	if repo == "" {
		return nil, nil //nolint:nilnil // no name is none
	}
	if tag != "" {
		repo += ":" + tag
	}
	n, err := registry.ParseName(repo)
	if err != nil {
		return nil, err
	}
	tagged, ok := n.(reference.NamedTagged)
	if _, digested := n.(reference.Digested); !ok || digested {
		return nil, dockerhttp.Invalid("refusing to create a tag with a digest reference")
	}
	if reference.FamiliarName(n) == string(digest.Canonical) {
		return nil, dockerhttp.Invalid("refusing to create an ambiguous tag using digest algorithm as name")
	}
	return tagged, nil
}

func (s *Server) imageLoad(w http.ResponseWriter, r *http.Request, t *tenant) error {
	images, err := s.images(t)
	if err != nil {
		return err
	}
	out := &transferStream{w: w}
	found, err := images.Load(r.Context(), r.Body)
	for _, l := range found {
		text, named := "Loaded image ID: "+l.ID.String(), l.ID.String()
		if l.Name != nil {
			named = reference.FamiliarString(l.Name)
			text = "Loaded image: " + named
		}
		t.emitImage(events.ActionLoad, l.ID.String(), named)
		out.send(streamMessage{Message: jsonstream.Message{Stream: text + "\n"}})
	}
	return out.end(r, err)
}

func (s *Server) imageSave(w http.ResponseWriter, r *http.Request, t *tenant) error {
	var refs []string
	for _, list := range r.URL.Query()["names"] {
		refs = append(refs, strings.Split(list, ",")...)
	}
	if len(refs) == 0 {
		return dockerhttp.Invalid("name the images to save")
	}
	return s.save(w, r, t, refs)
}

func (s *Server) imageSaveOne(w http.ResponseWriter, r *http.Request, t *tenant) error {
	return s.save(w, r, t, []string{r.PathValue("name")})
}

func (s *Server) save(w http.ResponseWriter, r *http.Request, t *tenant, refs []string) error {
	images, err := s.images(t)
	if err != nil {
		return err
	}
	out := &begunWriter{Writer: w}
	w.Header().Set("Content-Type", "application/x-tar")
	err = images.Save(r.Context(), out, refs)
	if err != nil && out.begun {
		// The client must not take what has come for the whole.
		s.Log.Error("save images", "error", err)
		panic(http.ErrAbortHandler)
	}
	return imageError(err)
}

// A begunWriter knows whether anything was written.
type begunWriter struct {
	io.Writer
	begun bool
}

func (w *begunWriter) Write(p []byte) (int, error) {
	w.begun = true
	return w.Writer.Write(p)
}

func (s *Server) imagePush(w http.ResponseWriter, r *http.Request, t *tenant) error {
	images, err := s.images(t)
	if err != nil {
		return err
	}
	n, err := reference.ParseNormalizedNamed(r.PathValue("name"))
	if err != nil {
		return dockerhttp.Invalid("%v", err)
	}
	if !reference.IsNameOnly(n) {
		return dockerhttp.Invalid("the tag to push is a parameter, tag: %s has one in its name", reference.FamiliarString(n))
	}
	var tags []reference.NamedTagged
	if tag := dockerhttp.Parameter(r, "tag"); tag != "" {
		tagged, err := reference.WithTag(n, tag)
		if err != nil {
			return dockerhttp.Invalid("%v", err)
		}
		tags = append(tags, tagged)
	} else if tags, err = images.Tags(r.Context(), n); err != nil {
		return imageError(err)
	}
	out := &transferStream{w: w}
	for _, tag := range tags {
		done, err := images.Push(r.Context(), tag, registry.Transfer{Auth: credentials(r), Progress: out.progress})
		if err != nil {
			return out.end(r, err)
		}
		aux, err := json.Marshal(done)
		if err != nil {
			return err
		}
		out.send(streamMessage{Message: jsonstream.Message{Aux: (*json.RawMessage)(&aux)}})
		t.emitImage(events.ActionPush, reference.FamiliarString(tag), reference.FamiliarName(tag))
	}
	return nil
}

func (s *Server) imageTag(w http.ResponseWriter, r *http.Request, t *tenant) error {
	images, err := s.images(t)
	if err != nil {
		return err
	}
	n, err := optionalName(dockerhttp.Parameter(r, "repo"), dockerhttp.Parameter(r, "tag"))
	if err != nil {
		return imageError(err)
	}
	if n == nil {
		return dockerhttp.Invalid("invalid reference format: give a repo")
	}
	i, err := images.Resolve(r.Context(), r.PathValue("name"))
	if err != nil {
		return imageError(err)
	}
	if err := images.Tag(r.Context(), i, n); err != nil {
		return imageError(err)
	}
	t.emitImage(events.ActionTag, i.ID.String(), reference.FamiliarString(n))
	w.WriteHeader(http.StatusCreated)
	return nil
}

func (s *Server) imageRemove(w http.ResponseWriter, r *http.Request, t *tenant) error {
	images, err := s.images(t)
	if err != nil {
		return err
	}
	uses, err := s.imageUses(r.Context(), t)
	if err != nil {
		return err
	}
	removed, err := images.Remove(r.Context(), r.PathValue("name"), dockerhttp.Truth(r, "force"), uses)
	if err != nil {
		return imageError(err)
	}
	return dockerhttp.Answer(w, http.StatusOK, t.removals(removed))
}

func (t *tenant) removals(removed []registry.Removed) []image.DeleteResponse {
	answer := []image.DeleteResponse{}
	for _, l := range removed {
		if l.Untagged != "" {
			t.emitImage(events.ActionUnTag, l.Untagged, l.Untagged)
		} else {
			t.emitImage(events.ActionDelete, l.Deleted, l.Deleted)
		}
		answer = append(answer, image.DeleteResponse{Untagged: l.Untagged, Deleted: l.Deleted})
	}
	return answer
}

func (s *Server) imagePrune(w http.ResponseWriter, r *http.Request, t *tenant) error {
	images, err := s.images(t)
	if err != nil {
		return err
	}
	f, err := dockerhttp.ParseFilters(r, "dangling", "until", "label", "label!")
	if err != nil {
		return err
	}
	dangling, err := oneTruth(f, "dangling")
	if err != nil {
		return err
	}
	until, err := untilFilter(f)
	if err != nil {
		return err
	}
	uses, err := s.imageUses(r.Context(), t)
	if err != nil {
		return err
	}
	p, err := images.Prune(r.Context(), registry.PruneFilter{All: dangling != nil && !*dangling, Until: until, Match: func(i *registry.Image) bool {
		return f.Labels("label", i.Config.Config.Labels, false) && f.Labels("label!", i.Config.Config.Labels, true)
	}}, uses)
	if err != nil {
		return imageError(err)
	}
	answer := image.PruneReport{SpaceReclaimed: uint64(p.Space)}
	if p.Removed != nil {
		answer.ImagesDeleted = t.removals(p.Removed)
	}
	t.emitPrune(events.ImageEventType, answer.SpaceReclaimed)
	return dockerhttp.Answer(w, http.StatusOK, answer)
}

// imageDistribution tells what another registry has under a name, without pulling it.
func (s *Server) imageDistribution(w http.ResponseWriter, r *http.Request, t *tenant) error {
	images, err := s.images(t)
	if err != nil {
		return err
	}
	n, err := registry.ParseName(r.PathValue("name"))
	if err != nil {
		return imageError(err)
	}
	found, platforms, err := images.Look(r.Context(), n, credentials(r))
	if err != nil {
		return imageError(err)
	}
	return dockerhttp.Answer(w, http.StatusOK, registrytypes.DistributionInspect{Descriptor: found, Platforms: platforms})
}

// imageUsage is what docker system df shows of images.
func (s *Server) imageUsage(ctx context.Context, t *tenant) (*image.DiskUsage, error) {
	images, err := s.images(t)
	if err != nil {
		return nil, err
	}
	uses, err := s.imageUses(ctx, t)
	if err != nil {
		return nil, err
	}
	all, err := images.List(ctx)
	if err != nil {
		return nil, imageError(err)
	}
	shared, err := images.Usage(ctx, all)
	if err != nil {
		return nil, imageError(err)
	}
	u := &image.DiskUsage{TotalCount: int64(len(all)), TotalSize: shared.Layers, Items: []image.Summary{}}
	var active []*registry.Image
	for _, i := range all {
		one, err := summarize(ctx, images, i, names(i.Tags), names(i.Digests))
		if err != nil {
			return nil, imageError(err)
		}
		one.SharedSize, one.Containers = shared.Shared[i.ID], 0
		for _, use := range uses {
			if use.Image == i.ID {
				one.Containers++
			}
		}
		if one.Containers > 0 {
			active = append(active, i)
		}
		u.Items = append(u.Items, one)
	}
	kept, err := images.Usage(ctx, active)
	if err != nil {
		return nil, imageError(err)
	}
	u.ActiveCount, u.Reclaimable = int64(len(active)), shared.Layers-kept.Layers
	return u, nil
}

// containerUsage is what docker system df shows of containers: how many there are. What they have written is on disks of their nodes, and not counted.
func (s *Server) containerUsage(ctx context.Context, t *tenant) (*container.DiskUsage, error) {
	if err := t.watch.ready(ctx); err != nil {
		return nil, err
	}
	all, err := t.list(ctx)
	if err != nil {
		return nil, err
	}
	u := &container.DiskUsage{TotalCount: int64(len(all)), Items: []container.Summary{}}
	for _, c := range t.askAll(ctx, all, false) {
		if c.state.Running {
			u.ActiveCount++
		}
		u.Items = append(u.Items, t.summary(c))
	}
	return u, nil
}

// diskUsage is docker system df.
func (s *Server) diskUsage(w http.ResponseWriter, r *http.Request, t *tenant) error {
	kinds := r.URL.Query()["type"]
	asked := func(kind system.DiskUsageObject) bool { return len(kinds) == 0 || slices.Contains(kinds, string(kind)) }
	var images *image.DiskUsage
	var containers *container.DiskUsage
	var volumes *volume.DiskUsage
	var err error
	if asked(system.ImageObject) {
		if images, err = s.imageUsage(r.Context(), t); err != nil && !isNotFound(err) { // this server may keep none
			return err
		}
	}
	if asked(system.ContainerObject) {
		if containers, err = s.containerUsage(r.Context(), t); err != nil {
			return err
		}
	}
	if asked(system.VolumeObject) {
		if volumes, err = t.volumeUsage(r.Context()); err != nil && !isStatus(err, http.StatusForbidden) { // the policy may be without them
			return err
		}
	}
	if versions.Version(r) < 52 {
		legacy := map[string]any{"LayersSize": int64(0), "Images": []image.Summary{}, "Containers": []container.Summary{}, "Volumes": []any{}, "BuildCache": []any{}, "BuilderSize": 0}
		if images != nil {
			legacy["LayersSize"], legacy["Images"] = images.TotalSize, images.Items
		}
		if containers != nil {
			legacy["Containers"] = containers.Items
		}
		if volumes != nil {
			legacy["Volumes"] = volumes.Items
		}
		return dockerhttp.Answer(w, http.StatusOK, legacy)
	}
	if !dockerhttp.Truth(r, "verbose") {
		if images != nil {
			images.Items = nil
		}
		if containers != nil {
			containers.Items = nil
		}
		if volumes != nil {
			volumes.Items = nil
		}
	}
	return dockerhttp.Answer(w, http.StatusOK, system.DiskUsage{ImageUsage: images, ContainerUsage: containers, VolumeUsage: volumes})
}

// WorkloadKeys returns the keys by which Nomad signs workload identities. They are asked for again when they are half a minute old.
func WorkloadKeys(nomad *api.Client) func(context.Context) (*jose.JSONWebKeySet, error) {
	var mu sync.Mutex
	var keys *jose.JSONWebKeySet
	var asked time.Time
	return func(ctx context.Context) (*jose.JSONWebKeySet, error) {
		mu.Lock()
		defer mu.Unlock()
		if keys != nil && time.Since(asked) < 30*time.Second {
			return keys, nil
		}
		var found jose.JSONWebKeySet
		if _, err := nomad.Raw().Query("/.well-known/jwks.json", &found, (&api.QueryOptions{AllowStale: true}).WithContext(ctx)); err != nil {
			return nil, err
		}
		keys, asked = &found, time.Now()
		return keys, nil
	}
}
