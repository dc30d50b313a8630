//go:build vm

package tunnel

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/nomad/api"
	"github.com/moby/moby/api/pkg/stdcopy"
	"github.com/moby/moby/client"

	"github.com/cradlestack/cradlestack/internal/nomadtest"
	"github.com/cradlestack/cradlestack/test/programs"
)

// A world is a server and a client with ACLs, and a pod of two containers.
type world struct {
	*nomadtest.Cluster
	alloc *api.AllocationListStub
}

// startWorld starts a pod whose API is reached by the server: its node is another one.
func startWorld(t testing.TB) *world {
	image, err := programs.Image("busybox")
	if err != nil {
		t.Fatal(err)
	}
	o := nomadtest.Options{Clients: 1, ACL: true}
	if err := o.Cradle(""); err != nil {
		t.Fatal(err)
	}
	w := &world{Cluster: nomadtest.Start(t, o)}
	job := w.Run(t, fmt.Sprintf(`
job "pod" {
  group "g" {
    task "main" {
      driver = "cradle"
      config {
        image   = "oci:%[1]s"
        command = "sh"
        args    = ["-c", "trap exit TERM; i=0; while :; do i=$(($i+1)); echo line $i; sleep 0.2; done"]
        container "idle" {
          image   = "oci:%[1]s"
          command = "sleep"
          args    = ["100000"]
        }
      }
      resources {
        cpu    = 100
        memory = 128
      }
    }
    task "shell" {
      driver = "raw_exec"
      config {
        command = "/bin/sleep"
        args    = ["100000"]
      }
    }
  }
}`, image))
	w.alloc = w.UntilRunning(t, job)
	return w
}

// target is the pod, for whoever has the token.
func (w *world) target(token string) Target {
	s := w.Server()
	return Target{Config: &api.Config{Address: "http://127.0.0.1:4646", HttpClient: s.HTTP(), SecretID: token}, Alloc: w.alloc.ID, Task: "main"}
}

// management is the token that may do everything.
func (w *world) management() string {
	for _, e := range w.Env() {
		if token, ok := strings.CutPrefix(e, "NOMAD_TOKEN="); ok {
			return token
		}
	}
	return ""
}

// docker is docker's own client, through tunnels.
func docker(t testing.TB, target Target) *client.Client {
	t.Helper()
	c, err := client.New(client.WithHost("tcp://pod:1"), client.WithDialContext(func(ctx context.Context, _, _ string) (net.Conn, error) { return Dial(ctx, target) }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func TestVMTunnel(t *testing.T) {
	w := startWorld(t)
	for _, test := range []struct {
		name string
		f    func(*testing.T, *world)
	}{
		{"refused", testRefused}, {"list", testList}, {"logs", testLogs}, {"exec", testExec}, {"copy", testCopy}, {"gone", testGone}, {"end", testEnd},
	} {
		t.Run(test.name, func(t *testing.T) { test.f(t, w) })
	}
}

// A token needs alloc-exec, as for every exec; and the tunnel is nothing for terminals, arguments and other drivers.
func testRefused(t *testing.T, w *world) {
	token := func(name, rules string) string {
		if _, err := w.API.ACLPolicies().Upsert(&api.ACLPolicy{Name: name, Rules: rules}, nil); err != nil {
			t.Fatal(err)
		}
		made, _, err := w.API.ACLTokens().Create(&api.ACLToken{Name: name, Type: "client", Policies: []string{name}}, nil)
		if err != nil {
			t.Fatal(err)
		}
		return made.SecretID
	}
	for secret, denied := range map[string]bool{
		"":                                     true,
		"11111111-1111-1111-1111-111111111111": true,
		token("reads", `namespace "default" { policy = "read" }`):                                                 true,
		token("elsewhere", `namespace "other" { capabilities = ["read-job", "alloc-exec"] }`):                     true,
		token("executes", `namespace "default" { capabilities = ["read-job", "alloc-exec"] }`):                    false,
		token("lifecycle", `namespace "default" { capabilities = ["read-job", "alloc-lifecycle", "read-logs"] }`): true,
	} {
		c, err := Dial(t.Context(), w.target(secret))
		if err == nil {
			c.Close()
		}
		if denied != errors.Is(err, ErrDenied) || !denied && err != nil {
			t.Errorf("denied: %t, got %v", denied, err)
		}
	}
	missing := w.target(w.management())
	missing.Alloc = "12345678-1234-1234-1234-123456789abc"
	if _, err := Dial(t.Context(), missing); !errors.Is(err, ErrNotRunning) {
		t.Errorf("no such allocation: %v", err)
	}
	other := w.target(w.management())
	other.Task = "shell"
	if _, err := Dial(t.Context(), other); err == nil {
		t.Error("connected to a task of another driver")
	}
	refused := map[string][]string{"switch the terminal off": {"cradle:vdocker"}, "takes no arguments": {"cradle:vdocker", "ps"}}
	for range 20 { // Nomad's client loses the exit code now and then if the driver does not wait for its input
		for want, command := range refused {
			var out, errs bytes.Buffer
			code, err := w.API.Allocations().Exec(t.Context(), &api.Allocation{ID: w.alloc.ID, NodeID: w.alloc.NodeID}, "main", len(command) == 1, command, strings.NewReader(""), &out, &errs, nil, nil)
			if err != nil || code == 0 || !strings.Contains(errs.String(), want) {
				t.Errorf("%v: exit code %d, %q, %v", command, code, errs.String(), err)
			}
		}
	}
	stdout, stderr, code := w.TryCLI(t, "GET /_ping HTTP/1.1\r\nHost: pod\r\nConnection: close\r\n\r\n", "alloc", "exec", "-i", "-t=false", "-task", "main", w.alloc.ID, "cradle:vdocker")
	if code != 0 || !strings.HasPrefix(stdout, "HTTP/1.1 200 OK\r\n") || !strings.HasSuffix(stdout, "OK") {
		t.Errorf("by hand: exit code %d, %q, %q", code, stdout, stderr)
	}
}

// The pod's second container may start after Nomad has called the task running.
func testList(t *testing.T, w *world) {
	c := docker(t, w.target(w.management()))
	for end := time.Now().Add(nomadtest.Patience); ; time.Sleep(50 * time.Millisecond) {
		list, err := c.ContainerList(t.Context(), client.ContainerListOptions{})
		if err != nil {
			t.Fatal(err)
		}
		names := map[string]string{}
		for _, c := range list.Items {
			names[strings.TrimPrefix(c.Names[0], "/")] = string(c.State)
		}
		if len(names) == 2 && names["main"] == "running" && names["idle"] == "running" {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("the pod has %v", names)
		}
	}
}

// Several follow logs at once, and stop when they like.
func testLogs(t *testing.T, w *world) {
	c := docker(t, w.target(w.management()))
	var g sync.WaitGroup
	for range 4 {
		g.Go(func() {
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			r, err := c.ContainerLogs(ctx, "main", client.ContainerLogsOptions{ShowStdout: true, Follow: true})
			if err != nil {
				t.Error(err)
				return
			}
			defer r.Close()
			var out bytes.Buffer
			stdcopy.StdCopy(writerFunc(func(p []byte) (int, error) {
				out.Write(p)
				if strings.Contains(out.String(), "line 30\n") {
					cancel()
				}
				return len(p), nil
			}), io.Discard, r)
			if !strings.HasPrefix(out.String(), "line 1\nline 2\nline 3\n") || !strings.Contains(out.String(), "line 30\n") {
				t.Errorf("logs: %q", out.String())
			}
		})
	}
	g.Wait()
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// A terminal, and a command whose input ends before its output.
func testExec(t *testing.T, w *world) {
	c := docker(t, w.target(w.management()))
	e, err := c.ExecCreate(t.Context(), "idle", client.ExecCreateOptions{
		TTY: true, AttachStdin: true, AttachStdout: true, AttachStderr: true, ConsoleSize: client.ConsoleSize{Height: 33, Width: 77}, Cmd: []string{"sh"},
	})
	if err != nil {
		t.Fatal(err)
	}
	a, err := c.ExecAttach(t.Context(), e.ID, client.ExecAttachOptions{TTY: true})
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	expect := func(text string) {
		t.Helper()
		var got strings.Builder
		for !strings.Contains(got.String(), text) {
			b, err := a.Reader.ReadByte()
			if err != nil {
				t.Fatalf("%q, %v; want %q", got.String(), err, text)
			}
			got.WriteByte(b)
		}
	}
	io.WriteString(a.Conn, "stty size; echo it is $((6*7))\n")
	expect("33 77")
	expect("it is 42")
	if _, err := c.ExecResize(t.Context(), e.ID, client.ExecResizeOptions{Height: 44, Width: 88}); err != nil {
		t.Fatal(err)
	}
	io.WriteString(a.Conn, "stty size; exit 3\n")
	expect("44 88")
	io.Copy(io.Discard, a.Reader)
	a.Close()
	if s, err := c.ExecInspect(t.Context(), e.ID, client.ExecInspectOptions{}); err != nil || s.Running || s.ExitCode != 3 {
		t.Errorf("exec is %+v, %v", s, err)
	}

	if e, err = c.ExecCreate(t.Context(), "idle", client.ExecCreateOptions{AttachStdin: true, AttachStdout: true, AttachStderr: true, Cmd: []string{"sh", "-c", "wc -c; echo late >&2"}}); err != nil {
		t.Fatal(err)
	}
	if a, err = c.ExecAttach(t.Context(), e.ID, client.ExecAttachOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := a.Conn.Write(make([]byte, 300_000)); err != nil {
		t.Fatal(err)
	}
	if err := a.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	var out, errs bytes.Buffer
	if _, err := stdcopy.StdCopy(&out, &errs, a.Reader); err != nil || out.String() != "300000\n" || errs.String() != "late\n" {
		t.Errorf("got %q, %q, %v", out.String(), errs.String(), err)
	}
}

const copied = 64 << 20

// content is not the same anywhere.
func content() []byte {
	data := make([]byte, copied)
	for i := range data {
		data[i] = byte(i*7 + i>>8 + i>>16)
	}
	return data
}

func copyIn(ctx context.Context, c *client.Client, data []byte) error {
	r, out := io.Pipe()
	go func() {
		w := tar.NewWriter(out)
		w.WriteHeader(&tar.Header{Name: "file", Typeflag: tar.TypeReg, Size: int64(len(data)), Mode: 0o644})
		w.Write(data)
		out.CloseWithError(w.Close())
	}()
	_, err := c.CopyToContainer(ctx, "idle", client.CopyToContainerOptions{DestinationPath: "/root", Content: r})
	return err
}

// copyOut returns the file's checksum.
func copyOut(ctx context.Context, c *client.Client) (uint32, error) {
	r, err := c.CopyFromContainer(ctx, "idle", client.CopyFromContainerOptions{SourcePath: "/root/file"})
	if err != nil {
		return 0, err
	}
	defer r.Content.Close()
	archive := tar.NewReader(r.Content)
	if _, err := archive.Next(); err != nil {
		return 0, err
	}
	sum := crc32.NewIEEE()
	_, err = io.CopyBuffer(sum, struct{ io.Reader }{archive}, make([]byte, 1<<20))
	return sum.Sum32(), err
}

func testCopy(t *testing.T, w *world) {
	c, data := docker(t, w.target(w.management())), content()
	if err := copyIn(t.Context(), c, data); err != nil {
		t.Fatal(err)
	}
	if sum, err := copyOut(t.Context(), c); err != nil || sum != crc32.ChecksumIEEE(data) {
		t.Errorf("the file came back as another one: %v", err)
	}
}

// connections are those that the pod's attendant has with its vdocker.sock's clients.
func (w *world) connections(t testing.TB) (n int) {
	t.Helper()
	table, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/unix", w.Clients()[0].PID()))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(table)) {
		// Both a listener and its connections have the name.
		if f := strings.Fields(line); len(f) == 8 && strings.HasSuffix(f[7], "/vdocker.sock") && f[5] == "03" {
			n++
		}
	}
	return n
}

func (w *world) noConnections(t *testing.T) {
	t.Helper()
	for end := time.Now().Add(nomadtest.Patience); w.connections(t) > 0; time.Sleep(50 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%d connections stay", w.connections(t))
		}
	}
}

// A client that has gone, in order or not, is noticed by the pod's side though nothing is sent; and nothing is left on this side.
func testGone(t *testing.T, w *world) {
	w.noConnections(t)
	before := runtime.NumGoroutine()
	target := w.target(w.management())
	for _, orderly := range []bool{true, false} {
		var all []net.Conn
		for range 5 {
			c, err := Dial(t.Context(), target)
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, c)
		}
		if n := w.connections(t); n != 5 {
			t.Errorf("%d connections at the pod", n)
		}
		for _, c := range all {
			if !orderly {
				c.(*conn).ws.NetConn().Close()
			}
			c.Close()
		}
		w.noConnections(t)
	}
	target.Config.HttpClient.CloseIdleConnections()
	for end := time.Now().Add(nomadtest.Patience); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if runtime.NumGoroutine() <= before {
			return
		}
	}
	all := make([]byte, 1<<20)
	t.Errorf("%d goroutines were there, %d are\n%s", before, runtime.NumGoroutine(), all[:runtime.Stack(all, true)])
}

// A connection ends with its pod, and there is none to a pod that has ended.
func testEnd(t *testing.T, w *world) {
	target := w.target(w.management())
	c, err := Dial(t.Context(), target)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	w.Stop(t, "pod")
	if n, err := io.Copy(io.Discard, c); n != 0 {
		t.Errorf("%d bytes, %v", n, err)
	}
	if _, err := Dial(t.Context(), target); !errors.Is(err, ErrNotRunning) {
		t.Errorf("after the end: %v", err)
	}
}

// BenchmarkVMCopy copies 64 MiB into a container and back, by the node's vdocker.sock and through a tunnel, one after the other in each round; and back by a
// command of Nomad's exec.
func BenchmarkVMCopy(b *testing.B) {
	w, data := startWorld(b), content()
	found, err := filepath.Glob(filepath.Join(w.Clients()[0].Path(w.Clients()[0].Dir), "cradle/tasks/*/pod/vdocker.sock"))
	if err != nil || len(found) != 1 {
		b.Fatal(found, err)
	}
	local, err := client.New(client.WithHost("unix://" + found[0]))
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { local.Close() })
	far := docker(b, w.target(w.management()))
	for _, direction := range []string{"in", "out"} {
		b.Run(direction, func(b *testing.B) {
			var took [2]time.Duration
			for b.Loop() {
				for i, c := range []*client.Client{local, far} {
					begin := time.Now()
					err := copyIn(b.Context(), c, data)
					if direction == "out" && err == nil {
						begin = time.Now()
						_, err = copyOut(b.Context(), c)
					}
					if err != nil {
						b.Fatal(err)
					}
					took[i] += time.Since(begin)
				}
			}
			for i, name := range []string{"socket", "tunnel"} {
				b.ReportMetric(float64(b.N)*copied/1e6/took[i].Seconds(), name+"-MB/s")
			}
			b.ReportMetric(took[1].Seconds()/took[0].Seconds(), "ratio")
		})
	}
	b.Run("exec", func(b *testing.B) {
		b.SetBytes(copied)
		for b.Loop() {
			var n int64
			count := writerFunc(func(p []byte) (int, error) { n += int64(len(p)); return len(p), nil })
			code, err := w.API.Allocations().Exec(b.Context(), &api.Allocation{ID: w.alloc.ID, NodeID: w.alloc.NodeID}, "main", false,
				[]string{"--container=idle", "cat", "/root/file"}, strings.NewReader(""), count, io.Discard, nil, nil)
			if err != nil || code != 0 || n != copied {
				b.Fatal(n, code, err)
			}
		}
	})
}
