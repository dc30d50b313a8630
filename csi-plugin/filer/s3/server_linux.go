package s3

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/http/httputil"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sync/semaphore"
	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/csi-plugin/filer/gateway"
	"github.com/cradlestack/cradlestack/csi-plugin/filer/lease"
	"github.com/cradlestack/cradlestack/csi-plugin/filer/snapshots"
)

const (
	startTime = time.Minute
	idleTime  = 10 * time.Minute // after which a process is ended that nobody uses

	// A body that is no object's content is read whole before anything of it is looked at. The largest are 10,000 parts, and 1000 keys that are to be removed.
	maxBody, maxBodies = 8 << 20, 16 << 20 // of one, and of those of one grant that are larger than smallBody
	smallBody          = 64 << 10

	maxProcesses = 128 // of some 20 MiB each: a grant is made by whoever may change a volume
)

// A Server serves volumes to those who have grants.
type Server struct {
	Lease *lease.Lease  // that requests are answered under; it is set before Serve
	Meter gateway.Meter // so is this, or nil
	Leash *os.File      // each process has it open: who reads at its other end knows when the last one has ended. It is set before Serve

	Synced func(took time.Duration) // is told how long it took to bring a change to stable storage; it is set before Serve, or nil

	program string
	dir     string
	rate    float64 // requests a second of each grant
	log     *slog.Logger

	most      int64 // processes
	processes atomic.Int64

	owners  gateway.Owners
	endings gateway.Endings

	mu     sync.Mutex
	grants map[string]*granted // by access key
}

// New makes a server that runs program, cradle-s3, with its sockets in dir, and does as many requests a second of each grant as perSecond says, of 0 all.
func New(program, dir string, perSecond float64, log *slog.Logger) (*Server, error) {
	if err := unix.Access(program, unix.X_OK); err != nil {
		return nil, fmt.Errorf("%s: %w; it is built with cradle-filer", program, err)
	}
	if err := os.RemoveAll(dir); err != nil { // what a process that was killed has left
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return nil, err
	}
	return &Server{most: maxProcesses, program: program, dir: dir, rate: perSecond, log: log, grants: map[string]*granted{}}, nil
}

// A grant at work.
type granted struct {
	Grant
	server *Server
	limit  *gateway.Limit
	bodies *semaphore.Weighted
	root   *os.File
	past   *snapshots.Opened // nil where there are none
	proxy  *httputil.ReverseProxy
	ctx    context.Context
	end    context.CancelFunc

	working sync.WaitGroup

	mu    sync.Mutex
	child *child // nil if there is none
	busy  int
	since time.Time // it is not busy
	idle  *time.Timer
}

// Allow lets a user in, or changes the grant of that user, whose requests end then. Where nothing is changed they go on.
func (s *Server) Allow(g Grant) error {
	if err := CheckBucket(g.Volume); err != nil {
		return fmt.Errorf("volume %s over S3: %w", g.Volume, err)
	}
	if s.allows(g) {
		return nil
	}
	if err := s.Forbid(g.Key); err != nil {
		return fmt.Errorf("grant %s: %w", g.Key, err)
	}
	root, err := os.Open(g.Root)
	if err != nil {
		return err
	}
	w := &granted{Grant: g, server: s, limit: s.owners.NewLimit(g.Owner, s.rate), bodies: semaphore.NewWeighted(maxBodies), root: root}
	if g.Snapshots != nil {
		w.past = snapshots.Open(g.Snapshots)
	}
	w.ctx, w.end = context.WithCancel(context.Background())
	w.proxy = &httputil.ReverseProxy{
		// The signature is of host, path and headers as the client has sent them.
		Rewrite:        func(r *httputil.ProxyRequest) { r.Out.URL.Scheme, r.Out.URL.Host, r.Out.Host = "http", "s3", r.In.Host },
		Transport:      &http.Transport{DisableCompression: true, DisableKeepAlives: true, DialContext: w.dial},
		ModifyResponse: w.persist,
		ErrorHandler:   w.failed,
		ErrorLog:       slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.grants[g.Key] = w
	return nil
}

// allows says whether a grant is there already, and its directory the same.
func (s *Server) allows(g Grant) bool {
	s.mu.Lock()
	is := s.grants[g.Key]
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
	open, err := is.root.Stat()
	now, nerr := os.Stat(g.Root)
	return err == nil && nerr == nil && os.SameFile(open, now)
}

// Forbid ends a grant: from its return on nothing is done for it. One that is not there is no error. Where the storage keeps what had begun it is gateway.ErrStuck, again
// and again until that has ended.
func (s *Server) Forbid(key string) error {
	s.mu.Lock()
	s.forbid(key)
	s.mu.Unlock()
	return s.endings.Wait(key)
}

// forbid begins to end a grant. The server is locked.
func (s *Server) forbid(key string) {
	w := s.grants[key]
	if w == nil {
		return
	}
	delete(s.grants, key)
	w.end()
	s.endings.Begin(key, func() {
		w.mu.Lock()
		w.stop()
		w.mu.Unlock()
		w.working.Wait()
		w.mu.Lock()
		w.stop()
		w.mu.Unlock()
		w.past.Close()
		w.root.Close()
	})
}

// Close ends all grants.
func (s *Server) Close() {
	s.mu.Lock()
	for key := range s.grants {
		s.forbid(key)
	}
	s.mu.Unlock()
	s.endings.WaitAll()
}

// Rest ends the processes that there are. The next request of a grant starts one again.
func (s *Server) Rest() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, w := range s.grants {
		w.mu.Lock()
		w.stop()
		w.mu.Unlock()
	}
}

// Serve answers clients on l until ctx ends, then those whose requests had begun.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	return gateway.Serve(ctx, l, s, 64<<10, s.Lease, s.Meter, s.log)
}

// ServeHTTP answers a request.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	g := s.grants[accessKey(r)]
	if g != nil {
		g.working.Add(1)
	}
	s.mu.Unlock()
	if g == nil {
		s.log.Debug("denied", "client", r.RemoteAddr)
		refuse(w, http.StatusForbidden, "AccessDenied", "the request is signed by no key that has a grant")
		return
	}
	defer g.working.Done()
	// Buckets are made and removed with their volumes.
	bucket, key, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/"), "/")
	if bare := bucket != "" && key == "" && !subresource(r); bare && (r.Method == http.MethodPut || r.Method == http.MethodDelete) {
		if r.Method == http.MethodPut && bucket == g.Volume {
			refuse(w, http.StatusConflict, "BucketAlreadyOwnedByYou", "the bucket is there")
		} else {
			refuse(w, http.StatusForbidden, "AccessDenied", "buckets are made and removed with their volumes")
		}
		return
	}
	content := r.Method == http.MethodPut && key != "" && (!subresource(r) || r.URL.Query().Has("partNumber") && r.URL.Query().Has("uploadId"))
	if !content && r.ContentLength > maxBody {
		refuseBody(w)
		return
	}
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	defer context.AfterFunc(g.ctx, cancel)()
	end, err := g.limit.Begin(ctx)
	if err != nil {
		putOff(w, "SlowDown", err) // or the client has gone, or the grant
		return
	}
	defer end()
	gateway.Admitted(r)
	if takes := r.ContentLength; !content && (takes < 0 || takes > smallBody) {
		if takes < 0 {
			takes = maxBody
		}
		if err := g.bodies.Acquire(ctx, takes); err != nil {
			putOff(w, "ServiceUnavailable", err) // the client has gone, or the grant
			return
		}
		defer g.bodies.Release(takes)
		r.Body = http.MaxBytesReader(w, r.Body, maxBody)
	}
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		within, leave, err := g.Gate.Enter(ctx)
		if err != nil {
			putOff(w, "ServiceUnavailable", err) // the client has gone, or the grant
			return
		}
		defer leave()
		ctx = within
		defer func() {
			if errors.Is(context.Cause(within), gateway.ErrHeld) {
				// Whatever of it is still at work in the process ends before others go on.
				g.mu.Lock()
				defer g.mu.Unlock()
				g.stop()
			}
		}()
	}
	// What waits for the client's bytes waits no longer then: the proxy would until they come.
	defer context.AfterFunc(ctx, func() { _ = http.NewResponseController(w).SetReadDeadline(time.Now()) })()
	g.makeRoom()
	defer g.use()()
	g.proxy.ServeHTTP(w, r.WithContext(ctx))
}

// putOff has the client try again. To say nothing would be to say that it is done.
func putOff(w http.ResponseWriter, name string, why error) {
	w.Header().Set("Retry-After", "1")
	refuse(w, http.StatusServiceUnavailable, name, why.Error())
}

func refuseBody(w http.ResponseWriter) {
	refuse(w, http.StatusBadRequest, "MaxMessageLengthExceeded", fmt.Sprintf("the request has more than %d bytes, and is no object's content", maxBody))
}

// subresource says whether a request is for something about a bucket rather than for the bucket.
func subresource(r *http.Request) bool {
	for name := range r.URL.Query() {
		if !strings.HasPrefix(name, "X-Amz-") && name != "x-id" {
			return true
		}
	}
	return false
}

func refuse(w http.ResponseWriter, code int, name, message string) {
	var text bytes.Buffer
	_ = xml.EscapeText(&text, []byte(message)) // a buffer takes all
	w.Header().Set("Content-Type", "application/xml")
	w.WriteHeader(code)
	fmt.Fprintf(w, "%s<Error><Code>%s</Code><Message>%s</Message></Error>", xml.Header, name, &text)
}

// failed answers a request that could not be forwarded. Clients try again.
func (g *granted) failed(w http.ResponseWriter, r *http.Request, err error) {
	if g.ctx.Err() != nil {
		refuse(w, http.StatusForbidden, "AccessDenied", "the grant has been revoked")
		return
	}
	var large *http.MaxBytesError
	if errors.As(err, &large) {
		refuseBody(w)
		return
	}
	g.server.log.Warn("request over S3", "grant", g.Key, "method", r.Method, "path", r.URL.Path, "error", err)
	putOff(w, "ServiceUnavailable", errors.New("try again"))
}

// persist puts what a request has changed on stable storage before it is answered.
func (g *granted) persist(r *http.Response) error {
	if r.Request.Method != http.MethodGet && r.Request.Method != http.MethodHead && r.StatusCode < 300 {
		began := time.Now()
		err := unix.Syncfs(int(g.root.Fd()))
		if g.server.Synced != nil {
			g.server.Synced(time.Since(began))
		}
		return err
	}
	return nil
}

// use keeps the process from being idle until what it returns is called.
func (g *granted) use() (done func()) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.busy++
	if g.idle != nil {
		g.idle.Stop()
	}
	return func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		if g.busy--; g.busy == 0 {
			g.since = time.Now()
			g.idle = time.AfterFunc(idleTime, func() {
				g.mu.Lock()
				defer g.mu.Unlock()
				if g.busy == 0 {
					g.stop()
				}
			})
		}
	}
}

// dial connects to the grant's process, which it starts where there is none.
func (g *granted) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.ctx.Err() != nil {
		return nil, g.ctx.Err()
	}
	if g.child != nil && g.child.ended() {
		g.server.log.Warn("cradle-s3 has ended", "grant", g.Key, "state", g.child.cmd.ProcessState)
		g.stop()
	}
	if g.child == nil {
		if g.server.processes.Add(1) > g.server.most {
			g.server.processes.Add(-1)
			return nil, fmt.Errorf("%d processes are at work for other grants", g.server.most)
		}
		c, err := g.start()
		if err != nil {
			g.server.processes.Add(-1)
			return nil, err
		}
		g.child = c
	}
	return g.child.connect(ctx)
}

// stop ends the process, if there is one. Its lock is held.
func (g *granted) stop() {
	if g.idle != nil {
		g.idle.Stop()
	}
	if g.child != nil {
		g.child.stop()
		g.child = nil
		g.server.processes.Add(-1)
	}
}

// makeRoom ends the process that nobody has used for longest, where there can be no more and this grant has none.
func (g *granted) makeRoom() {
	g.mu.Lock()
	has := g.child != nil
	g.mu.Unlock()
	s := g.server
	if has || s.processes.Load() < s.most {
		return
	}
	s.mu.Lock()
	all := slices.Collect(maps.Values(s.grants))
	s.mu.Unlock()
	var longest *granted
	var since time.Time
	for _, w := range all {
		if !w.mu.TryLock() {
			continue // it is starting one
		}
		if w.child != nil && w.busy == 0 && (longest == nil || w.since.Before(since)) {
			longest, since = w, w.since
		}
		w.mu.Unlock()
	}
	if longest == nil {
		return
	}
	longest.mu.Lock()
	defer longest.mu.Unlock()
	if longest.busy == 0 {
		longest.stop()
	}
}

// A child is a process of cradle-s3.
type child struct {
	cmd   *exec.Cmd
	leash *os.File // it ends when this is closed, by whatever
	guide *guide   // nil where there are no snapshots
	run   string
	done  chan struct{}
}

// configuration is cradle-s3's.
type configuration struct {
	Root     string `json:"root"`
	Bucket   string `json:"bucket"`
	Run      string `json:"run"`
	Mount    string `json:"mount"`
	Key      string `json:"key"`
	Secret   string `json:"secret"`
	ReadOnly bool   `json:"readOnly"`
	UID      int    `json:"uid"`
	GID      int    `json:"gid"`

	Snapshots string `json:"snapshots"` // name of the socket in Run of a guide; "" for none
}

func (g *granted) start() (_ *child, err error) {
	sum := sha256.Sum256([]byte(g.Key)) // sockets' paths have 107 bytes at most (unix(7)), and keys may have more
	base := filepath.Join(g.server.dir, hex.EncodeToString(sum[:8]))
	c := &child{run: filepath.Join(base, "run"), done: make(chan struct{})}
	mount := filepath.Join(base, "root")
	if err := os.RemoveAll(base); err != nil {
		return nil, err
	}
	for _, dir := range []string{c.run, mount} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, err
		}
	}
	if err := os.Chown(c.run, g.UID, g.GID); err != nil {
		return nil, err
	}
	at := configuration{Root: g.Root, Bucket: g.Volume, Run: c.run, Mount: mount, Key: g.Key, Secret: g.Secret, ReadOnly: g.ReadOnly, UID: g.UID, GID: g.GID}
	if g.past != nil {
		at.Snapshots = guideSocket
	}
	data, err := json.Marshal(at)
	if err != nil {
		return nil, err
	}
	fd, err := unix.MemfdCreate("cradle-s3", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, err
	}
	config := os.NewFile(uintptr(fd), "configuration")
	defer config.Close()
	if _, err := config.Write(data); err != nil {
		return nil, err
	}
	theirs, leash, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer theirs.Close()
	c.leash = leash
	output := &lines{log: g.server.log, grant: g.Key}
	c.cmd = exec.Command(g.server.program, "start")
	c.cmd.ExtraFiles = []*os.File{config, theirs}
	if g.server.Leash != nil {
		c.cmd.ExtraFiles = append(c.cmd.ExtraFiles, g.server.Leash)
	}
	c.cmd.Env = []string{}
	c.cmd.Stdout, c.cmd.Stderr = output, output
	c.cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWNET | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS}
	if g.past != nil {
		if c.guide, err = g.newGuide(c.run); err != nil {
			leash.Close()
			return nil, err
		}
	}
	if err := c.cmd.Start(); err != nil {
		c.guide.close()
		leash.Close()
		return nil, fmt.Errorf("start %s: %w", g.server.program, err)
	}
	go func() {
		defer close(c.done)
		c.cmd.Wait()
	}()
	ctx, cancel := context.WithTimeout(g.ctx, startTime)
	defer cancel()
	for {
		conn, err := c.connect(ctx)
		if err == nil {
			conn.Close()
			return c, nil
		}
		select {
		case <-time.After(5 * time.Millisecond):
			continue
		case <-c.done:
			err = fmt.Errorf("cradle-s3 has ended: %v: %s", c.cmd.ProcessState, output.last())
		case <-ctx.Done():
			err = fmt.Errorf("cradle-s3 does not begin: %w", err)
		}
		c.stop()
		return nil, err
	}
}

func (c *child) connect(ctx context.Context) (net.Conn, error) {
	conn, err := new(net.Dialer).DialContext(ctx, "unix", filepath.Join(c.run, "s3.sock"))
	if err != nil {
		return nil, err
	}
	return &line{Conn: conn, closed: make(chan struct{})}, nil
}

// A line to a process that may answer before it has read all that it is sent, and end the line then: what the answer says is to be heard, and not that no more can be
// written.
type line struct {
	net.Conn
	once   sync.Once
	closed chan struct{}
}

func (l *line) Write(p []byte) (int, error) {
	n, err := l.Conn.Write(p)
	if errors.Is(err, unix.EPIPE) || errors.Is(err, unix.ECONNRESET) {
		<-l.closed // as soon as the answer, or that there is none, has been read
	}
	return n, err
}

func (l *line) Close() error {
	l.once.Do(func() { close(l.closed) })
	return l.Conn.Close()
}

func (c *child) ended() bool {
	select {
	case <-c.done:
		return true
	default:
		return false
	}
}

func (c *child) stop() {
	c.cmd.Process.Kill()
	<-c.done
	c.guide.close()
	c.leash.Close()
	os.RemoveAll(filepath.Dir(c.run))
}

// lines logs what a process says, line by line.
type lines struct {
	log   *slog.Logger
	grant string

	mu   sync.Mutex
	rest string
	said string
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.rest += string(p)
	for {
		line, rest, whole := strings.Cut(l.rest, "\n")
		if !whole && len(l.rest) < 4096 {
			return len(p), nil
		}
		l.rest, l.said = rest, line
		l.log.Debug("cradle-s3", "grant", l.grant, "says", line)
	}
}

func (l *lines) last() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.said
}
