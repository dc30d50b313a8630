package ceph

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unicode/utf16"

	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/csi-plugin/mount"
	"github.com/cradlestack/cradlestack/csi-plugin/volume"
)

// Times after which the cluster counts as not reachable.
const (
	connecting = "10" // seconds until a monitor answers
	answering  = time.Minute
	longer     = 10 * time.Second // until the program that asks ends by itself
)

// Errors of commands beside the sentinels of package volume.
var (
	errNoGroup = fmt.Errorf("subvolume group %w", volume.ErrNotFound)
	errExists  = errors.New("exists already")
	errInvalid = errors.New("refused")
)

// refusals are the errors of commands, with what they mean here; the text decides where one means several things (pybind/mgr/volumes, mgr/DaemonServer.cc).
var refusals = []struct {
	errno syscall.Errno
	text  string
	is    error
}{
	{unix.ENOENT, "subvolume group ", errNoGroup},
	{unix.ENOENT, "FS ", volume.ErrUnavailable},
	{unix.ENOENT, "olume '", volume.ErrNotFound}, // also: subvolume
	{unix.ENOENT, "", volume.ErrNotFound},
	{unix.EEXIST, "", errExists},
	{unix.ENOSPC, "", volume.ErrNoSpace},
	{unix.EDQUOT, "", volume.ErrNoSpace},
	{unix.EINVAL, "No handler found", volume.ErrUnavailable}, // the manager has just begun, and does not know it yet
	{unix.EOPNOTSUPP, "", volume.ErrUnavailable},             // as before, or "Module 'volumes' is not enabled"
	{unix.ENOSYS, "", volume.ErrUnavailable},
	{unix.EINVAL, "No space left on device", volume.ErrNoSpace}, // "exception in subvolume metadata: …", of a manager that could not write it
	{unix.EINVAL, "", errInvalid},
	{unix.EAGAIN, "", volume.ErrUnavailable},
	{unix.ETIMEDOUT, "", volume.ErrUnavailable},
	{unix.EACCES, "", volume.ErrUnavailable},
	{unix.EPERM, "", volume.ErrUnavailable},
	{unix.EROFS, "", volume.ErrUnavailable},
	{unix.ESHUTDOWN, "", volume.ErrUnavailable},
}

// explained makes an error of what the cluster says of a command that it did not do.
func explained(errno syscall.Errno, what string) error {
	what = firstLine(strings.TrimSpace(what))
	for _, r := range refusals {
		if errno == r.errno && strings.Contains(what, r.text) {
			if errno == unix.EACCES || errno == unix.EPERM {
				what += ": does the plugin's key have what ceph-client.sh gives it (docs/operate.md, CephFS)?"
			}
			return fmt.Errorf("%w: %s", r.is, cmp.Or(what, errno.Error()))
		}
	}
	return fmt.Errorf("%s: %s", unix.ErrnoName(errno), what)
}

func firstLine(s string) string {
	line, _, _ := strings.Cut(s, "\n")
	return line[:min(len(line), 400)]
}

func lastLine(s string) string {
	line := s[strings.LastIndexByte(s, '\n')+1:]
	return line[:min(len(line), 400)]
}

// asker does commands, one a line, by the library that the program ceph is made of (package ceph-common has both). That program takes a third of a second to ask what the
// cluster's commands are, and some 50 ms of processor time to compare each with all of them; the library sends them as they are. What a cluster never answers ends it, also
// when nobody is there to end it any more. It ends without taking Python down: the library's threads still run then, and 3 of 76 exits were crashes, whose core
// would have the plugin's key.
const asker = `
import atexit, json, os, rados, signal, sys
atexit.register(os._exit, 0)
patience = int(sys.argv[4])
signal.alarm(patience)
cluster = rados.Rados(conffile=sys.argv[1], name=sys.argv[2], conf=json.loads(sys.argv[3]))
cluster.connect()
signal.alarm(0)
files = None
def done(to, command):
    global files
    if to == "mon":
        return cluster.mon_command(command, b"")
    if to == "mgr":
        return cluster.mgr_command(command, b"")
    if files is None:
        import cephfs
        files = cephfs.LibCephFS(rados_inst=cluster)
        files.init()
    return files.mds_command(to, command, b"")
def text(said):
    return said.decode(errors="replace") if isinstance(said, bytes) else said or ""
for line in sys.stdin:
    signal.alarm(patience)
    ret, out, said = done(*json.loads(line))
    print(json.dumps([ret, text(out), text(said)]), flush=True)
    signal.alarm(0)
signal.alarm(patience)
if files is not None:
    files.shutdown()
`

// Whom a question is for, beside a metadata server.
const (
	monitor = "mon"
	manager = "mgr"
)

// A question is a command with its arguments, by their names in Ceph (src/mon/MonCommands.h, src/pybind/mgr/volumes/module.py).
type question struct {
	to   string
	args map[string]any
}

// asks is a question. What follows the command are names of arguments, each with its value.
func asks(to, command string, args ...any) question {
	q := question{to, map[string]any{"prefix": command, "format": "json"}}
	return q.and(args...)
}

// and is the question with more arguments.
func (q question) and(args ...any) question {
	for i := 0; i+1 < len(args); i += 2 {
		q.args[args[i].(string)] = args[i+1]
	}
	return q
}

// of is a question about a subvolume.
func (f *found) of(what string, args ...any) question {
	return asks(manager, "fs subvolume "+what, "vol_name", f.pool.FS, "sub_name", f.id, "group_name", f.pool.Group).and(args...)
}

// A session is one run of asker: beginning takes longer than most commands.
type session struct {
	b    *Backend
	cmd  *exec.Cmd
	in   io.WriteCloser
	out  *bufio.Reader
	errs bytes.Buffer
	late atomic.Bool
	dead error
	wait func() error
}

// session starts the program, which goes on should this process be killed, and has the context's lock meanwhile.
func (b *Backend) session(ctx context.Context) (*session, error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	conf := map[string]string{"client_mount_timeout": connecting}
	if b.config.Keyring != "" {
		conf["keyring"] = b.config.Keyring
	}
	options, err := json.Marshal(conf)
	if err != nil {
		return nil, err
	}
	s := &session{b: b, cmd: exec.Command("/usr/bin/python3", "-I", "-c", asker, b.config.Conf, "client."+b.config.ID, string(options), strconv.Itoa(int((answering + longer).Seconds())))}
	s.cmd.Env = []string{"LC_ALL=C.UTF-8", "PATH=/usr/sbin:/usr/bin:/sbin:/bin"}
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	s.cmd.Stderr = &s.errs
	if f := mount.Held(ctx); f != nil {
		s.cmd.ExtraFiles = []*os.File{f}
	}
	if s.in, err = s.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := s.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	s.out, s.wait = bufio.NewReaderSize(out, 64<<10), sync.OnceValue(s.cmd.Wait)
	if err := s.cmd.Start(); err != nil {
		return nil, fmt.Errorf("%w: %w: apt-get install ceph-common", volume.ErrUnavailable, err)
	}
	return s, nil
}

// client are the options that say which cluster, and as whom.
func (b *Backend) client(name, keyring string) []string {
	args := []string{"-c", b.config.Conf, "-n", name}
	if keyring != "" {
		args = append(args, "-k", keyring)
	}
	return args
}

func (s *session) kill() { _ = s.cmd.Process.Kill() }

// close ends the program.
func (s *session) close() {
	s.in.Close()
	if s.dead != nil {
		s.kill()
	}
	defer time.AfterFunc(answering, s.kill).Stop()
	_ = s.wait()
}

// run has a command done, and reads its answer into out, unless that is nil.
func (s *session) run(ctx context.Context, out any, q question) error {
	if s.dead != nil {
		return s.dead
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	answer, err := s.ask(ctx, q)
	if err != nil {
		return fmt.Errorf("ceph %s: %w", q.args["prefix"], err)
	}
	if out == nil {
		return nil
	}
	if err := json.Unmarshal([]byte(answer), out); err != nil {
		return fmt.Errorf("ceph %s: its answer: %w", q.args["prefix"], err)
	}
	return nil
}

// removes has a command done that removes something, which may be gone already.
func (s *session) removes(ctx context.Context, q question) error {
	err := s.run(ctx, nil, q)
	if errors.Is(err, volume.ErrNotFound) {
		return nil
	}
	return err
}

func (s *session) ask(ctx context.Context, q question) (answer string, err error) {
	command, err := json.Marshal(q.args)
	if err != nil {
		return "", err
	}
	line, err := json.Marshal([]string{q.to, string(command)})
	if err != nil {
		return "", err
	}
	defer time.AfterFunc(answering, func() { s.late.Store(true); s.kill() }).Stop()
	defer context.AfterFunc(ctx, s.kill)()
	_, werr := s.in.Write(append(line, '\n'))
	if line, err = s.out.ReadBytes('\n'); err != nil {
		return "", s.ended(ctx, errors.Join(werr, err))
	}
	var code int
	var said string
	if err := json.Unmarshal(line, &[]any{&code, &answer, &said}); err != nil {
		return "", s.ended(ctx, err)
	}
	if code != 0 {
		return "", explained(syscall.Errno(max(code, -code)), said)
	}
	return answer, nil
}

// ended says why the program has, or has to.
func (s *session) ended(ctx context.Context, err error) error {
	s.kill()
	_ = s.wait()
	said := strings.TrimSpace(s.errs.String())
	switch {
	case ctx.Err() != nil:
		s.dead = context.Cause(ctx)
	case s.late.Load():
		s.dead = fmt.Errorf("%w: the cluster has not answered for %v: see \"ceph status\": do a manager, a metadata server and the object stores answer?", volume.ErrUnavailable, answering)
	case strings.Contains(said, "ModuleNotFoundError"):
		s.dead = fmt.Errorf("%w: %s: apt-get install ceph-common", volume.ErrUnavailable, lastLine(said))
	case said != "":
		s.dead = fmt.Errorf("%w: the cluster is not reachable: %s", volume.ErrUnavailable, lastLine(said))
	default:
		s.dead = fmt.Errorf("%w: what asks the cluster has ended: %w", volume.ErrUnavailable, err)
	}
	return s.dead
}

// quoted is JSON of ASCII in which nothing means something to Python's configparser, which ceph keeps metadata by, or ends a shell's quotation, for administrators.
func quoted(v any) string {
	text, err := json.Marshal(v)
	if err != nil {
		panic(err) // it holds nothing that could not be written
	}
	var b strings.Builder
	for _, unit := range utf16.Encode([]rune(string(text))) {
		if unit < 0x7f && unit != '\'' && unit != '%' {
			b.WriteByte(byte(unit))
		} else {
			fmt.Fprintf(&b, `\u%04x`, unit)
		}
	}
	return b.String()
}

// unique sorts and drops what is there twice.
func unique(all []string) []string {
	slices.Sort(all)
	return slices.Compact(all)
}
