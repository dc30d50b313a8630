// Command demo shows a database, a web server and a cache in microVMs, used by their real clients, then the jobs of examples/nomad on a stack of its own,
// and cleans up: make demo. A test runs the same.
package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/cradlestack/cradlestack/internal/stack"
	"github.com/cradlestack/cradlestack/test/programs"
)

func main() {
	signal.Ignore(syscall.SIGPIPE) // who has stopped reading still gets everything cleaned up
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Stdout); err != nil {
		fmt.Fprintf(os.Stderr, "demo: %v\n", err)
		os.Exit(1)
	}
}

// A demo is one run of it.
type demo struct {
	out   io.Writer
	dir   string
	pods  []string // that may be running
	port  string   // of the database
	stack string   // directory of a stack that may be up
	begin time.Time
}

func run(ctx context.Context, out io.Writer) (err error) {
	if os.Getuid() != 0 {
		return errors.New("root is needed: run make demo as root")
	}
	kcradle, err := programs.Path("kcradle")
	if err != nil {
		return err
	}
	boot, err := programs.AnyBoot()
	if err != nil {
		return err
	}
	if err := os.Setenv("CRADLE_BOOT", boot); err != nil {
		return err
	}
	for tool, pkg := range map[string]string{"mariadb": "mariadb-client", "curl": "curl", "redis-cli": "redis-tools", "docker": "docker-cli"} {
		if _, err := exec.LookPath(tool); err != nil {
			return fmt.Errorf("%w: apt-get install --no-install-recommends %s", err, pkg)
		}
	}
	d := &demo{out: out, begin: time.Now()}
	if d.dir, err = os.MkdirTemp("", "demo"); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.cleanUp(kcradle)) }()
	if err := os.Setenv("PATH", filepath.Dir(kcradle)+":"+os.Getenv("PATH")); err != nil {
		return err
	}
	for _, part := range []func(context.Context) error{d.database, d.nginx, d.redis, d.rows, d.nomad} {
		if err := part(ctx); err != nil {
			return err
		}
	}
	return nil
}

// database starts mariadb, which makes its databases while others are shown.
func (d *demo) database(ctx context.Context) error {
	image, err := programs.Image("mariadb")
	if err != nil {
		return err
	}
	if d.port, err = freePort(); err != nil {
		return err
	}
	d.title("mariadb: a database in a microVM, its data on a volume")
	if _, err := d.command(ctx, "truncate", "-s", "1G", "data.img"); err != nil {
		return err
	}
	if _, err := d.command(ctx, "kcradle", "summon", "--name", "db", "--memory", "512m", "-p", "127.0.0.1:"+d.port+":3306", "-v", d.dir+"/data.img:/var/lib/mysql",
		"-e", "MARIADB_ROOT_PASSWORD=secret", "-e", "MARIADB_DATABASE=shop", "db", "oci:"+image); err != nil {
		return err
	}
	return d.start(ctx, "db")
}

// rows are in the volume over the end of the database's machine.
func (d *demo) rows(ctx context.Context) error {
	d.title("mariadb: its client makes a table")
	client := []string{"mariadb", "--host=127.0.0.1", "--port=" + d.port, "--user=root", "--password=secret", "--connect-timeout=5", "--skip-column-names", "--batch", "shop", "--execute"}
	sql := func(statement string) []string { return append(client[:len(client):len(client)], statement) }
	if err := d.until(ctx, "db", sql("SELECT VERSION()")...); err != nil {
		return err
	}
	if _, err := d.command(ctx, sql("CREATE TABLE goods (name TEXT, amount INT); INSERT INTO goods VALUES ('cradle', 42)")...); err != nil {
		return err
	}
	d.title("mariadb: the machine ends; a new one starts on the same volume")
	if _, err := d.command(ctx, "kcradle", "stop", "db"); err != nil {
		return err
	}
	if err := d.start(ctx, "db"); err != nil {
		return err
	}
	if err := d.until(ctx, "db", sql("SELECT 1")...); err != nil {
		return err
	}
	return d.expect(ctx, "cradle\t42", sql("SELECT * FROM goods")...)
}

// nginx serves a page.
func (d *demo) nginx(ctx context.Context) error {
	port, err := d.serve(ctx, "web", "nginx", "80")
	if err != nil {
		return err
	}
	page := []string{"curl", "--silent", "--show-error", "--fail", "--max-time", "30", "http://127.0.0.1:" + port + "/"}
	if err := d.until(ctx, "web", page...); err != nil {
		return err
	}
	return d.expect(ctx, "nginx", page...)
}

// redis answers a ping.
func (d *demo) redis(ctx context.Context) error {
	port, err := d.serve(ctx, "cache", "redis", "6379")
	if err != nil {
		return err
	}
	ping := []string{"redis-cli", "-h", "127.0.0.1", "-p", port, "ping"}
	if err := d.until(ctx, "cache", ping...); err != nil {
		return err
	}
	return d.expect(ctx, "PONG", ping...)
}

// serve starts a pod of an image with one published port.
func (d *demo) serve(ctx context.Context, name, image, port string) (published string, err error) {
	layout, err := programs.Image(image)
	if err != nil {
		return "", err
	}
	if published, err = freePort(); err != nil {
		return "", err
	}
	d.title(image + ": answers its own client")
	if _, err := d.command(ctx, "kcradle", "summon", "--name", name, "-p", "127.0.0.1:"+published+":"+port, name, "oci:"+layout); err != nil {
		return "", err
	}
	return published, d.start(ctx, name)
}

// start boots a pod that is ended with the demo.
func (d *demo) start(ctx context.Context, pod string) error {
	d.pods = append(d.pods, pod)
	_, err := d.command(ctx, "kcradle", "run", "-d", pod)
	return err
}

// title and command narrate.
func (d *demo) title(text string) {
	fmt.Fprintf(d.out, "\n[%5.1f s] %s\n", time.Since(d.begin).Seconds(), text)
}

func (d *demo) command(ctx context.Context, args ...string) (string, error) {
	d.show(args)
	stdout, err := d.quiet(ctx, args...)
	for line := range strings.Lines(stdout) {
		fmt.Fprintf(d.out, "    %s\n", strings.TrimRight(line, "\n"))
	}
	return stdout, err
}

// timed is command for what says much: how long it takes is shown instead.
func (d *demo) timed(ctx context.Context, args ...string) error {
	d.show(args)
	begin := time.Now()
	if _, err := d.quiet(ctx, args...); err != nil {
		return err
	}
	fmt.Fprintf(d.out, "    done after %.1f s\n", time.Since(begin).Seconds())
	return nil
}

func (d *demo) show(args []string) {
	words := make([]string, len(args))
	for i, a := range args {
		a = strings.ReplaceAll(a, d.dir+"/", "")
		if strings.ContainsAny(a, " ();*'") {
			a = strconv.Quote(a)
		}
		words[i] = a
	}
	fmt.Fprintf(d.out, "  $ %s\n", strings.Join(words, " "))
}

func (d *demo) quiet(ctx context.Context, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Dir = d.dir
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	cmd.WaitDelay = 5 * time.Second
	if err := cmd.Run(); err != nil {
		return stdout.String(), fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, bytes.TrimSpace(stderr.Bytes()))
	}
	return stdout.String(), nil
}

// patience bounds every wait: emulated machines on a busy host take their time.
const patience = 10 * time.Minute

// until repeats a client's command while its server is coming up: in a pod of kcradle's, or "" for Nomad's.
func (d *demo) until(ctx context.Context, pod string, args ...string) error {
	d.show(args)
	begin := time.Now()
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for {
		_, err := d.quiet(ctx, args...)
		if err == nil {
			fmt.Fprintf(d.out, "    answers after %.1f s\n", time.Since(begin).Seconds())
			return nil
		}
		select {
		case <-ctx.Done():
			logs := ""
			if pod != "" {
				logs, _ = d.quiet(context.WithoutCancel(ctx), "kcradle", "logs", pod)
			}
			return fmt.Errorf("no answer after %s: %w\n%s", patience, err, logs)
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// expect wants a client's answer to contain a text.
func (d *demo) expect(ctx context.Context, want string, args ...string) error {
	d.show(args)
	got, err := d.quiet(ctx, args...)
	if err != nil {
		return err
	}
	for line := range strings.Lines(got) {
		if strings.Contains(line, want) {
			fmt.Fprintf(d.out, "    %s\n", strings.TrimSpace(line))
			return nil
		}
	}
	return fmt.Errorf("%s: %q does not contain %q", strings.Join(args, " "), got, want)
}

// cleanUp ends the pods and removes their directories.
func (d *demo) cleanUp(kcradle string) error {
	d.title("cleaning up")
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	var errs []error
	stopped := map[string]bool{}
	for _, pod := range d.pods {
		if stopped[pod] {
			continue
		}
		stopped[pod] = true
		if _, err := d.command(ctx, "kcradle", "stop", pod); err != nil {
			_, killed := d.quiet(ctx, kcradle, "kill", pod)
			errs = append(errs, err, killed)
		}
	}
	if d.stack != "" {
		errs = append(errs, stack.Clean(ctx, d.stack))
	}
	errs = append(errs, os.RemoveAll(d.dir))
	fmt.Fprintf(d.out, "\n[%5.1f s] done\n", time.Since(d.begin).Seconds())
	return errors.Join(errs...)
}

// freePort is a TCP port that was free a moment ago.
func freePort() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer l.Close()
	_, port, err := net.SplitHostPort(l.Addr().String())
	return port, err
}
