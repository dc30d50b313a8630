//go:build vm

package main

import (
	"bytes"
	"context"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"
	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/bali/seal"
	"github.com/cradlestack/cradlestack/test/s3server"
)

// TestRootScript runs the part of the manual that takes root: testdata/root.
func TestRootScript(t *testing.T) {
	testscript.Run(t, testscript.Params{Dir: "testdata/root", Setup: func(e *testscript.Env) error {
		rootless(t)
		return private(e)
	}})
}

func rootless(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("bali run takes root: sudo go test -tags vm ./bali")
	}
	if _, err := os.Stat("/bin/busybox"); err != nil {
		t.Fatalf("%v: apt-get install busybox-static", err)
	}
}

// place is a folder with a bali, a trusted key and an image.
type place struct {
	t    testing.TB
	dir  string
	bali string
}

func newPlace(t testing.TB) *place {
	rootless(t)
	p := &place{t: t, dir: t.TempDir()}
	if err := os.Mkdir(filepath.Join(p.dir, "tmp"), 0o700); err != nil {
		t.Fatal(err)
	}
	// this program is bali under that name (TestMain)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	p.bali = filepath.Join(p.dir, "bali")
	if out, err := exec.CommandContext(t.Context(), "cp", self, p.bali).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	p.ok("id")
	p.sh(`bali trust add "$(bali id)"`)
	p.sh(`mkdir -p app/bin && cp /bin/busybox app/bin/ && ln -s busybox app/bin/sh`)
	return p
}

func (p *place) env() []string {
	return append(os.Environ(), "XDG_CONFIG_HOME="+p.dir+"/config", "BALI_TRUST="+p.dir+"/trust", "PATH="+p.dir+":"+os.Getenv("PATH"), "TMPDIR="+p.dir+"/tmp")
}

func (p *place) command(args ...string) *exec.Cmd {
	cmd := exec.CommandContext(p.t.Context(), p.bali, args...)
	cmd.Dir, cmd.Env = p.dir, p.env()
	return cmd
}

func (p *place) ok(args ...string) string {
	p.t.Helper()
	out, err := p.command(args...).CombinedOutput()
	if err != nil {
		p.t.Fatalf("bali %q: %v\n%s", args, err, out)
	}
	return string(out)
}

func (p *place) refused(reason string, args ...string) {
	p.t.Helper()
	out, err := p.command(args...).CombinedOutput()
	if err == nil || !strings.Contains(string(out), reason) || strings.Contains(string(out), "RAN") {
		p.t.Errorf("bali %q: %v, want a refusal that says %q:\n%s", args, err, reason, out)
	}
}

func (p *place) sh(script string) string {
	p.t.Helper()
	cmd := exec.CommandContext(p.t.Context(), "sh", "-euc", script)
	cmd.Dir, cmd.Env = p.dir, p.env()
	out, err := cmd.CombinedOutput()
	if err != nil {
		p.t.Fatalf("%s: %v\n%s", script, err, out)
	}
	return string(out)
}

func (p *place) build(out, says string) []byte {
	p.t.Helper()
	p.sh(fmt.Sprintf("head -c 3000000 /dev/urandom > app/ballast && echo %s > app/says", says))
	p.ok("build", out, "--from", "./app", "--entrypoint", "/bin/sh", "--entrypoint", "-c", "--cmd", "echo RAN; cat /says", "--env", "PATH=/bin")
	b, err := os.ReadFile(filepath.Join(p.dir, out))
	if err != nil {
		p.t.Fatal(err)
	}
	return b
}

// TestRootSwap changes the image while it is read: on the server between two
// requests of one transfer, in the middle of an answer, and on the disk.
func TestRootSwap(t *testing.T) {
	p := newPlace(t)
	one, two := p.build("one.tar.gz", "one"), p.build("two.tar.gz", "two")
	p.sh("BALI_KEY=foreign bali id && BALI_KEY=foreign bali build evil.tar.gz --from ./app --entrypoint /bin/sh --cmd -c --cmd 'echo RAN'")
	evil, err := os.ReadFile(filepath.Join(p.dir, "evil.tar.gz"))
	if err != nil {
		t.Fatal(err)
	}
	half := len(one) / 2
	spliced := append(bytes.Clone(one[:half]), two[half:]...)
	flipped := bytes.Clone(one)
	flipped[half] ^= 1
	trailer := 162
	grafted := append(bytes.Clone(evil[:len(evil)-trailer]), one[len(one)-trailer:]...)

	// each answers the requests for an image one after the other
	answers := map[string][]func(w http.ResponseWriter, r *http.Request){
		"/good":      {whole(one)},
		"/cut":       {part(one, half, true), rest(one, true)},
		"/no-ranges": {part(one, half, false), whole(one)},
		"/slow":      {dribble(one)},
		"/spliced":   {whole(spliced)},
		"/flipped":   {whole(flipped)},
		"/grafted":   {whole(grafted)},
		"/foreign":   {whole(evil)},
		"/truncated": {whole(one[:len(one)-10])},
		// the second half comes from another good image, with and without a
		// server that says so
		"/swapped":         {part(one, half, true), rest(two, true)},
		"/swapped-etag":    {tagged("1", part(one, half, true)), tagged("2", whole(two))},
		"/swapped-to-evil": {part(one, half, false), whole(evil)},
		"/gone":            {part(one, half, true), func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(404) }},
		"/busy":            {func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(503) }, whole(one)},
	}
	count := map[string]int{}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		a := answers[r.URL.Path] // one client at a time
		if len(a) == 0 {
			http.NotFound(w, r)
			return
		}
		i := min(count[r.URL.Path], len(a)-1)
		count[r.URL.Path]++
		a[i](w, r)
	}))
	defer server.Close()

	for _, path := range []string{"/good", "/cut", "/no-ranges", "/slow", "/busy"} {
		if out := p.ok("run", server.URL+path); !strings.HasSuffix(out, "RAN\none\n") {
			t.Errorf("%s: %s", path, out)
		}
	}
	for path, reason := range map[string]string{
		"/spliced": "", "/flipped": "", "/grafted": "bad signature", "/foreign": "untrusted identity", "/truncated": "no signature",
		"/swapped": "", "/swapped-etag": "changed while it was fetched", "/swapped-to-evil": "", "/gone": "404", "/nothing": "bali: run " + server.URL + "/nothing: the server answers 404",
	} {
		p.refused(reason, "run", "--retries", "2", server.URL+path)
	}

	// what a server that never ends sends is kept nowhere for long
	var endless atomic.Int64
	server.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		n, err := w.Write(one[:half])
		for ; err == nil; n, err = w.Write(make([]byte, 1<<20)) {
			endless.Add(int64(n))
		}
	})
	for _, args := range [][]string{
		{"run", "--cache", filepath.Join(p.dir, "cache")},
		{"install", "--name", "endless", "--dir", filepath.Join(p.dir, "services"), "--unit-dir", p.dir},
	} {
		p.refused("too large: it has more than 10485760 bytes: raise --max-size", append(args, "--max-size", "8M", server.URL)...)
	}
	if left := p.sh("find cache services -type f -size +0"); left != "" {
		t.Errorf("left of what never ended:\n%s", left)
	}
	if n := endless.Load(); n > 1<<30 {
		t.Errorf("%d bytes were taken", n)
	}

	// a file that another process keeps replacing and rewriting: what runs is
	// one of the good images as a whole, or nothing
	stop, done := make(chan struct{}), make(chan struct{})
	target := filepath.Join(p.dir, "live.tar.gz")
	if err := os.WriteFile(target, one, 0o600); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(done)
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
				os.WriteFile(target, [][]byte{one, two, evil, flipped}[i%4], 0o600)
			}
		}
	}()
	for range 20 {
		out, err := p.command("run", target).CombinedOutput()
		if s := string(out); err == nil && s != "RAN\none\n" && s != "RAN\ntwo\n" || err != nil && strings.Contains(s, "RAN") {
			t.Errorf("ran something else: %v %q", err, s)
		}
	}
	close(stop)
	<-done
}

// TestRootSources runs an image from servers that take a certificate or a key:
// https, a real SSH server, and a real S3. Without these nothing runs.
func TestRootSources(t *testing.T) {
	p := newPlace(t)
	one := p.build("one.tar.gz", "one")
	server := httptest.NewTLSServer(http.FileServer(http.Dir(p.dir)))
	defer server.Close()
	p.refused("certificate", "run", "--retries", "0", server.URL+"/one.tar.gz")
	authority := filepath.Join(p.dir, "ca.pem")
	if err := os.WriteFile(authority, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("SSL_CERT_FILE", authority)
	if out := p.ok("run", server.URL+"/one.tar.gz"); out != "RAN\none\n" {
		t.Errorf("https: %s", out)
	}

	ssh := p.sshServer()
	image := "sftp://root@" + ssh + p.dir + "/one.tar.gz"
	p.sh("ssh-keyscan -T 120 -t ed25519 -p " + ssh[strings.LastIndex(ssh, ":")+1:] + " 127.0.0.1 >known; ssh-keygen -q -t ed25519 -N '' -f stranger; touch nobody; mv one.tar.gz home/below; cp home/below one.tar.gz")
	t.Setenv("SSH_AUTH_SOCK", "")
	p.refused("the key of "+ssh+" is not known here", "run", "--known-hosts", "nobody", "--ssh-key", "login", image)
	p.refused(ssh+" accepts none of 1 keys", "run", "--known-hosts", "known", "--ssh-key", "stranger", image)
	p.refused("no key to log in with", "run", "--known-hosts", "known", image)
	p.refused("file does not exist", "run", "--known-hosts", "known", "--ssh-key", "login", image+"x")
	for _, where := range []string{image, "scp" + strings.TrimPrefix(image, "sftp"), "sftp://root@" + ssh + "/~/below"} {
		if out := p.ok("run", "--known-hosts", "known", "--ssh-key", "login", where); out != "RAN\none\n" {
			t.Errorf("%s: %s", where, out)
		}
	}
	// the agent has the key, the host's is where ssh keeps it
	script := "ssh-add -q login && rm login && exec bali run --cache $PWD/cache " + image
	if out := p.sh("mkdir -p .ssh && cp known .ssh/known_hosts && HOME=$PWD exec ssh-agent sh -euc '" + script + "'"); out != "RAN\none\n" {
		t.Errorf("with the agent: %s", out)
	}

	url, stop := s3server.Start(t, "bucket")
	t.Setenv("AWS_ENDPOINT_URL_S3", url)
	t.Setenv("AWS_REGION", "us-east-1")
	t.Setenv("AWS_ACCESS_KEY_ID", s3server.AccessKey)
	image = "s3://bucket/images/one.tar.gz"
	p.refused("access denied", "run", image)
	t.Setenv("AWS_SECRET_ACCESS_KEY", s3server.SecretKey)
	p.refused("run "+image+": The specified key does not exist", "run", image)
	client, err := minio.NewCore(strings.TrimPrefix(url, "http://"), &minio.Options{
		Region: "us-east-1", Creds: credentials.NewStaticV4(s3server.AccessKey, s3server.SecretKey, ""),
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := client.PutObject(t.Context(), "bucket", "images/one.tar.gz", bytes.NewReader(one), int64(len(one)), "", "", minio.PutObjectOptions{}); err != nil {
		t.Fatal(err)
	}
	cached := []string{"run", "--cache", filepath.Join(p.dir, "cache"), "--retries", "0", image}
	for _, args := range [][]string{{"run", image}, cached, cached} {
		if out := p.ok(args...); out != "RAN\none\n" {
			t.Errorf("%v: %s", args, out)
		}
	}
	stop()
	p.refused("connection refused", "run", "--retries", "0", image)
	if out := p.ok(cached...); !strings.HasSuffix(out, "RAN\none\n") || !strings.Contains(out, "starting from the cache") {
		t.Errorf("from the cache: %s", out)
	}
}

// sshServer starts a real one on this machine, which lets root in with the key
// login, and gives its address. It has two host keys.
func (p *place) sshServer() string {
	p.t.Helper()
	for tool, pkg := range map[string]string{"dropbear": "dropbear-bin", "/usr/lib/sftp-server": "openssh-sftp-server"} {
		if _, err := exec.LookPath(tool); err != nil {
			p.t.Fatalf("%v: apt-get install %s", err, pkg)
		}
	}
	p.sh(`mkdir -m 700 home home/.ssh && ssh-keygen -q -t ed25519 -N '' -f login && cp login.pub home/.ssh/authorized_keys
for t in rsa ed25519; do dropbearkey -t $t -f hostkey.$t; done`)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		p.t.Fatal(err)
	}
	var serving sync.WaitGroup
	p.t.Cleanup(func() { l.Close(); serving.Wait() })
	serving.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			serving.Go(func() {
				defer c.Close()
				f, err := c.(*net.TCPConn).File()
				if err != nil {
					p.t.Error(err)
					return
				}
				defer f.Close()
				// as inetd starts it, where root's home is a folder of the test
				cmd := exec.CommandContext(p.t.Context(), "unshare", "-m", "sh", "-euc", `mount --bind home "$(getent passwd 0 | cut -d: -f6)"; exec dropbear -i -s -r hostkey.rsa -r hostkey.ed25519`)
				cmd.Dir, cmd.Env, cmd.Stdin, cmd.Stdout = p.dir, p.env(), f, f
				var log bytes.Buffer
				cmd.Stderr = &log
				if err := cmd.Run(); log.Len() > 0 { // a client that goes is an error to it
					p.t.Logf("dropbear: %v: %s", err, &log)
				}
			})
		}
	})
	return l.Addr().String()
}

func whole(b []byte) func(http.ResponseWriter, *http.Request) {
	return func(w http.ResponseWriter, _ *http.Request) { w.Write(b) }
}

// part promises all, gives n bytes and cuts the connection.
func part(b []byte, n int, ranges bool) func(http.ResponseWriter, *http.Request) {
	return func(w http.ResponseWriter, _ *http.Request) {
		if ranges {
			w.Header().Set("Accept-Ranges", "bytes")
		}
		w.Header().Set("Content-Length", fmt.Sprint(len(b)))
		w.Write(b[:n])
		panic(http.ErrAbortHandler)
	}
}

func rest(b []byte, _ bool) func(http.ResponseWriter, *http.Request) {
	return func(w http.ResponseWriter, r *http.Request) {
		r.Header.Del("If-Range")
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(b))
	}
}

func tagged(tag string, next func(http.ResponseWriter, *http.Request)) func(http.ResponseWriter, *http.Request) {
	return func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("ETag", `"`+tag+`"`)
		next(w, r)
	}
}

func dribble(b []byte) func(http.ResponseWriter, *http.Request) {
	return func(w http.ResponseWriter, _ *http.Request) {
		for len(b) > 0 {
			n := min(len(b), 100_000)
			w.Write(b[:n])
			w.(http.Flusher).Flush()
			b = b[n:]
		}
	}
}

// TestRootCacheAway: a service that is cached starts whatever its server does,
// without waiting for it again and again, unless what the server has is bad.
func TestRootCacheAway(t *testing.T) {
	p := newPlace(t)
	one, two := p.build("one.tar.gz", "one"), p.build("two.tar.gz", "two")
	hang, release := context.WithCancel(t.Context())
	defer release()
	var requests atomic.Int32
	var answer http.HandlerFunc
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		requests.Add(1)
		answer(w, r)
	}))
	defer server.Close()
	defer release()
	parts := func(b []byte) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(b))
		}
	}
	cut := func(b []byte, n int) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			if r.Header.Get("Range") == fmt.Sprintf("bytes=-%d", seal.TrailerLen) {
				http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(b))
				return
			}
			part(b, n, false)(w, r)
		}
	}
	hanging := func(_ http.ResponseWriter, r *http.Request) {
		select {
		case <-hang.Done():
		case <-r.Context().Done():
		}
	}
	run := []string{"run", "--cache", filepath.Join(p.dir, "cache"), "--retries", "1", server.URL + "/app"}
	for _, c := range []struct {
		name     string
		answer   http.HandlerFunc
		idle     string
		requests int32
		want     string
	}{
		{"first, without parts", whole(one), "1h", 2, "RAN\none\n"},
		{"asked", parts(one), "1h", 1, "RAN\none\n"},
		{"silent", hanging, "3s", 1, "no answer within 3s"},
		{"ill", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(503) }, "1h", 1, "starting from the cache reason=\"503"},
		{"forgetful", func(w http.ResponseWriter, r *http.Request) { http.NotFound(w, r) }, "1h", 1, "starting from the cache reason=\"the server answers 404"},
		{"without parts, cut in the middle", part(one, len(one)/2, false), "1h", 2, "starting from the cache"},
		{"with a new image that it can't deliver", cut(two, len(two)/2), "1h", 3, "starting from the cache"},
	} {
		requests.Store(0)
		answer = c.answer
		out := p.ok(append([]string{"run", "--idle", c.idle}, run[1:]...)...)
		// a server may hear of a request when who has asked is gone
		for deadline := time.Now().Add(time.Minute); requests.Load() < c.requests && time.Now().Before(deadline); {
			time.Sleep(10 * time.Millisecond)
		}
		if !strings.HasSuffix(out, "RAN\none\n") || !strings.Contains(out, c.want) || requests.Load() != c.requests {
			t.Errorf("%s: %d requests, want %d:\n%s", c.name, requests.Load(), c.requests, out)
		}
	}
	// what is there and bad is refused, cache or not
	flipped := bytes.Clone(two)
	flipped[len(two)/2] ^= 1
	for _, b := range [][]byte{flipped, two[:len(two)-1]} {
		answer = parts(b)
		p.refused("", run...)
		answer = whole(b)
		p.refused("", run...)
	}
	answer = parts(two)
	if out := p.ok(run...); !strings.HasSuffix(out, "RAN\ntwo\n") {
		t.Errorf("the new image: %s", out)
	}
	// two that start at once don't disturb each other, nor does what a killed one left
	p.sh("rm -r cache")
	var starts []*exec.Cmd
	for range 4 {
		cmd := p.command(run...)
		cmd.Stderr = os.Stderr
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		starts = append(starts, cmd)
	}
	for _, cmd := range starts {
		if err := cmd.Wait(); err != nil {
			t.Errorf("one of several at once: %v", err)
		}
	}
	if left := p.sh("ls cache; ls cache/v1 | wc -l"); left != "sources\nv1\n1\n" {
		t.Errorf("in the cache: %s", left)
	}
}

// TestRootService starts a service as systemd does: with a socket that is open
// already and another one to tell on that it is ready, which lies where only
// bali brings it. What it tells comes from the process that was started.
func TestRootService(t *testing.T) {
	p := newPlace(t)
	if out, err := exec.CommandContext(t.Context(), "env", "CGO_ENABLED=0", "go", "build", "-o", filepath.Join(p.dir, "app/bin/probe"), "./testdata/probe").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	p.ok("build", "app.tar.gz", "--from", "./app", "--entrypoint", "/bin/probe")
	fds := []string{"0", "1", "2", "3"} // and what go test itself was given
	own, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range own {
		if n, err := strconv.Atoi(f.Name()); err == nil && n > 3 {
			if flags, err := unix.FcntlInt(uintptr(n), unix.F_GETFD, 0); err == nil && flags&unix.FD_CLOEXEC == 0 {
				fds = append(fds, f.Name())
			}
		}
	}
	slices.Sort(fds)
	for _, args := range [][]string{{"run", "app.tar.gz"}, {"run", "--cache", filepath.Join(p.dir, "cache"), "--user", "7:8", "app.tar.gz"}} {
		dir := t.TempDir()
		notify, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(dir, "notify"), Net: "unixgram"})
		if err != nil {
			t.Fatal(err)
		}
		defer notify.Close()
		if err := os.Chmod(filepath.Join(dir, "notify"), 0o777); err != nil { // as systemd's
			t.Fatal(err)
		}
		control, err := notify.SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		if err := control.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_PASSCRED, 1) }); err != nil {
			t.Fatal(err)
		}
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, "listen"), Net: "unix"})
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		socket, err := l.File()
		if err != nil {
			t.Fatal(err)
		}
		defer socket.Close()
		cmd := exec.CommandContext(t.Context(), "sh", append([]string{"-c", `LISTEN_PID=$$ exec bali "$@"`, "sh"}, args...)...)
		cmd.Dir, cmd.Env, cmd.Stderr = p.dir, append(p.env(), "LISTEN_FDS=1", "NOTIFY_SOCKET="+filepath.Join(dir, "notify")), os.Stderr
		cmd.ExtraFiles = []*os.File{socket}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		ended := make(chan error, 1)
		go func() {
			ended <- cmd.Wait()
			notify.Close() // nothing more comes
		}()
		text, oob := make([]byte, 1000), make([]byte, 1000)
		n, oobn, _, _, err := notify.ReadMsgUnix(text, oob)
		if err != nil {
			t.Fatalf("%v: no word of the service: %v, %v", args, err, <-ended)
		}
		if got, want := string(text[:n]), "READY=1\nSTATUS=fds "+strings.Join(fds, " ")+", listen 1 for true"; got != want {
			t.Errorf("%v: the service says %q, want %q", args, got, want)
		}
		messages, err := unix.ParseSocketControlMessage(oob[:oobn])
		if err != nil || len(messages) != 1 {
			t.Fatalf("credentials: %v, %v", messages, err)
		}
		if cred, err := unix.ParseUnixCredentials(&messages[0]); err != nil || int(cred.Pid) != cmd.Process.Pid {
			t.Errorf("%v: the word comes from %+v, %v, not from process %d", args, cred, err, cmd.Process.Pid)
		}
		c, err := net.Dial("unix", filepath.Join(dir, "listen"))
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintln(c, 77)
		if err := <-ended; cmd.ProcessState.ExitCode() != 77 {
			t.Errorf("%v: ended with %v", args, err)
		}
		c.Close()
	}
}

// TestRootFull: a full disk or memory is said, and leaves nothing of what could
// not be finished.
func TestRootFull(t *testing.T) {
	p := newPlace(t)
	p.build("app.tar.gz", "one")
	small := filepath.Join(p.dir, "small")
	p.sh("mkdir small && mount -t tmpfs -o size=2m small small")
	t.Cleanup(func() { unix.Unmount(small, 0) })
	for _, args := range [][]string{
		{"extract", "app.tar.gz", "small/x"},
		{"build", "small/out.tar.gz", "--from", "./app"},
		{"run", "--cache", filepath.Join(small, "cache"), "app.tar.gz"},
		{"run", "--size", "2M", "app.tar.gz"},
	} {
		p.refused("no space left on device", args...)
	}
	if left := p.sh("find small -type f; find small/cache/v1 -mindepth 1"); left != "" {
		t.Errorf("left on the full disk:\n%s", left)
	}
	// the image that is read doesn't fit either: what was there before stays
	p.sh("echo old >small/out.tar.gz")
	p.refused("no space left on device", "build", "small/out.tar.gz", "--from", "./app")
	if got := p.sh("cat small/out.tar.gz; ls -A small"); got != "old\ncache\nout.tar.gz\n" {
		t.Errorf("on the full disk: %s", got)
	}
}

// TestRootKillAnywhere ends bali with SIGKILL at moments all over its run, with
// and without a cache: no mount, no process and no file is left, and what was
// left in the cache is gone with the next run.
func TestRootKillAnywhere(t *testing.T) {
	p := newPlace(t)
	p.build("app.tar.gz", "one")
	before := p.mounts()
	cached := []string{"run", "--cache", filepath.Join(p.dir, "cache"), "app.tar.gz", "--", "exec sleep 1000"}
	start := time.Now()
	p.ok(append(cached[:len(cached)-1:len(cached)-1], "exit 0")...)
	whole := time.Since(start)
	const kills = 25
	for i := range kills {
		for _, args := range [][]string{cached, {"run", "app.tar.gz", "--", "exec sleep 1000"}} {
			p.sh("rm -rf cache/v1/*")
			cmd := p.command(args...)
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			time.Sleep(whole * time.Duration(i) / kills) // any moment is right
			if err := cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
			cmd.Wait()
		}
	}
	if after := p.mounts(); after != before {
		t.Errorf("mounts before:\n%s\nafter:\n%s", before, after)
	}
	if out := p.ok(append(cached[:len(cached)-1:len(cached)-1], "echo RAN")...); !strings.HasSuffix(out, "RAN\n") {
		t.Errorf("after all that: %s", out)
	}
	if left := p.sh("ls cache; ls cache/v1 | wc -l; ls -A | grep -v -x -e app -e app.tar.gz -e bali -e config -e tmp -e trust -e cache || true; ls -A tmp"); left != "sources\nv1\n1\n" {
		t.Errorf("left behind: %s", left)
	}
}

// TestRootKill ends bali with SIGKILL while it fetches, and while the service
// runs: no mount, no process and no file is left.
func TestRootKill(t *testing.T) {
	p := newPlace(t)
	image := p.build("app.tar.gz", "one")
	before := p.mounts()
	half := make(chan struct{})
	hang, release := context.WithCancel(t.Context())
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Length", fmt.Sprint(len(image)))
		w.Write(image[:len(image)/2])
		w.(http.Flusher).Flush()
		close(half)
		<-hang.Done()
	}))
	defer server.Close()
	defer release()

	fetching := p.command("run", server.URL)
	fetching.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := fetching.Start(); err != nil {
		t.Fatal(err)
	}
	<-half
	serving := p.command("run", "app.tar.gz", "--", "echo RAN; exec sleep 1000")
	serving.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	out, err := serving.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := serving.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(out, make([]byte, 4)); err != nil {
		t.Fatal(err)
	}
	for _, cmd := range []*exec.Cmd{fetching, serving} {
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		cmd.Wait()
		if s := cmd.ProcessState.Sys().(syscall.WaitStatus); s.Signal() != syscall.SIGKILL {
			t.Errorf("%v: ended with %v", cmd.Args, cmd.ProcessState)
		}
		if err := syscall.Kill(-cmd.Process.Pid, 0); err == nil {
			t.Errorf("%v: its process group is still there", cmd.Args)
		}
	}
	if after := p.mounts(); after != before {
		t.Errorf("mounts before:\n%s\nafter:\n%s", before, after)
	}
	if left := p.sh("ls -A | grep -v -x -e app -e app.tar.gz -e bali -e config -e tmp -e trust || true; ls -A tmp"); left != "" {
		t.Errorf("left behind: %s", left)
	}
}

// mounts are those that bali could have left: its own, and any on what it mounts
// over or below the test's folder. Others on the machine mount what they want.
func (p *place) mounts() string {
	p.t.Helper()
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		p.t.Fatal(err)
	}
	var out strings.Builder
	for l := range strings.Lines(string(b)) {
		at := strings.Fields(l)[4] // proc_pid_mountinfo(5)
		if strings.Contains(l, " bali ") || strings.HasPrefix(at, p.dir) ||
			slices.Contains([]string{"/", "/proc", "/sys", "/dev", "/run", "/tmp", "/etc/hosts", "/etc/resolv.conf"}, at) {
			out.WriteString(l)
		}
	}
	return out.String()
}
