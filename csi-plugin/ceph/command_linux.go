package ceph

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
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
)

// Errors of the program ceph beside the sentinels of package volume.
var (
	errNoGroup = fmt.Errorf("subvolume group %w", volume.ErrNotFound)
	errExists  = errors.New("exists already")
	errInvalid = errors.New("refused")
)

// refusals are the names that ceph writes an errno by, with what they mean here; the text decides where one means several things (pybind/mgr/volumes).
var refusals = []struct {
	errno, text string
	is          error
}{
	{"ENOENT", "subvolume group ", errNoGroup},
	{"ENOENT", "FS ", volume.ErrUnavailable},
	{"ENOENT", "olume '", volume.ErrNotFound}, // also: subvolume
	{"ENOENT", "", volume.ErrNotFound},
	{"EEXIST", "", errExists},
	{"ENOSPC", "", volume.ErrNoSpace},
	{"EDQUOT", "", volume.ErrNoSpace},
	{"EINVAL", "invalid command", volume.ErrUnavailable},     // no manager is active, which knows it
	{"EINVAL", "No space left on device", volume.ErrNoSpace}, // "exception in subvolume metadata: …", of a manager that could not write it
	{"EINVAL", "", errInvalid},
	{"EAGAIN", "", volume.ErrUnavailable},
	{"ETIMEDOUT", "", volume.ErrUnavailable},
	{"EACCES", "", volume.ErrUnavailable},
	{"EPERM", "", volume.ErrUnavailable},
	{"EROFS", "", volume.ErrUnavailable},
	{"ESHUTDOWN", "", volume.ErrUnavailable},
}

// refused begins what ceph writes of a command that it did not do.
const refused = "Error E"

// explained makes an error of what ceph writes: "Error ENOENT: subvolume 'v' does not exist".
func explained(text string) error {
	text = strings.TrimSpace(text)
	if i := strings.Index(text, refused); i >= 0 {
		errno, what, _ := strings.Cut(text[i+len("Error "):], ": ")
		what = firstLine(what)
		for _, r := range refusals {
			if errno == r.errno && strings.Contains(what, r.text) {
				if errno == "EACCES" || errno == "EPERM" {
					what += ": does the plugin's key have what ceph-client.sh gives it (docs/operate.md, CephFS)?"
				}
				return fmt.Errorf("%w: %s", r.is, what)
			}
		}
		return fmt.Errorf("%s: %s", errno, what)
	}
	return fmt.Errorf("%w: %s", volume.ErrUnavailable, lastLine(text)) // it did not come as far as to ask
}

func firstLine(s string) string {
	line, _, _ := strings.Cut(s, "\n")
	return line[:min(len(line), 400)]
}

func lastLine(s string) string {
	line := s[strings.LastIndexByte(s, '\n')+1:]
	return line[:min(len(line), 400)]
}

// A session is one run of the program ceph, which is told one command after the other: starting it takes longer than most of them.
type session struct {
	b    *Backend
	cmd  *exec.Cmd
	in   io.WriteCloser
	out  *bufio.Reader
	errs *os.File
	late atomic.Bool
	dead error
}

// session starts the program, which goes on should this process be killed, and has the context's lock meanwhile.
func (b *Backend) session(ctx context.Context) (*session, error) {
	cmd, err := b.program(ctx)
	if err != nil {
		return nil, err
	}
	errs, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer w.Close()
	cmd.Stderr = w
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, errors.Join(err, errs.Close())
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, errors.Join(err, errs.Close())
	}
	if err := cmd.Start(); err != nil {
		return nil, errors.Join(err, errs.Close())
	}
	return &session{b: b, cmd: cmd, in: in, out: bufio.NewReaderSize(out, 64<<10), errs: errs}, nil
}

// program is the program ceph with what each of its calls has.
func (b *Backend) program(ctx context.Context, args ...string) (*exec.Cmd, error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	path, err := exec.LookPath("ceph")
	if err != nil {
		return nil, fmt.Errorf("%w: the program ceph is missing: apt-get install ceph-common", volume.ErrUnavailable)
	}
	cmd := exec.Command(path, append(b.client("client."+b.config.ID, b.config.Keyring), append([]string{"--connect-timeout", connecting, "-f", "json"}, args...)...)...)
	cmd.Env = []string{"LC_ALL=C", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "PYTHONUNBUFFERED=1"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if f := mount.Held(ctx); f != nil {
		cmd.ExtraFiles = []*os.File{f}
	}
	return cmd, nil
}

// client are the options that say which cluster, and as whom.
func (b *Backend) client(name, keyring string) []string {
	args := []string{"-c", b.config.Conf, "-n", name}
	if keyring != "" {
		args = append(args, "-k", keyring)
	}
	return args
}

// close ends the program.
func (s *session) close() {
	s.in.Close()
	if s.dead != nil {
		_ = s.cmd.Process.Kill()
	}
	defer time.AfterFunc(answering, func() { _ = s.cmd.Process.Kill() }).Stop()
	_ = s.cmd.Wait()
	s.errs.Close()
}

// marker is the beginning of the answer to the command that follows each, by which one knows that it has ended.
const marker = `{"fsid":`

// run has a command done, and reads its answer into out, unless that is nil.
func (s *session) run(ctx context.Context, out any, args ...string) error {
	what := "ceph " + strings.Join(args[:min(len(args), 3)], " ")
	if s.dead != nil {
		return s.dead
	}
	if err := ctx.Err(); err != nil {
		return context.Cause(ctx)
	}
	answer, err := s.ask(ctx, args)
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	if out == nil {
		return nil
	}
	if err := json.Unmarshal(answer, out); err != nil {
		return fmt.Errorf("%s: its answer: %w", what, err)
	}
	return nil
}

func (s *session) ask(ctx context.Context, args []string) ([]byte, error) {
	var line strings.Builder
	for _, a := range args {
		if strings.ContainsAny(a, "'\n\x00") {
			return nil, fmt.Errorf("%q can't be part of a command", a)
		}
		line.WriteString("'" + a + "' ")
	}
	kill := func() { _ = s.cmd.Process.Kill() }
	limit := time.AfterFunc(answering, func() { s.late.Store(true); kill() })
	defer limit.Stop()
	defer context.AfterFunc(ctx, kill)()
	_, werr := io.WriteString(s.in, line.String()+"\nfsid\n")
	var answer []byte
	for {
		text, err := s.out.ReadBytes('\n')
		if err != nil {
			return nil, s.ended(ctx, errors.Join(werr, err))
		}
		if bytes.HasPrefix(text, []byte(marker)) {
			break
		}
		answer = append(answer, text...)
	}
	// What it has written there it wrote before the marker's answer.
	said := s.said()
	if strings.Contains(said, refused) {
		return nil, explained(said)
	}
	return bytes.TrimSpace(answer), nil
}

// ended says why the program has.
func (s *session) ended(ctx context.Context, err error) error {
	said := s.said()
	switch {
	case ctx.Err() != nil:
		s.dead = context.Cause(ctx)
	case s.late.Load():
		s.dead = fmt.Errorf("%w: the cluster has not answered for %v: see \"ceph status\": do a manager, a metadata server and the object stores answer?", volume.ErrUnavailable, answering)
	case strings.TrimSpace(said) != "":
		s.dead = fmt.Errorf("%w: the cluster is not reachable: %s", volume.ErrUnavailable, lastLine(strings.TrimSpace(said)))
	default:
		s.dead = fmt.Errorf("%w: the program ceph has ended: %w", volume.ErrUnavailable, err)
	}
	return s.dead
}

// said is what is in the pipe of the standard error now.
func (s *session) said() string {
	var all []byte
	raw, err := s.errs.SyscallConn()
	if err != nil {
		return ""
	}
	_ = raw.Read(func(fd uintptr) bool {
		for buf := make([]byte, 4096); ; {
			n, err := unix.Read(int(fd), buf)
			if n <= 0 || err != nil {
				return true
			}
			all = append(all, buf[:n]...)
		}
	})
	return string(all)
}

// tell asks a daemon, which a session can't.
func (b *Backend) tell(ctx context.Context, out any, args ...string) error {
	what := "ceph tell " + strings.Join(args[:min(len(args), 3)], " ")
	cmd, err := b.program(ctx, append([]string{"tell"}, args...)...)
	if err != nil {
		return err
	}
	var text, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &text, &errs
	if err := cmd.Start(); err != nil {
		return err
	}
	limit := time.AfterFunc(answering, func() { _ = cmd.Process.Kill() })
	defer limit.Stop()
	defer context.AfterFunc(ctx, func() { _ = cmd.Process.Kill() })()
	if err := cmd.Wait(); err != nil {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return fmt.Errorf("%s: %w", what, explained(errs.String()))
	}
	if err := json.Unmarshal(text.Bytes(), out); err != nil {
		return fmt.Errorf("%s: its answer: %w", what, err)
	}
	return nil
}

// quoted is JSON of ASCII in which nothing ends a shell's quotation, and nothing is one of Python's configparser, which ceph keeps metadata by.
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
