package webdav

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/net/webdav"

	"github.com/cradlestack/cradlestack/csi-plugin/filer/gateway"
	"github.com/cradlestack/cradlestack/csi-plugin/filer/lease"
	"github.com/cradlestack/cradlestack/csi-plugin/filer/snapshots"
)

// Bounds of what a client takes.
const (
	maxXML    = 64 << 10 // of a body other than a file's
	maxListed = 100_000  // names in a directory that is listed
)

// A Server serves volumes to those who have grants.
type Server struct {
	Lease  *lease.Lease             // that requests are answered under; it is set before Serve
	Meter  gateway.Meter            // so is this, or nil
	Synced func(took time.Duration) // is told how long it took to bring something to stable storage; it is set before Allow, or nil

	dir  string  // of locks
	rate float64 // requests a second of each grant
	log  *slog.Logger

	owners  gateway.Owners
	endings gateway.Endings

	mu      sync.Mutex
	grants  map[string]*granted // by user
	volumes map[string]*opened
}

// An opened volume is open as long as a grant is for it.
type opened struct {
	*volume
	root   string
	grants int
}

// A grant at work.
type granted struct {
	Grant
	volume  *volume
	limit   *gateway.Limit
	ctx     context.Context
	end     context.CancelCauseFunc
	working sync.WaitGroup
}

// New makes a server that keeps volumes' locks in dir, and does as many requests a second of each grant as perSecond says, of 0 all.
func New(dir string, perSecond float64, log *slog.Logger) *Server {
	return &Server{dir: dir, rate: perSecond, log: log, grants: map[string]*granted{}, volumes: map[string]*opened{}}
}

// Allow lets a user in, or changes the grant of that user, whose requests end then. Where nothing is changed they go on.
func (s *Server) Allow(g Grant) error {
	if err := g.check(); err != nil {
		return err
	}
	if s.allows(g) {
		return nil
	}
	if err := s.Forbid(g.User); err != nil {
		return fmt.Errorf("grant %s: %w", g.User, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	o := s.volumes[g.Volume]
	if o == nil {
		if err := os.MkdirAll(s.dir, 0o700); err != nil {
			return err
		}
		v, err := openVolume(g.Volume, g.Root, filepath.Join(s.dir, g.Volume+".json"))
		if err != nil {
			return fmt.Errorf("volume %s over WebDAV: %w", g.Volume, err)
		}
		v.synced = s.Synced
		if g.Snapshots != nil {
			v.snapshots = snapshots.Open(g.Snapshots)
		}
		o = &opened{volume: v, root: g.Root}
		s.volumes[g.Volume] = o
	}
	if o.root != g.Root {
		return fmt.Errorf("grant %s: volume %s is at %s", g.User, g.Volume, o.root)
	}
	o.grants++
	w := &granted{Grant: g, volume: o.volume, limit: s.owners.NewLimit(g.Owner, s.rate)}
	w.ctx, w.end = context.WithCancelCause(context.Background())
	s.grants[g.User] = w
	return nil
}

// allows says whether a grant is there already, and its directory the same.
func (s *Server) allows(g Grant) bool {
	s.mu.Lock()
	is := s.grants[g.User]
	s.mu.Unlock()
	if is == nil {
		return false
	}
	former := is.Grant
	alike := (former.Snapshots == nil) == (g.Snapshots == nil)
	former.Snapshots, g.Snapshots = nil, nil
	if !alike || former != g {
		return false
	}
	open, err := is.volume.root.Stat(".")
	now, nerr := os.Stat(g.Root)
	return err == nil && nerr == nil && os.SameFile(open, now)
}

// errRevoked ends requests.
var errRevoked = errors.New("the grant has been revoked")

// Forbid ends a grant: from its return on nothing is done for it, and no file of its volume is open where it was the last. One that is not there is no error. Where the
// storage keeps what had begun it is gateway.ErrStuck, again and again until that has ended.
func (s *Server) Forbid(user string) error {
	s.mu.Lock()
	s.forbid(user)
	s.mu.Unlock()
	return s.endings.Wait(user)
}

// forbid begins to end a grant. The server is locked.
func (s *Server) forbid(user string) {
	w := s.grants[user]
	if w == nil {
		return
	}
	delete(s.grants, user)
	w.end(errRevoked)
	s.endings.Begin(user, func() {
		w.working.Wait()
		s.mu.Lock()
		defer s.mu.Unlock()
		if o := s.volumes[w.Volume]; o.grants > 1 {
			o.grants--
		} else {
			delete(s.volumes, w.Volume)
			o.volume.snapshots.Close()
			o.volume.root.Close()
		}
	})
}

// Close ends all grants.
func (s *Server) Close() {
	s.mu.Lock()
	for user := range s.grants {
		s.forbid(user)
	}
	s.mu.Unlock()
	s.endings.WaitAll()
}

// Serve answers clients on l, which may be one of TLS, until ctx ends, then those whose requests had begun.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	return gateway.Serve(ctx, l, s, 32<<10, s.Lease, s.Meter, s.log)
}

// admit finds the grant that a request shows.
func (s *Server) admit(r *http.Request) (*granted, bool) {
	user, secret, ok := r.BasicAuth()
	if !ok {
		return nil, false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	w := s.grants[user]
	if w == nil || !w.knows(secret) {
		s.log.Warn("denied", "user", fmt.Sprintf("%.80q", user), "client", r.RemoteAddr)
		return nil, false
	}
	w.working.Add(1)
	return w, true
}

// ServeHTTP answers a request.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	h := w.Header()
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Content-Security-Policy", "sandbox") // a page in one volume is not to act for who reads it in another
	g, ok := s.admit(r)
	if !ok {
		h.Set("WWW-Authenticate", `Basic realm="cradle-filer", charset="UTF-8"`)
		http.Error(w, "say who you are", http.StatusUnauthorized)
		return
	}
	defer g.working.Done()
	gateway.Admitted(r)
	rc := http.NewResponseController(w)
	ctx, cancel := context.WithCancelCause(r.Context())
	defer cancel(nil)
	stop := context.AfterFunc(g.ctx, func() {
		cancel(errRevoked)
		// What waits for the client waits no longer.
		_ = rc.SetReadDeadline(time.Now())
		_ = rc.SetWriteDeadline(time.Now())
	})
	defer stop()
	r = r.WithContext(ctx)
	r.Body = &body{ReadCloser: r.Body, ctx: g.ctx}
	out := &answer{ResponseWriter: w, ctx: g.ctx}
	end, err := g.limit.Begin(ctx)
	if err != nil { // or the client has gone, or the grant: to say nothing would be to say that it is done
		h.Set("Retry-After", "1")
		http.Error(w, err.Error(), http.StatusServiceUnavailable)
		return
	}
	defer end()
	q := &request{w: out, r: r, server: s, change: change{g.volume, g.Grant}}
	if err := q.serve(); err != nil {
		a := explain(err)
		level := slog.LevelDebug
		if a.code == http.StatusInternalServerError {
			level = slog.LevelWarn
		}
		s.log.Log(ctx, level, "request", "method", r.Method, "path", r.URL.Path, "user", g.User, "code", a.code, "error", a.err)
		if a.code == http.StatusServiceUnavailable {
			h.Set("Retry-After", "1")
		}
		if !out.begun {
			a.write(out)
		}
	}
}

// write answers with the refusal.
func (r *refusal) write(w http.ResponseWriter) {
	if r.condition == "" {
		http.Error(w, r.err.Error(), r.code)
		return
	}
	w.Header().Set("Content-Type", "application/xml; charset=utf-8")
	w.WriteHeader(r.code)
	_, _ = io.WriteString(w, `<?xml version="1.0" encoding="utf-8"?><D:error xmlns:D="DAV:">`+r.condition+`</D:error>`) // the client may have gone
}

// A body ends with the grant.
type body struct {
	io.ReadCloser
	ctx context.Context
}

func (b *body) Read(p []byte) (int, error) {
	if b.ctx.Err() != nil {
		return 0, errRevoked
	}
	n, err := b.ReadCloser.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		var large *http.MaxBytesError
		if !errors.As(err, &large) {
			err = bad("the request's body: %w", err)
		}
	}
	return n, err
}

// An answer ends with it as well.
type answer struct {
	http.ResponseWriter
	ctx   context.Context
	begun bool
}

// Unwrap is for http.ResponseController.
func (a *answer) Unwrap() http.ResponseWriter { return a.ResponseWriter }

// WriteHeader notes that the answer is decided.
func (a *answer) WriteHeader(code int) {
	a.begun = true
	a.ResponseWriter.WriteHeader(code)
}

func (a *answer) Write(p []byte) (int, error) {
	a.begun = true
	if a.ctx.Err() != nil {
		return 0, errRevoked
	}
	return a.ResponseWriter.Write(p)
}

// A request that has shown a grant.
type request struct {
	change
	w      *answer
	r      *http.Request
	server *Server
	path   string // in the volume
	from   place  // that it names
	lists  []list // of its If header
}

// prefix is of the volume's URLs.
func (q *request) prefix() string { return "/" + q.grant.Volume }

// inside is the place in the volume of a URL's path.
func (q *request) inside(p string) (string, bool) {
	rest, ok := strings.CutPrefix(p, q.prefix())
	if !ok || rest != "" && rest[0] != '/' || strings.ContainsRune(rest, 0) {
		return "", false
	}
	for step := range strings.SplitSeq(rest, "/") {
		if step == ".." {
			return "", false
		}
	}
	return path.Clean("/" + rest), true
}

func (q *request) serve() error {
	var ok bool
	q.path, ok = q.inside(q.r.URL.Path)
	q.from = place{q.volume, q.prefix(), q.path}
	if !ok {
		if path.Clean(q.r.URL.Path) == "/" {
			return q.top()
		}
		return refuse(http.StatusNotFound, "%s is not in the volume of this user, %s", q.r.URL.Path, q.prefix())
	}
	switch q.r.Method {
	case http.MethodPut:
	default:
		q.r.Body = http.MaxBytesReader(q.w, q.r.Body, maxXML)
	}
	if err := visible(q.path); err != nil {
		return err
	}
	if header := q.r.Header.Get("If"); header != "" {
		var err error
		if q.lists, err = parseIf(header); err != nil {
			return err
		}
	}
	if q.former(q.path) {
		leave, err := q.enter()
		if err != nil {
			return err
		}
		defer leave()
	}
	switch q.r.Method {
	case http.MethodOptions:
		return q.options()
	case http.MethodGet, http.MethodHead:
		return q.get()
	case "PROPFIND":
		return q.propfind()
	}
	do := map[string]func() error{
		http.MethodPut: q.put, http.MethodDelete: q.delete, "MKCOL": q.mkcol, "COPY": q.copyTo, "MOVE": q.moveTo, "PROPPATCH": q.proppatch, "LOCK": q.lock, "UNLOCK": q.unlock,
	}[q.r.Method]
	switch {
	case do == nil:
		q.w.Header().Set("Allow", q.allowed())
		return refuse(http.StatusMethodNotAllowed, "%.20q is not done here", q.r.Method)
	case q.grant.ReadOnly:
		return refuse(http.StatusForbidden, "user %s may only read", q.grant.User)
	}
	switch q.r.Method {
	case http.MethodPut, "LOCK": // what they make is there before, and put goes through
	default:
		// The rest of the body, if there is one, comes before others have to wait.
		data, err := io.ReadAll(q.r.Body)
		if err != nil {
			return err
		}
		q.r.Body = io.NopCloser(bytes.NewReader(data))
		ctx, leave, err := q.grant.Gate.Enter(q.r.Context())
		if err != nil {
			return err
		}
		defer leave()
		q.r = q.r.WithContext(ctx)
	}
	return do()
}

// allowed are the methods that there are for what a request names.
func (q *request) allowed() string {
	if q.from.volume != q.volume {
		return strings.Join(formerMethods, ", ")
	}
	return "OPTIONS, GET, HEAD, PUT, DELETE, MKCOL, COPY, MOVE, PROPFIND, PROPPATCH, LOCK, UNLOCK"
}

func (q *request) options() error {
	q.w.Header().Set("DAV", "1, 2, 3")
	q.w.Header().Set("MS-Author-Via", "DAV") // without which Windows takes it for FrontPage's
	q.w.Header().Set("Allow", q.allowed())
	q.w.WriteHeader(http.StatusOK)
	return nil
}

// top is what is above the volume: some clients look there first. It has the volume's name and nothing else.
func (q *request) top() error {
	switch q.r.Method {
	case http.MethodOptions:
		return q.options()
	case "PROPFIND":
		above := webdav.NewMemFS()
		if err := above.Mkdir(q.r.Context(), q.prefix(), 0o755); err != nil {
			return err
		}
		return q.list(above, "", "/")
	}
	return refuse(http.StatusForbidden, "the volume is at %s", q.prefix())
}

// conditions decides by the headers If, If-Match and If-None-Match.
func (q *request) conditions() error {
	inside := func(resource string) (string, bool) {
		p, ok := local(resource, q.r)
		if !ok {
			return "", false
		}
		return q.inside(p)
	}
	has := func(p, token string) bool {
		return slices.ContainsFunc(q.locks.on(p), func(k lock) bool { return k.Token == token })
	}
	tag := q.tag(q.path)
	switch {
	case q.lists != nil && !holds(q.lists, q.path, inside, q.tag, has):
		return refuse(http.StatusPreconditionFailed, "If: none of its lists holds")
	case q.r.Header.Get("If-Match") != "" && !matches(q.r.Header.Get("If-Match"), tag):
		return refuse(http.StatusPreconditionFailed, "If-Match: it is another one")
	case q.r.Header.Get("If-None-Match") != "" && matches(q.r.Header.Get("If-None-Match"), tag):
		return refuse(http.StatusPreconditionFailed, "If-None-Match: it is there")
	}
	return nil
}

// tag is the entity tag of what is at a path, "" of nothing.
func (q *request) tag(p string) string {
	at := place{volume: q.volume, path: p}
	if p == q.path {
		at = q.from
	}
	if fi, err := at.stat(at.path); err == nil {
		return fi.(info).etag()
	}
	return ""
}

// may says whether a path can be changed as far as conditions and locks go. names says that it appears or disappears.
func (q *request) may(p string, names, tree bool) error {
	if err := q.conditions(); err != nil {
		return err
	}
	named := tokens(q.lists)
	if err := q.locks.allows(q.grant.User, named, p, tree); err != nil {
		return err
	}
	if names {
		return q.locks.allows(q.grant.User, named, path.Dir(p), false)
	}
	return nil
}

// get answers GET and HEAD, with ranges and conditions.
func (q *request) get() error {
	if q.from.volume == nil {
		return q.noFile()
	}
	f, err := q.from.open(q.from.path)
	if err != nil {
		return err
	}
	defer f.Close()
	if f.info.IsDir() {
		return q.noFile()
	}
	q.w.Header().Set("ETag", f.info.etag())
	http.ServeContent(q.w, q.r, path.Base(q.path), f.info.ModTime(), f)
	return nil
}

// noFile refuses a directory's content.
func (q *request) noFile() error {
	q.w.Header().Set("Allow", strings.NewReplacer("GET, HEAD, ", "", "PUT, ", "", "MKCOL, ", "").Replace(q.allowed()))
	return refuse(http.StatusMethodNotAllowed, "%s is a directory: list it with a WebDAV client", q.path)
}

// propfind lists, one level at most (RFC 4918 §9.1 lets a server refuse more).
func (q *request) propfind() error {
	depth := q.r.Header.Get("Depth")
	switch depth {
	case "0", "1":
	case "", "infinity":
		return &refusal{code: http.StatusForbidden, condition: `<D:propfind-finite-depth/>`, err: errors.New("a listing has depth 0 or 1")}
	default:
		return bad("Depth: %.20q", depth)
	}
	if q.from.volume == nil {
		return q.listSnapshots()
	}
	f, err := q.from.open(q.from.path)
	if err != nil {
		return err
	}
	many := false
	if depth == "1" && f.info.IsDir() {
		many, err = f.tooMany(maxListed)
	}
	f.Close()
	if err != nil {
		return err
	}
	if many {
		return refuse(http.StatusInsufficientStorage, "%s has more than %d names, which is too many for a listing", q.path, maxListed)
	}
	return q.list(view{q.from.volume, q.from.prefix}, q.from.prefix, q.from.prefix+q.from.path)
}

// checkXML reads the body, refuses what is no XML, and lets others read it.
func (q *request) checkXML() error {
	data, err := io.ReadAll(q.r.Body)
	if err != nil {
		return err
	}
	q.r.Body = io.NopCloser(bytes.NewReader(data))
	return checkXML(data)
}

// list has the library answer.
func (q *request) list(files webdav.FileSystem, prefix, p string) error {
	if err := q.checkXML(); err != nil {
		return err
	}
	var failed error
	h := webdav.Handler{Prefix: prefix, FileSystem: files, LockSystem: noLocks{}, Logger: func(_ *http.Request, err error) { failed = err }}
	r := q.r.Clone(q.r.Context())
	r.URL.Path = p
	r.Header.Del("If") // has been dealt with
	h.ServeHTTP(q.w, r)
	if failed != nil {
		q.server.log.Debug("request", "method", r.Method, "path", p, "user", q.grant.User, "error", failed)
	}
	return nil
}

// noLocks lets the library do as it is told.
type noLocks struct{}

func (noLocks) Confirm(time.Time, string, string, ...webdav.Condition) (func(), error) {
	return func() {}, nil
}
func (noLocks) Create(time.Time, webdav.LockDetails) (string, error) { return "", nil }
func (noLocks) Refresh(time.Time, string, time.Duration) (webdav.LockDetails, error) {
	return webdav.LockDetails{}, webdav.ErrNoSuchLock
}
func (noLocks) Unlock(time.Time, string) error { return nil }

func (q *request) proppatch() error {
	if _, err := q.stat(q.path); err != nil {
		return err
	}
	if err := q.may(q.path, false, false); err != nil {
		return err
	}
	return q.list(view{q.volume, q.prefix()}, q.prefix(), q.prefix()+q.path)
}

func (q *request) put() error {
	if q.r.Header.Get("Content-Range") != "" {
		return bad("Content-Range: a file is put whole (RFC 9110 §14.5)")
	}
	if strings.HasSuffix(q.r.URL.Path, "/") {
		return refuse(http.StatusMethodNotAllowed, "%s would be a directory: make it with MKCOL", q.path)
	}
	// Before the body is asked for, and again when it is here.
	admit := func(isNew bool) error { return q.may(q.path, isNew, false) }
	if err := admit(q.tag(q.path) == ""); err != nil {
		return err
	}
	if fi, err := q.stat(q.path); err == nil && fi.IsDir() {
		return refuse(http.StatusMethodNotAllowed, "%s is a directory", q.path)
	}
	now, created, err := q.change.put(q.r.Context(), q.path, q.r.Body, admit)
	if err != nil {
		return err
	}
	q.w.Header().Set("ETag", now.etag())
	q.done(created)
	return nil
}

// done answers that something was made, or replaced or removed.
func (q *request) done(created bool) {
	if created {
		q.w.WriteHeader(http.StatusCreated)
	} else {
		q.w.WriteHeader(http.StatusNoContent)
	}
}

func (q *request) mkcol() error {
	if n, err := io.ReadFull(q.r.Body, make([]byte, 1)); n > 0 {
		return refuse(http.StatusUnsupportedMediaType, "MKCOL has no body here")
	} else if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	if err := q.may(q.path, true, false); err != nil {
		return err
	}
	if err := q.mkdir(q.path); err != nil {
		return err
	}
	q.done(true)
	return nil
}

func (q *request) delete() error {
	switch {
	case q.path == "/":
		return refuse(http.StatusForbidden, "the volume itself is not removed this way")
	case q.r.Header.Get("Depth") != "" && q.r.Header.Get("Depth") != "infinity":
		return bad("Depth: what is removed is removed with all below it") // RFC 4918 §9.6.1
	}
	if there, err := q.exists(q.path); err != nil {
		return err
	} else if !there {
		return refuse(http.StatusNotFound, "%s is not there", q.path)
	}
	if err := q.may(q.path, true, true); err != nil {
		return err
	}
	if err := q.remove(q.path); err != nil {
		return err
	}
	if err := q.locks.forget(q.path); err != nil {
		return err
	}
	q.done(false)
	return nil
}

// destination is where a COPY or MOVE leads, which must have the header's leave to replace what is there.
func (q *request) destination() (to string, err error) {
	header := q.r.Header.Get("Destination")
	p, ok := local(header, q.r)
	if ok {
		to, ok = q.inside(p)
	}
	switch {
	case header == "":
		return "", bad("Destination is missing")
	case !ok:
		return "", refuse(http.StatusBadGateway, "Destination: %.200q is not in this volume", header)
	case to == "/" || q.path == "/":
		return "", refuse(http.StatusForbidden, "the volume itself can't be copied, moved or replaced")
	case q.former(to):
		return "", refuse(http.StatusForbidden, "Destination: %s: snapshots stay as they are", to)
	case visible(to) != nil:
		return "", refuse(http.StatusForbidden, "Destination: %s is this server's", to)
	case to == q.path:
		return "", refuse(http.StatusForbidden, "source and destination are the same")
	case below(q.path, to):
		return "", refuse(http.StatusForbidden, "the source is in what would be replaced")
	}
	there, err := q.exists(to)
	if err != nil {
		return "", explainParent(err)
	}
	if there && q.r.Header.Get("Overwrite") == "F" {
		return "", refuse(http.StatusPreconditionFailed, "%s exists", to)
	}
	return to, nil
}

// explainParent makes of a parent that is no directory the conflict that it is for what would be made in it.
func explainParent(err error) error {
	if explain(err).code == http.StatusNotFound {
		return refuse(http.StatusConflict, "%w", err)
	}
	return err
}

func (q *request) copyTo() error {
	if q.from.volume == nil {
		return refuse(http.StatusForbidden, "%s: copy what is in a snapshot", q.path)
	}
	source, err := q.from.open(q.from.path)
	if err != nil {
		return err
	}
	defer source.Close()
	to, err := q.destination()
	if err != nil {
		return err
	}
	depth := q.r.Header.Get("Depth")
	switch {
	case depth != "" && depth != "0" && depth != "infinity":
		return bad("Depth: %.20q", depth)
	case source.info.IsDir() && below(to, q.path):
		return refuse(http.StatusForbidden, "the destination is in the source")
	}
	if err := q.may(to, true, true); err != nil {
		return err
	}
	replaced, err := q.copy(q.r.Context(), source, to, depth != "0")
	if err != nil {
		return err
	}
	q.done(!replaced)
	return nil
}

func (q *request) moveTo() error {
	if there, err := q.exists(q.path); err != nil {
		return err
	} else if !there {
		return refuse(http.StatusNotFound, "%s is not there", q.path)
	}
	to, err := q.destination()
	if err != nil {
		return err
	}
	switch {
	case q.r.Header.Get("Depth") != "" && q.r.Header.Get("Depth") != "infinity":
		return bad("Depth: what is moved is moved with all below it") // RFC 4918 §9.9.2
	case below(to, q.path):
		return refuse(http.StatusForbidden, "the destination is in the source")
	}
	for _, p := range []string{q.path, to} {
		if err := q.may(p, true, true); err != nil {
			return err
		}
	}
	replaced, err := q.move(q.path, to)
	if err != nil {
		return err
	}
	// What was replaced has no locks any more either, but where its name is the destination's the lock that allowed it stays.
	if err := q.locks.forget(q.path); err != nil {
		return err
	}
	q.done(!replaced)
	return nil
}

func (q *request) lock() error {
	depth := q.r.Header.Get("Depth")
	if depth != "" && depth != "0" && depth != "infinity" {
		return bad("Depth: %.20q", depth)
	}
	k, refresh, err := parseLockInfo(q.r.Body)
	if err != nil {
		return err
	}
	seconds := parseTimeout(q.r.Header.Get("Timeout"))
	if refresh {
		if q.lists == nil {
			return bad("If: a lock is refreshed that this header names")
		}
		if k, err = q.locks.refresh(q.path, q.grant.User, tokens(q.lists), seconds); err != nil {
			return err
		}
		return q.showLock(k, http.StatusOK)
	}
	if err := q.conditions(); err != nil {
		return err
	}
	k.Path, k.Deep, k.User, k.Seconds = q.path, depth != "0", q.grant.User, seconds
	code := http.StatusOK
	if _, err := q.stat(q.path); errors.Is(err, fs.ErrNotExist) {
		// To lock a name that nothing has makes an empty file of it (RFC 4918 §7.3).
		if err := q.may(q.path, true, false); err != nil {
			return err
		}
		if _, _, err := q.change.put(q.r.Context(), q.path, strings.NewReader(""), func(isNew bool) error {
			if !isNew {
				return refuse(http.StatusConflict, "%s has just been made", q.path)
			}
			return nil
		}); err != nil {
			return err
		}
		code = http.StatusCreated
	} else if err != nil {
		return explainParent(err)
	}
	if k, err = q.locks.take(k); err != nil {
		return err
	}
	q.w.Header().Set("Lock-Token", "<"+k.Token+">")
	return q.showLock(k, code)
}

func (q *request) showLock(k lock, code int) error {
	q.w.Header().Set("Content-Type", "application/xml; charset=utf-8")
	q.w.WriteHeader(code)
	_, err := io.WriteString(q.w, `<?xml version="1.0" encoding="utf-8"?><D:prop xmlns:D="DAV:"><D:lockdiscovery>`+k.active(q.prefix())+`</D:lockdiscovery></D:prop>`)
	return err
}

func (q *request) unlock() error {
	token := q.r.Header.Get("Lock-Token")
	if len(token) < 3 || token[0] != '<' || token[len(token)-1] != '>' {
		return bad("Lock-Token: it is no <token>")
	}
	if err := q.locks.release(q.path, q.grant.User, token[1:len(token)-1]); err != nil {
		return err
	}
	q.done(false)
	return nil
}
