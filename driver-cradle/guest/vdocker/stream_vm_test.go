//go:build vm

package vdocker_test

import (
	"archive/tar"
	"bytes"
	"context"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/moby/moby/api/pkg/stdcopy"
	"github.com/moby/moby/client"
)

// lineReader reads a stream until it has seen a text.
type lineReader struct {
	r    io.Reader
	seen strings.Builder
}

func (l *lineReader) until(t *testing.T, text string) {
	t.Helper()
	buf := make([]byte, 4096)
	for !strings.Contains(l.seen.String(), text) {
		n, err := l.r.Read(buf)
		l.seen.Write(buf[:n])
		if err != nil {
			t.Fatalf("%q is not in %q: %v", text, l.seen.String(), err)
		}
	}
}

// TestVMDetachKeys: the client types the keys, the stream ends, the shell does not.
func TestVMDetachKeys(t *testing.T) {
	c := dockerClient(t, thePod(t))
	for _, tt := range []struct{ option, typed string }{{"", "\x10\x11"}, {"ctrl-x,y", "\x18y"}} {
		a, err := c.ContainerAttach(t.Context(), "term", client.ContainerAttachOptions{Stream: true, Stdin: true, Stdout: true, Stderr: true, DetachKeys: tt.option})
		if err != nil {
			t.Fatal(err)
		}
		defer a.Close()
		if kind, ok := a.MediaType(); !ok || kind != "application/vnd.docker.raw-stream" {
			t.Errorf("media type %q", kind)
		}
		out := &lineReader{r: a.Reader}
		io.WriteString(a.Conn, "echo $((6*7))\n")
		out.until(t, "42\r\n")
		io.WriteString(a.Conn, tt.typed[:1])
		io.WriteString(a.Conn, tt.typed[1:])
		if _, err := io.Copy(io.Discard, a.Reader); err != nil {
			t.Errorf("the end of the stream: %v", err)
		}
		s, err := c.ContainerInspect(t.Context(), "term", client.ContainerInspectOptions{})
		if err != nil || !s.Container.State.Running {
			t.Errorf("after detaching: %+v, %v", s.Container.State, err)
		}
	}
}

func TestVMResize(t *testing.T) {
	c := dockerClient(t, thePod(t))
	e, err := c.ExecCreate(t.Context(), "idle", client.ExecCreateOptions{
		TTY: true, AttachStdin: true, AttachStdout: true, AttachStderr: true, ConsoleSize: client.ConsoleSize{Height: 33, Width: 77},
		Cmd: []string{"sh", "-c", "trap 'stty size; exit' WINCH; stty size; while :; do sleep 0.1; done"},
	})
	if err != nil {
		t.Fatal(err)
	}
	a, err := c.ExecAttach(t.Context(), e.ID, client.ExecAttachOptions{TTY: true})
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	out := &lineReader{r: a.Reader}
	out.until(t, "33 77")
	if _, err := c.ExecResize(t.Context(), e.ID, client.ExecResizeOptions{Height: 44, Width: 88}); err != nil {
		t.Fatal(err)
	}
	out.until(t, "44 88")
}

// TestVMHalfClose: the end of the client's input ends the command's input, and the output comes to its own end.
func TestVMHalfClose(t *testing.T) {
	c := dockerClient(t, thePod(t))
	e, err := c.ExecCreate(t.Context(), "idle", client.ExecCreateOptions{
		AttachStdin: true, AttachStdout: true, AttachStderr: true, Cmd: []string{"sh", "-c", "wc -c; echo late >&2; exit 9"},
	})
	if err != nil {
		t.Fatal(err)
	}
	a, err := c.ExecAttach(t.Context(), e.ID, client.ExecAttachOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	if kind, _ := a.MediaType(); kind != "application/vnd.docker.multiplexed-stream" {
		t.Errorf("media type %q", kind)
	}
	if _, err := a.Conn.Write(make([]byte, 300_000)); err != nil {
		t.Fatal(err)
	}
	if err := a.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	var out, errs bytes.Buffer
	if _, err := stdcopy.StdCopy(&out, &errs, a.Reader); err != nil {
		t.Fatal(err)
	}
	if out.String() != "300000\n" || errs.String() != "late\n" {
		t.Errorf("got %q, %q", out.String(), errs.String())
	}
	s, err := c.ExecInspect(t.Context(), e.ID, client.ExecInspectOptions{})
	if err != nil || s.Running || s.ExitCode != 9 {
		t.Errorf("exec is %+v, %v", s, err)
	}
}

// TestVMExitCodeAtStreamEnd: who asks as soon as the stream has ended, as docker's CLI does, is told the exit code.
func TestVMExitCodeAtStreamEnd(t *testing.T) {
	c := dockerClient(t, thePod(t))
	for i := range 20 {
		e, err := c.ExecCreate(t.Context(), "idle", client.ExecCreateOptions{
			TTY: i%2 == 0, AttachStdin: true, AttachStdout: true, AttachStderr: true, Cmd: []string{"sh", "-c", "exit 5"},
		})
		if err != nil {
			t.Fatal(err)
		}
		a, err := c.ExecAttach(t.Context(), e.ID, client.ExecAttachOptions{TTY: i%2 == 0})
		if err != nil {
			t.Fatal(err)
		}
		defer a.Close()
		if _, err := io.Copy(io.Discard, a.Reader); err != nil {
			t.Fatal(err)
		}
		if s, err := c.ExecInspect(t.Context(), e.ID, client.ExecInspectOptions{}); err != nil || s.Running || s.ExitCode != 5 {
			t.Errorf("exec %d at the end of its stream: %+v, %v", i, s, err)
		}
	}
	for i := range 10 {
		a, err := c.ContainerAttach(t.Context(), "code", client.ContainerAttachOptions{Stream: true, Stdout: true})
		if err != nil {
			t.Fatal(err)
		}
		defer a.Close()
		if _, err := c.ContainerStart(t.Context(), "code", client.ContainerStartOptions{}); err != nil {
			t.Fatal(err)
		}
		if _, err := io.Copy(io.Discard, a.Reader); err != nil {
			t.Fatal(err)
		}
		s, err := c.ContainerInspect(t.Context(), "code", client.ContainerInspectOptions{})
		if err != nil || s.Container.State.Running || s.Container.State.ExitCode != 3 {
			t.Errorf("container at the end of its stream, %d: %+v, %v", i, s.Container.State, err)
		}
	}
}

// TestVMExecWithoutOutput: a command that has closed its output still ends before its stream does.
func TestVMExecWithoutOutput(t *testing.T) {
	c := dockerClient(t, thePod(t))
	e, err := c.ExecCreate(t.Context(), "idle", client.ExecCreateOptions{
		AttachStdin: true, AttachStdout: true, AttachStderr: true, Cmd: []string{"sh", "-c", "exec >/dev/null 2>&1; sleep 1; exit 6"},
	})
	if err != nil {
		t.Fatal(err)
	}
	a, err := c.ExecAttach(t.Context(), e.ID, client.ExecAttachOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	if _, err := io.Copy(io.Discard, a.Reader); err != nil {
		t.Fatal(err)
	}
	if s, err := c.ExecInspect(t.Context(), e.ID, client.ExecInspectOptions{}); err != nil || s.Running || s.ExitCode != 6 {
		t.Errorf("at the end of its stream: %+v, %v", s, err)
	}
}

// TestVMExecAtPidsLimit: a command for which the container may have no process more fails with a reason, be it started by way of a
// process that prepares it (limited has ulimits) or without one.
func TestVMExecAtPidsLimit(t *testing.T) {
	p := thePod(t)
	must := func(args ...string) {
		t.Helper()
		if _, stderr, code := docker(t, p, nil, args...); code != 0 {
			t.Fatalf("docker %s: %s", strings.Join(args, " "), stderr)
		}
	}
	for name, before := range map[string]string{"limited": "50", "more": "0"} {
		t.Run(name, func(t *testing.T) {
			must("update", "--pids-limit", "12", name)
			defer func() {
				must("update", "--pids-limit", before, name)
				must("restart", "-t", "0", name)
			}()
			const want = "OCI runtime exec failed: exec failed: unable to start container process: " +
				"resource temporarily unavailable: the container's limit of 12 processes is reached"
			// What ends just now still counts: it is full when a command fails that comes after one that has.
			for n, running := 0, 0; ; n++ {
				if running > 12 || n > 24 {
					t.Fatal("there is no limit")
				}
				_, text, code := docker(t, p, nil, "exec", "-d", name, "sleep", "1000")
				if code == 0 {
					running++
					continue
				}
				if !strings.Contains(text, want) {
					t.Errorf("docker exec -d: %q", text)
				}
				stdout, stderr, code := docker(t, p, nil, "exec", name, "true")
				if code == 0 {
					continue
				}
				if !strings.Contains(stdout+stderr, want) || code != 126 {
					t.Errorf("docker exec: %d, %q, %q", code, stdout, stderr)
				}
				break
			}
		})
	}
}

// TestVMWaitMissesNothing: an end that comes right after the header has been answered counts.
func TestVMWaitMissesNothing(t *testing.T) {
	c := dockerClient(t, thePod(t))
	for range 5 {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
		defer cancel()
		w := c.ContainerWait(ctx, "code", client.ContainerWaitOptions{Condition: "next-exit"})
		if _, err := c.ContainerStart(ctx, "code", client.ContainerStartOptions{}); err != nil {
			t.Fatal(err)
		}
		select {
		case r := <-w.Result:
			if r.StatusCode != 3 {
				t.Errorf("exit code %d", r.StatusCode)
			}
		case err := <-w.Error:
			t.Fatal(err)
		}
	}
}

// TestVMDroppedClientsLeakNothing: clients of every streaming call go away in the middle; the agent's goroutines do too.
func TestVMDroppedClientsLeakNothing(t *testing.T) {
	p := thePod(t)
	c := dockerClient(t, p)
	goroutines := func() int {
		i, err := c.Info(t.Context(), client.InfoOptions{})
		if err != nil {
			t.Fatal(err)
		}
		return i.Info.NGoroutines
	}
	before := goroutines()
	for range 10 {
		ctx, cancel := context.WithCancel(t.Context())
		logs, err := c.ContainerLogs(ctx, "idle", client.ContainerLogsOptions{ShowStdout: true, Follow: true})
		if err != nil {
			t.Fatal(err)
		}
		attached, err := c.ContainerAttach(ctx, "term", client.ContainerAttachOptions{Stream: true, Stdin: true, Stdout: true})
		if err != nil {
			t.Fatal(err)
		}
		stats, err := c.ContainerStats(ctx, "idle", client.ContainerStatsOptions{Stream: true})
		if err != nil {
			t.Fatal(err)
		}
		c.ContainerWait(ctx, "idle", client.ContainerWaitOptions{})
		c.Events(ctx, client.EventsListOptions{})
		archive, err := c.CopyFromContainer(ctx, "idle", client.CopyFromContainerOptions{SourcePath: "/bin"})
		if err != nil {
			t.Fatal(err)
		}
		e, err := c.ExecCreate(ctx, "idle", client.ExecCreateOptions{AttachStdout: true, Cmd: []string{"yes"}})
		if err != nil {
			t.Fatal(err)
		}
		running, err := c.ExecAttach(ctx, e.ID, client.ExecAttachOptions{})
		if err != nil {
			t.Fatal(err)
		}
		io.ReadFull(running.Reader, make([]byte, 100_000))
		cancel()
		logs.Close()
		attached.Close()
		stats.Body.Close()
		archive.Content.Close()
		running.Close()
	}
	if _, _, code := docker(t, p, nil, "exec", "idle", "killall", "yes"); code != 0 {
		t.Error("no yes to kill")
	}
	io.WriteString(mustAttach(t, c), "echo\n") // the shell prints: clients that have gone are noticed at the latest then
	deadline := time.Now().Add(5 * time.Minute)
	for n := goroutines(); n > before+3; n = goroutines() {
		if time.Now().After(deadline) {
			t.Fatalf("%d goroutines in the agent, %d before", n, before)
		}
		time.Sleep(100 * time.Millisecond)
	}
}

func mustAttach(t *testing.T, c *client.Client) io.Writer {
	a, err := c.ContainerAttach(t.Context(), "term", client.ContainerAttachOptions{Stream: true, Stdin: true, Stdout: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(a.Close)
	return a.Conn
}

// TestVMArchiveCall: what the docker CLI does not ask for.
func TestVMArchiveCall(t *testing.T) {
	p := thePod(t)
	c := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", p.socket)
	}}}
	defer c.CloseIdleConnections()
	put := func(query, kind string, content []byte) (int, string) {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPut, "http://docker/v1.41/containers/user/archive?"+query, bytes.NewReader(content))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Content-Type", kind)
		resp, err := c.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		text, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return resp.StatusCode, string(text)
	}
	var archive bytes.Buffer
	w := tar.NewWriter(&archive)
	w.WriteHeader(&tar.Header{Name: "f", Typeflag: tar.TypeReg, Mode: 0o644, Uid: 77, Gid: 88})
	w.Close()
	for query, owner := range map[string]string{"path=/tmp": "77:88", "path=/tmp&copyUIDGID=1": "1234:567"} {
		// curl's content type makes a form of the body for who is not careful.
		if code, text := put(query, "application/x-www-form-urlencoded", archive.Bytes()); code != 200 {
			t.Errorf("%s: %d %s", query, code, text)
		}
		if out, _, _ := docker(t, p, nil, "exec", "user", "stat", "-c", "%u:%g", "/tmp/f"); out != owner+"\n" {
			t.Errorf("%s: the owner is %s", query, out)
		}
	}
	for query, want := range map[string]int{"path=/nosuch": 404, "path=/bin/busybox": 400, "": 400} {
		if code, text := put(query, "application/x-tar", archive.Bytes()); code != want || !strings.Contains(text, `{"message":"`) {
			t.Errorf("%q: %d %s, want %d", query, code, text, want)
		}
	}
	if code, text := put("path=/tmp", "application/x-tar", archive.Bytes()[:100]); code != 400 || !strings.Contains(text, "unreadable archive") {
		t.Errorf("truncated: %d %s", code, text)
	}
}
