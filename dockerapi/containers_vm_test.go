//go:build vm

package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/hashicorp/nomad/api"

	"github.com/cradlestack/cradlestack/internal/nomadtest"
)

// send sends a request to the server as a client of the API does. An answer may wait for all that its test does meanwhile.
func (h *host) send(method, path, body string) *http.Response {
	h.t.Helper()
	client := &http.Client{Timeout: 5 * nomadtest.Patience, Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(context.Context, string, string) (net.Conn, error) {
		return net.Dial("unix", h.socket)
	}}}
	r, err := http.NewRequest(method, "http://docker"+path, strings.NewReader(body))
	if err != nil {
		h.t.Fatal(err)
	}
	r.Header.Set("Content-Type", "application/json")
	a, err := client.Do(r)
	if err != nil {
		h.t.Fatal(err)
	}
	return a
}

// ask decodes what is answered into out.
func (h *host) ask(method, path, body string, out any) int {
	h.t.Helper()
	a := h.send(method, path, body)
	defer a.Body.Close()
	if out != nil {
		if err := json.NewDecoder(a.Body).Decode(out); err != nil {
			h.t.Fatalf("%s %s: %v", method, path, err)
		}
	}
	return a.StatusCode
}

// A stream is a connection that a request has taken over.
type stream struct {
	net.Conn
	t  *testing.T
	in *bufio.Reader
}

// hijack sends a request whose connection becomes a stream.
func (h *host) hijack(path, body string) *stream {
	h.t.Helper()
	conn, err := net.Dial("unix", h.socket)
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { conn.Close() })
	fmt.Fprintf(conn, "POST %s HTTP/1.1\r\nHost: docker\r\nConnection: Upgrade\r\nUpgrade: tcp\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", path, len(body), body)
	s := &stream{conn, h.t, bufio.NewReader(conn)}
	conn.SetReadDeadline(time.Now().Add(nomadtest.Patience))
	for line := ""; line != "\r\n"; {
		if line, err = s.in.ReadString('\n'); err != nil {
			h.t.Fatalf("%s: %v", path, err)
		}
		if strings.HasPrefix(line, "HTTP/") && !strings.Contains(line, " 101 ") {
			rest, _ := io.ReadAll(s.in)
			h.t.Fatalf("%s: %s%s", path, line, rest)
		}
	}
	return s
}

// until reads until a text has come.
func (s *stream) until(text string) {
	s.t.Helper()
	var all bytes.Buffer
	for !strings.Contains(all.String(), text) {
		b, err := s.in.ReadByte()
		if err != nil {
			s.t.Fatalf("waited for %q: %v after %q", text, err, &all)
		}
		all.WriteByte(b)
	}
}

func (s *stream) say(text string) {
	s.t.Helper()
	if _, err := io.WriteString(s, text); err != nil {
		s.t.Fatal(err)
	}
}

// One container with a terminal: several clients attached, an exec whose terminal is resized, paused, its limits changed, looked at.
func TestVMTerminals(t *testing.T) {
	h := openBeside(t)
	h.run("run", "-dit", "--name", "term", "--memory", "128m", "busybox", "sh", "-c", "while read line; do echo you said $line; done")
	one, two := h.hijack("/containers/term/attach?stream=1&stdin=1&stdout=1", ""), h.hijack("/containers/term/attach?stream=1&stdin=1&stdout=1", "")
	one.say("first\n")
	one.until("you said first")
	two.until("you said first")
	two.say("second\n")
	one.until("you said second")
	one.Close() // the other one stays
	two.say("third\n")
	two.until("you said third")
	two.say("\x10\x11") // the keys that detach
	if rest, err := io.ReadAll(two.in); err != nil {
		t.Errorf("after detaching: %q, %v", rest, err)
	}
	h.want("true", "inspect", "-f", "{{.State.Running}}", "term")

	var exec struct{ ID string }
	h.ask("POST", "/containers/term/exec", `{"AttachStdin": true, "AttachStdout": true, "Tty": true, "ConsoleSize": [20, 70], "Cmd": ["sh", "-c", "while read line; do stty size; done"]}`, &exec)
	s := h.hijack("/exec/"+exec.ID+"/start", `{"Tty": true}`)
	s.say("\n")
	s.until("20 70")
	if status := h.ask("POST", "/exec/"+exec.ID+"/resize?h=33&w=111", "", nil); status != http.StatusOK {
		t.Errorf("resize of an exec: %d", status)
	}
	s.say("\n")
	s.until("33 111")
	s.say("\x04")
	h.until("the end of the exec", func() bool {
		var e struct {
			Running  bool
			ExitCode *int
		}
		h.ask("GET", "/exec/"+exec.ID+"/json", "", &e)
		return !e.Running && e.ExitCode != nil && *e.ExitCode == 0
	})
	if status := h.ask("POST", "/containers/term/resize?h=44&w=99", "", nil); status != http.StatusOK {
		t.Errorf("resize of a container: %d", status)
	}
	h.want("44 99", "exec", "term", "sh", "-c", "stty size </proc/1/fd/0")
	h.ask("POST", "/containers/create?name=sized", `{"Image": "busybox", "Tty": true, "Cmd": ["stty", "size"], "HostConfig": {"ConsoleSize": [20, 70]}}`, nil)
	h.run("start", "sized")
	h.want("0", "wait", "sized")
	h.want("20 70", "logs", "sized")
	h.run("rm", "sized")

	h.run("pause", "term")
	h.want("paused true true", "inspect", "-f", "{{.State.Status}} {{.State.Running}} {{.State.Paused}}", "term")
	h.want("term", "ps", "--filter", "status=paused", "--format", "{{.Names}}")
	h.wantError(1, "is paused", "exec", "term", "true")
	h.wantError(1, "already paused", "pause", "term")
	h.run("unpause", "term")
	h.want("ok", "exec", "term", "echo", "ok")
	h.wantError(1, "is not paused", "unpause", "term")

	stats := strings.Fields(h.run("stats", "--no-stream", "--format", "{{.Name}} {{.MemUsage}} {{.PIDs}}", "term"))
	if len(stats) != 5 || stats[0] != "term" || stats[1] == "0B" || stats[3] != "128MiB" || stats[4] == "0" {
		t.Errorf("stats: %q", stats)
	}
	h.run("update", "--memory", "100m", "--memory-swap", "-1", "--pids-limit", "50", "term")
	h.want("104857600 50", "inspect", "-f", "{{.HostConfig.Memory}} {{.HostConfig.PidsLimit}}", "term")
	h.want("104857600 50", "exec", "term", "sh", "-c", "cd /sys/fs/cgroup; echo $(cat memory.max pids.max)")
	h.wantError(1, "Minimum memory limit", "update", "--memory", "1m", "term")
	h.run("rm", "-f", "term")
}

// Restart policies are followed as docker follows them, and what memory runs out for is told.
func TestVMEndings(t *testing.T) {
	h := openBeside(t)
	ends := h.run("run", "-d", "--restart", "always", "--name", "always", "busybox", "sh", "-c", "echo again; sleep 1")
	h.run("run", "-d", "--name", "hungry", "--memory", "64m", "busybox", "sh", "-c", "tail /dev/zero")
	h.run("run", "-d", "--name", "policy", "--restart", "on-failure:1", "busybox", "sh", "-c", "while ! test -e /go; do sleep 0.1; done; exit 3")
	h.run("run", "-d", "--name", "trap", "busybox", "sh", "-c", "trap 'exit 5' TERM; echo ready; while :; do sleep 0.1; done")
	h.want("137", "wait", "hungry")
	h.want("exited 137 true", "inspect", "-f", "{{.State.Status}} {{.State.ExitCode}} {{.State.OOMKilled}}", "hungry")
	h.until("two more runs", func() bool {
		n, _ := strconv.Atoi(h.run("inspect", "-f", "{{.RestartCount}}", "always"))
		return n >= 2
	})
	h.run("stop", "-t", "1", "always")
	h.want("exited", "inspect", "-f", "{{.State.Status}}", "always")
	h.want("", "ps", "-q", "--filter", "id="+ends)
	h.run("update", "--restart", "on-failure:2", "policy")
	h.try("", "exec", "policy", "touch", "/go") // the container may end before the command has told its end
	h.until("the last try", func() bool {
		return h.run("inspect", "-f", "{{.State.Status}} {{.RestartCount}}", "policy") == "exited 2"
	})
	h.want("3 2 on-failure 2", "inspect", "-f", "{{.State.ExitCode}} {{.RestartCount}} {{.HostConfig.RestartPolicy.Name}} {{.HostConfig.RestartPolicy.MaximumRetryCount}}", "policy")
	// docker restart is an end for who waits for one.
	h.untilSaid("ready", "trap")
	waiting := h.send("POST", "/containers/trap/wait", "")
	defer waiting.Body.Close()
	h.run("restart", "trap")
	var end struct{ StatusCode int }
	if err := json.NewDecoder(waiting.Body).Decode(&end); err != nil || end.StatusCode != 5 {
		t.Errorf("who waits for a container that is restarted is told of %+v, %v", end, err)
	}
	h.want("true", "inspect", "-f", "{{.State.Running}}", "trap")
	h.run("rm", "-f", "always", "hungry", "policy", "trap")
}

// Who asks for a container's log or its files in the moment of its end gets them, from its pod or from the next one that has its disk.
func TestVMAskedAtTheEnd(t *testing.T) {
	h := openBeside(t)
	h.run("run", "-d", "--name", "ends", "busybox", "sh", "-c", "echo kept >/file; sync; echo said; exec sleep 10000")
	h.untilSaid("said", "ends")
	for i := range 3 {
		killed := make(chan struct{})
		var all errgroup.Group
		for _, ask := range [][]string{{"logs", "ends"}, {"logs", "--tail", "1", "ends"}, {"cp", "ends:/file", "-"}, {"diff", "ends"}} {
			all.Go(func() error {
				for ended := false; ; {
					// An answer that has begun goes with its pod; a request is never refused.
					if _, err := h.try("", ask...); err != nil && (ended || strings.Contains(err.Error(), "Error response from daemon")) {
						return err
					}
					if ended {
						return nil
					}
					select {
					case <-killed:
						ended = true
					default:
					}
				}
			})
		}
		h.run("kill", "ends")
		close(killed)
		if err := all.Wait(); err != nil {
			t.Fatalf("round %d: %v", i, err)
		}
		h.want(strings.TrimSpace(strings.Repeat("said\n", i+1)), "logs", "ends")
		h.run("start", "ends")
		h.untilSaid(strings.TrimSpace(strings.Repeat("said\n", i+2)), "ends")
	}
	// That one may be on its way out, by this server or another one.
	h.run("kill", "ends")
	attendant := "docker-at-" + h.run("inspect", "-f", "{{.Id}}", "ends")
	for range 6 {
		h.run("cp", "ends:/file", "-")
		if _, _, err := h.c.API.Jobs().Deregister(attendant, false, &api.WriteOptions{Namespace: h.space}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(rand.N(150 * time.Millisecond))
	}
	h.run("cp", "ends:/file", "-")
}

// forgotten has Nomad forget a container that has ended.
func (h *host) forgotten(name string) {
	h.t.Helper()
	job := "docker-" + h.run("inspect", "-f", "{{.Id}}", name)
	h.until("Nomad to forget its job", func() bool {
		if err := h.c.API.System().GarbageCollect(); err != nil {
			h.t.Fatal(err)
		}
		jobs, _, err := h.c.API.Jobs().List(&api.QueryOptions{Namespace: h.space, Prefix: job})
		return err == nil && len(jobs) == 0
	})
}

// Nomad forgets a stopped container's job and allocations. The container is there all the same, with everything of it.
func TestVMForgotten(t *testing.T) {
	h := openHost(t)
	h.run("run", "-d", "--name", "kept", "-e", "A=1", "-l", "tier=back", "busybox", "sh", "-c", "echo run $A; test -e /more && exit 6; echo written >/file; exit 5")
	h.want("5", "wait", "kept")
	h.forgotten("kept")
	h.want("kept", "ps", "-a", "--filter", "label=tier=back", "--filter", "exited=5", "--format", "{{.Names}}")
	h.want("exited 5", "inspect", "-f", "{{.State.Status}} {{.State.ExitCode}}", "kept")
	h.run("rename", "kept", "renamed")
	h.want("run 1", "logs", "renamed")
	file := filepath.Join(t.TempDir(), "file")
	h.run("cp", "renamed:/file", file)
	if data, err := os.ReadFile(file); err != nil || string(data) != "written\n" {
		t.Errorf("%q, %v", data, err)
	}
	h.run("cp", file, "renamed:/more")
	h.run("start", "renamed")
	h.want("6", "wait", "renamed")
	h.want("run 1\nrun 1", "logs", "renamed")
	h.run("rm", "renamed")
	h.wantError(1, "No such container: renamed", "inspect", "--type", "container", "renamed")
	h.run("create", "--name", "renamed", "busybox", "true") // the name is free
}

// Of those who want one name at once, on two servers, one gets it.
func TestVMOneName(t *testing.T) {
	h := openBeside(t)
	other := h.second()
	const each = 5
	var work sync.WaitGroup
	errs := make([]error, 2*each)
	for i := range errs {
		server := []*host{h, other}[i%2]
		work.Go(func() { _, errs[i] = server.try("", "create", "--name", "wanted", "busybox", "true") })
	}
	work.Wait()
	won := 0
	for _, err := range errs {
		switch {
		case err == nil:
			won++
		case !strings.Contains(err.Error(), `The container name "/wanted" is already in use by container`):
			t.Error(err)
		}
	}
	if won != 1 {
		t.Errorf("%d have got the name", won)
	}
	id := h.run("ps", "-aq", "--no-trunc")
	for _, server := range []*host{h, other} {
		server.want(id, "inspect", "-f", "{{.Id}}", "wanted")
	}
}

// goroutines of the server.
func (h *host) goroutines() int {
	h.t.Helper()
	n, err := strconv.Atoi(h.run("info", "-f", "{{.NGoroutines}}"))
	if err != nil {
		h.t.Fatal(err)
	}
	return n
}

// Clients that drop their connections, or read nothing, harm nobody and leave nothing behind.
func TestVMRudeClients(t *testing.T) {
	h := openBeside(t)
	h.run("run", "-d", "--name", "chatty", "busybox", "sh", "-c", "while :; do seq 1000; sleep 0.1; done")
	h.want("ok", "exec", "chatty", "echo", "ok")
	before := h.goroutines()
	const each, idle = 15, 64 // goroutines of connections to Nomad that are kept
	var streams []*stream
	for range each {
		var exec struct{ ID string }
		h.ask("POST", "/containers/chatty/exec", `{"AttachStdin": true, "AttachStdout": true, "Cmd": ["cat"]}`, &exec)
		streams = append(streams, h.hijack("/exec/"+exec.ID+"/start", `{}`), h.hijack("/containers/chatty/attach?stream=1&stdout=1", ""))
	}
	for range each { // slow readers, and half of a request
		for _, request := range []string{
			"GET /containers/chatty/logs?stdout=1&follow=1 HTTP/1.1\r\nHost: docker\r\n\r\n", "GET /events HTTP/1.1\r\nHost: docker\r\n\r\n",
			"POST /containers/create HTTP/1.1\r\nHost: docker\r\nContent-Length: 1000\r\n\r\n{\"Image\": ",
		} {
			conn, err := net.Dial("unix", h.socket)
			if err != nil {
				t.Fatal(err)
			}
			io.WriteString(conn, request)
			streams = append(streams, &stream{Conn: conn})
		}
	}
	h.want("ok", "exec", "chatty", "echo", "ok")
	for _, s := range streams {
		s.Close()
	}
	h.until("their goroutines to end", func() bool { return h.goroutines() <= before+idle })
	h.until("their commands to end", func() bool { return !strings.Contains(h.run("top", "chatty"), "cat") })
	h.run("rm", "-f", "chatty")
}

// What Nomad lacks is told. While it is away the server says so, and goes on by itself when it is back: who waited for a container still waits.
func TestVMNomadAway(t *testing.T) {
	h := openHost(t)
	h.wantError(1, "Nomad has no CSI plugin cradle", "volume", "create", "early")
	h.run("run", "-d", "--name", "works", "busybox", "sh", "-c", "while ! test -e /end; do sleep 0.2; done; exit 3")
	waiting := h.send("POST", "/containers/works/wait", "")
	defer waiting.Body.Close()
	if err := h.c.Server().KillServer(); err != nil {
		t.Fatal(err)
	}
	const away = "Nomad('s event stream is not to be had| does not answer| can't act at the moment)"
	h.until("the loss to be told", func() bool {
		_, err := h.try("", "ps")
		return err != nil && regexp.MustCompile(away).MatchString(err.Error())
	})
	for _, args := range [][]string{{"create", "busybox"}, {"logs", "works"}} {
		h.wantError(1, away, args...)
	}
	if status := h.ask("GET", "/containers/json", "", nil); status != http.StatusServiceUnavailable {
		t.Errorf("ps while Nomad is away: %d", status)
	}
	if err := h.c.Server().StartAgents(); err != nil {
		t.Fatal(err)
	}
	h.until("Nomad to be back", func() bool {
		out, err := h.try("", "ps", "--format", "{{.Names}}")
		return err == nil && out == "works\n"
	})
	h.until("the pod to be reached", func() bool { _, err := h.try("", "exec", "works", "true"); return err == nil })
	h.try("", "exec", "works", "touch", "/end") // as before: the container may end first
	var end struct{ StatusCode int }
	if err := json.NewDecoder(waiting.Body).Decode(&end); err != nil || end.StatusCode != 3 {
		t.Errorf("wait: %+v, %v", end, err)
	}
}
