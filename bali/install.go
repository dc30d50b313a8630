package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/cradlestack/cradlestack/bali/seal"
)

func isEOF(err error) bool { return errors.Is(err, io.EOF) }

// An installed service lives in DIR/NAME:
//
//	images/KEY.image       a verified image; KEY is of it and of all flags
//	images/KEY.service     its unit
//	images/KEY.json        the flags of its bali install
//	current -> images/…    the image that the unit runs
//	previous -> images/…   what rollback goes back to
//	pending -> images/…    while an upgrade is not known to be good: what was
//	                       current before it
type installed struct {
	Unit   unitOptions   `json:"unit"`
	Source string        `json:"source"`
	Check  string        `json:"check,omitempty"`
	Settle time.Duration `json:"settle"`
	Within time.Duration `json:"within"`
	Keep   int           `json:"keep"`

	c       *cli
	dir     string
	unitDir string
	lock    *os.File
}

// places are where services are installed.
type places struct{ dir, unitDir string }

var defaultPlaces = places{"/var/lib/bali", "/etc/systemd/system"}

func (p *places) flags(cmd *cobra.Command) {
	cmd.Flags().StringVar(&p.dir, "dir", defaultPlaces.dir, "`DIR` with the installed images")
	cmd.Flags().StringVar(&p.unitDir, "unit-dir", defaultPlaces.unitDir, "`DIR` with systemd's units")
}

func (c *cli) install() *cobra.Command {
	var at places
	var r reading
	s := installed{c: c}
	cmd := &cobra.Command{
		Use:   "install FILE|URL --name NAME [-- CMD…]",
		Short: "install an image as a systemd service",
		Long: `Copy an image below --dir, verify it there, write its unit, switch to it and
restart the service. If the service is not healthy then, switch back.

Healthy means: systemd calls it active for --settle without a restart, and, if
given, --check succeeds (a shell command, tried again for --within).`,
		Args: fileAndCommand,
		RunE: func(cmd *cobra.Command, args []string) error {
			s.Unit.Command = args[1:]
			s.Source = args[0]
			if err := s.Unit.keep(c, cmd); err != nil {
				return err
			}
			return s.deploy(cmd.Context(), at, &r)
		},
	}
	s.Unit.flags(cmd)
	f := cmd.Flags()
	f.StringVar(&s.Check, "check", "", "shell `COMMAND` that succeeds when the service is healthy")
	f.DurationVar(&s.Settle, "settle", 5*time.Second, "how long it must stay active")
	f.DurationVar(&s.Within, "within", time.Minute, "how long it may take to become healthy")
	f.IntVar(&s.Keep, "keep", 3, "how many images to keep")
	r.flags(cmd)
	at.flags(cmd)
	return cmd
}

func (c *cli) upgrade() *cobra.Command {
	var at places
	var r reading
	cmd := &cobra.Command{
		Use:   "upgrade NAME [FILE|URL]",
		Short: "switch an installed service to a new image, and back if it is not healthy",
		Args: func(cmd *cobra.Command, args []string) error {
			if cmd.ArgsLenAtDash() >= 0 {
				return errors.New("upgrade keeps the command and the flags: for others, bali install it again")
			}
			return cobra.RangeArgs(1, 2)(cmd, args)
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			s, err := c.installed(at, args[0])
			if err != nil {
				return err
			}
			if len(args) > 1 {
				s.Source = args[1]
			}
			if err := s.Unit.again(cmd); err != nil {
				return err
			}
			return s.deploy(cmd.Context(), at, &r)
		},
	}
	r.flags(cmd)
	at.flags(cmd)
	return cmd
}

func (c *cli) rollback() *cobra.Command {
	var at places
	cmd := &cobra.Command{
		Use:   "rollback NAME",
		Short: "switch an installed service back to the image before",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			s, err := c.installed(at, args[0])
			if err != nil {
				return err
			}
			if err := s.open(cmd.Context(), at); err != nil {
				return err
			}
			defer s.lock.Close()
			to, err := os.Readlink(s.path("previous"))
			if err != nil {
				return fmt.Errorf("%s has no image before the current one", args[0])
			}
			return s.switchTo(cmd.Context(), to)
		},
	}
	at.flags(cmd)
	return cmd
}

// recover is what an installed unit runs before its service: if bali or the
// machine died in an upgrade that was not known to be good yet, it goes back.
func (c *cli) recover() *cobra.Command {
	var at places
	cmd := &cobra.Command{
		Use:    "recover NAME",
		Short:  "undo an upgrade that was interrupted (units of bali install call this)",
		Hidden: true,
		Args:   cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			s := &installed{c: c, Unit: unitOptions{Name: args[0]}}
			switch err := s.take(at); {
			case errors.Is(err, errBusy):
				return nil // the upgrade is under way, and this start is part of it
			case err != nil:
				return err
			}
			defer s.lock.Close()
			undone, err := s.undoPending()
			if err != nil || !undone {
				return err
			}
			// systemd holds the other unit, and waits for this start
			return errors.Join(s.systemctl(cmd.Context(), "daemon-reload"), s.systemctl(cmd.Context(), "--no-block", "restart", s.Unit.Name+".service"))
		},
	}
	at.flags(cmd)
	return cmd
}

// installed reads how a service was installed.
func (c *cli) installed(at places, name string) (*installed, error) {
	if !isName(name) {
		return nil, fmt.Errorf("%q is no name of a service", name)
	}
	current, err := os.Readlink(filepath.Join(at.dir, name, "current"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%s is not installed in %s: bali install it", name, at.dir)
	}
	if err != nil {
		return nil, err
	}
	record := filepath.Join(at.dir, name, strings.TrimSuffix(current, ".image")+".json")
	b, err := os.ReadFile(record)
	if err != nil {
		return nil, err
	}
	s := &installed{c: c}
	if err := json.Unmarshal(b, s); err != nil {
		return nil, fmt.Errorf("%s: %w", record, err)
	}
	return s, nil
}

func (s *installed) path(elem ...string) string {
	return filepath.Join(append([]string{s.dir}, elem...)...)
}

var errBusy = errors.New("being changed by another bali: wait for it")

// take locks the service's folder.
func (s *installed) take(at places) error {
	if err := s.Unit.check(); err != nil {
		return err
	}
	dir, err := filepath.Abs(at.dir)
	if err != nil {
		return err
	}
	s.dir = filepath.Join(dir, s.Unit.Name)
	if s.unitDir, err = filepath.Abs(at.unitDir); err != nil {
		return err
	}
	if err := os.MkdirAll(s.path("images"), 0o700); err != nil {
		return err
	}
	if s.lock, err = os.OpenFile(s.path("lock"), os.O_CREATE|os.O_RDWR, 0o600); err != nil {
		return err
	}
	if err := syscall.Flock(int(s.lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		s.lock.Close()
		return fmt.Errorf("%s is %w", s.Unit.Name, errBusy)
	}
	return nil
}

// open locks the service's folder, and goes back to what an upgrade that was
// killed had switched away from.
func (s *installed) open(ctx context.Context, at places) error {
	if err := s.take(at); err != nil {
		return err
	}
	undone, err := s.undoPending()
	if err == nil && undone {
		err = s.restart(ctx)
	}
	if err != nil {
		s.lock.Close()
	}
	return err
}

// undoPending makes current again what was before an upgrade that nobody waits
// for any more.
func (s *installed) undoPending() (bool, error) {
	old, err := os.Readlink(s.path("pending"))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	s.c.log.Warn("an earlier upgrade was interrupted, going back to the image before it", "image", old)
	if err := s.point(old); err != nil {
		return false, err
	}
	return true, os.Remove(s.path("pending"))
}

// deploy fetches, verifies and switches.
func (s *installed) deploy(ctx context.Context, at places, r *reading) error {
	if err := s.open(ctx, at); err != nil {
		return err
	}
	defer s.lock.Close()
	p, err := s.c.policy(s.Unit.Identities, false)
	if err != nil {
		return err
	}
	image, sig, err := s.fetch(ctx, r, p)
	if err != nil {
		return named(s.Source, err)
	}
	to, err := s.store(at, image, sig)
	if err != nil {
		return err
	}
	if s.upToDate(ctx, to) {
		s.c.log.Info("up to date", "service", s.Unit.Name, "image", to)
		return nil
	}
	return errors.Join(s.switchTo(ctx, to), s.prune())
}

// store gives the image that was fetched its name, and writes its unit and its
// flags beside it.
func (s *installed) store(at places, image *seal.Image, sig *seal.Signature) (string, error) {
	self, err := s.Unit.self()
	if err != nil {
		return "", err
	}
	recovery := []string{self, "recover", s.Unit.Name}
	if at != defaultPlaces {
		recovery = append(recovery, "--dir", filepath.Dir(s.dir), "--unit-dir", s.unitDir)
	}
	unit, err := s.Unit.render(image, s.path("current"), "-+"+commandLine(recovery))
	if err != nil {
		return "", err
	}
	if s.Source, err = absolute(s.Source); err != nil {
		return "", err
	}
	record, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return "", err
	}
	flags := sha256.Sum256(append(record, unit...))
	name := filepath.Join("images", fmt.Sprintf("%x-%x", sig.Payload[:12], flags[:4]))
	return name + ".image", errors.Join(
		os.Rename(s.path("incoming"), s.path(name+".image")),
		writeFile(s.path(name+".json"), append(record, '\n'), 0o600),
		writeFile(s.path(name+".service"), []byte(unit), 0o644),
	)
}

// upToDate: it runs already, with these flags.
func (s *installed) upToDate(ctx context.Context, image string) bool {
	if now, err := os.Readlink(s.path("current")); err != nil || now != image {
		return false
	}
	unit, err := os.ReadFile(s.unitFile())
	if err != nil {
		return false
	}
	want, err := os.ReadFile(s.path(strings.TrimSuffix(image, ".image") + ".service"))
	if err != nil || !bytes.Equal(unit, want) {
		return false
	}
	st, err := s.state(ctx)
	return err == nil && st.active == "active"
}

func (s *installed) unitFile() string { return filepath.Join(s.unitDir, s.Unit.Name+".service") }

// fetch copies the image to incoming while it is verified: only bytes that
// were checked are installed.
func (s *installed) fetch(ctx context.Context, r *reading, p *policy) (image *seal.Image, sig *seal.Signature, err error) {
	src, err := s.c.open(ctx, s.Source, r)
	if err != nil {
		return nil, nil, err
	}
	defer src.Close()
	f, err := os.OpenFile(s.path("incoming"), os.O_CREATE|os.O_TRUNC|os.O_RDWR, 0o600)
	if err != nil {
		return nil, nil, err
	}
	defer func() {
		f.Close()
		if err != nil {
			os.Remove(f.Name())
		}
	}()
	sig, err = seal.Verify(ctx, io.TeeReader(src, f))
	if err := errors.Join(p.accept(sig, err), f.Sync()); err != nil {
		return nil, nil, err
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return nil, nil, err
	}
	reader, err := seal.NewReader(f, r.limits())
	if err != nil {
		return nil, nil, err
	}
	defer reader.Close()
	return reader.Image(), sig, rightPlatform(reader.Image())
}

// point makes an image and its unit the current ones.
func (s *installed) point(image string) error {
	unit, err := os.ReadFile(s.path(strings.TrimSuffix(image, ".image") + ".service"))
	if err != nil {
		return err
	}
	if err := s.link("current", image); err != nil {
		return err
	}
	return writeFile(s.unitFile(), unit, 0o644)
}

// link replaces a symbolic link in one step.
func (s *installed) link(name, to string) error {
	tmp := s.path("." + name)
	if err := os.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.Symlink(to, tmp); err != nil {
		return err
	}
	return os.Rename(tmp, s.path(name))
}

// switchTo makes an image current, restarts the service and watches it; if it
// isn't healthy, it switches back.
func (s *installed) switchTo(ctx context.Context, image string) error {
	old, err := os.Readlink(s.path("current"))
	first := errors.Is(err, fs.ErrNotExist)
	if err != nil && !first {
		return err
	}
	if !first {
		if err := s.link("pending", old); err != nil {
			return err
		}
	}
	err = s.point(image)
	if err == nil {
		err = s.restart(ctx)
	}
	if err == nil {
		err = s.healthy(ctx)
	}
	if err != nil {
		return s.undo(err, old, first)
	}
	if first {
		return nil
	}
	if image != old {
		if err := s.link("previous", old); err != nil {
			return err
		}
	}
	s.c.log.Info("healthy", "service", s.Unit.Name, "image", image)
	return os.Remove(s.path("pending"))
}

// undo goes back to the image before, or takes a first installation away. It
// does so after an interrupt too.
func (s *installed) undo(cause error, old string, first bool) error {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	if first {
		err := errors.Join(
			s.systemctl(ctx, "disable", "--now", s.Unit.Name+".service"),
			os.Remove(s.unitFile()),
			os.Remove(s.path("current")),
			s.systemctl(ctx, "daemon-reload"),
		)
		return errors.Join(fmt.Errorf("%s is not healthy and was taken away again: %w", s.Unit.Name, cause), err)
	}
	err := s.point(old)
	if err == nil {
		err = s.restart(ctx)
	}
	if err == nil {
		err = os.Remove(s.path("pending"))
	}
	if err != nil {
		return errors.Join(fmt.Errorf("%s is not healthy: %w", s.Unit.Name, cause), fmt.Errorf("and could not be rolled back: %w", err))
	}
	return fmt.Errorf("%s is not healthy, rolled back to %s: %w", s.Unit.Name, filepath.Base(old), cause)
}

func (s *installed) restart(ctx context.Context) error {
	unit := s.Unit.Name + ".service"
	if err := s.systemctl(ctx, "daemon-reload"); err != nil {
		return err
	}
	if err := s.systemctl(ctx, "enable", "--quiet", unit); err != nil {
		return err
	}
	// earlier failures must not count against this start; a unit that never ran
	// has none
	_ = s.systemctl(ctx, "reset-failed", unit)
	return s.systemctl(ctx, "restart", unit)
}

func (s *installed) systemctl(ctx context.Context, args ...string) error {
	out, err := exec.CommandContext(ctx, "systemctl", args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("systemctl %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(string(out)))
	}
	return nil
}

// state is what systemd knows about the service's run.
type state struct{ active, result, restarts, pid string }

func (s *installed) state(ctx context.Context) (st state, err error) {
	out, err := exec.CommandContext(ctx, "systemctl", "show", "-p", "ActiveState,Result,NRestarts,MainPID", s.Unit.Name+".service").Output()
	if err != nil {
		return st, fmt.Errorf("systemctl show %s: %w", s.Unit.Name, err)
	}
	for l := range strings.Lines(string(out)) {
		k, v, _ := strings.Cut(strings.TrimSpace(l), "=")
		switch k {
		case "ActiveState":
			st.active = v
		case "Result":
			st.result = v
		case "NRestarts":
			st.restarts = v
		case "MainPID":
			st.pid = v
		}
	}
	return st, nil
}

// healthy waits until the service has been active for Settle without a restart
// and the check has succeeded.
func (s *installed) healthy(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, s.Settle+s.Within, fmt.Errorf("it did not become healthy within %v", s.Settle+s.Within))
	defer cancel()
	checked := s.Check == ""
	last := errors.New("it is still bali, verifying the image")
	start, err := s.state(ctx)
	if err != nil && ctx.Err() == nil {
		return err
	}
	var since time.Time // when it was not any more
	for {
		now, err := s.state(ctx)
		if err == nil && since.IsZero() && !s.isBali(now.pid) {
			since, last = time.Now(), nil
		}
		switch {
		case ctx.Err() != nil:
			return errors.Join(context.Cause(ctx), last)
		case err != nil:
			return err
		case now.active != "active" || now.restarts != start.restarts:
			return fmt.Errorf("systemd says it is %s (%s) after %s restarts: see journalctl -u %s", now.active, now.result, now.restarts, s.Unit.Name)
		case checked && !since.IsZero() && time.Since(since) >= s.Settle:
			return nil
		}
		if !checked && !since.IsZero() {
			err := s.check(ctx)
			checked = err == nil
			if last == nil || ctx.Err() == nil { // one that the end of the time has cut off says less than the one before
				last = err
			}
		}
		select {
		case <-time.After(250 * time.Millisecond):
		case <-ctx.Done():
		}
	}
}

// check runs --check. What it has started ends with the context as well: a
// command that hangs must not keep a broken image.
func (s *installed) check(ctx context.Context) error {
	cmd := exec.CommandContext(ctx, "sh", "-c", s.Check)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = time.Second // for one that has left the group
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("check %q: %w: %s", s.Check, err, strings.TrimSpace(string(out)))
	}
	return nil
}

// isBali: the service's process is still bali run.
func (s *installed) isBali(pid string) bool {
	self, err := s.Unit.self()
	if err != nil {
		return false
	}
	bali, err := os.Stat(self)
	if err != nil {
		return false
	}
	exe, err := os.Stat(filepath.Join("/proc", pid, "exe"))
	return err == nil && os.SameFile(bali, exe)
}

// prune keeps the newest images, and the current and the one before always.
func (s *installed) prune() error {
	keep := map[string]bool{}
	for _, l := range []string{"current", "previous"} {
		if to, err := os.Readlink(s.path(l)); err == nil {
			keep[filepath.Base(to)] = true
		}
	}
	entries, err := os.ReadDir(s.path("images"))
	if err != nil {
		return err
	}
	var old []string
	for _, e := range entries {
		if strings.HasSuffix(e.Name(), ".image") && !keep[e.Name()] {
			old = append(old, s.path("images", e.Name()))
		}
	}
	newestFirst(old)
	for _, e := range old[min(len(old), max(0, s.Keep-len(keep))):] {
		if err := os.Remove(e); err != nil {
			return err
		}
		for _, beside := range []string{".service", ".json"} { // killed in between, it has none
			if err := os.Remove(strings.TrimSuffix(e, ".image") + beside); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		}
	}
	return nil
}
