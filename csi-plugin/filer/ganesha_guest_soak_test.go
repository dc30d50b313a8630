//go:build vm && soak

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cradlestack/cradlestack/internal/filertest"
	"github.com/cradlestack/cradlestack/test/programs"
)

// stamped is a pod's output, with the longest time that nothing came.
type stamped struct {
	mu   sync.Mutex
	text strings.Builder
	last time.Time
	most time.Duration
}

func (s *stamped) Write(b []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.last.IsZero() {
		s.most = max(s.most, time.Since(s.last))
	}
	s.last = time.Now()
	return s.text.Write(b)
}

// longest returns the longest pause since it was last asked for.
func (s *stamped) longest() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	most := s.most
	s.most = 0
	return most
}

func (s *stamped) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.text.String()
}

// pod starts one on the clients' host.
func (p *pair) pod(t *testing.T, name, script string, flags ...string) *stamped {
	t.Helper()
	kcradle, err := programs.Path("kcradle")
	if err != nil {
		t.Fatal(err)
	}
	image, err := programs.Image("debian") // which has flock
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(t.TempDir(), name)
	args := append([]string{"summon", dir, "oci:" + image, "-m", "128m"}, flags...)
	if out, err := exec.Command(kcradle, append(args, "--", "sh", "-c", script)...).CombinedOutput(); err != nil {
		t.Fatalf("kcradle summon: %v\n%s", err, out)
	}
	var out stamped
	cmd := exec.Command("nsenter", "--net=/run/netns/"+p.ns("cl"), kcradle, "run", dir)
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = exec.Command(kcradle, "rm", "-f", dir).Run()
		_ = cmd.Wait() // it was killed
	})
	return &out
}

// TestVMSoakGaneshaFailover: a pod's kernel writes line after line to a file that it has open, each on stable storage before the next, and has a lock that another pod
// wants, a third one makes and opens files, while two filers with NFS-Ganesha take over from each other. No call ends with an error, no line that was acknowledged is lost,
// and the lock is never the other pod's.
func TestVMSoakGaneshaFailover(t *testing.T) {
	p := newPair(t, 5*time.Second, "--engine", byGanesha)
	active, _ := p.active()
	out, err := active.command("publish", "vol", "--client", "10.77.0.0/24", "-o", "json")
	var published filertest.Publication
	if err == nil {
		err = json.Unmarshal([]byte(out), &published)
	}
	if err != nil {
		t.Fatal(err)
	}
	published.Options += ",sync"
	mount := published.Mount("/v")
	writer := p.pod(t, "writer", `cd /v; exec 9>lock 8>log; flock 9 || { echo failed; exit 1; }; i=0
	while :; do i=$((i+1)); echo line $i >&8 || { echo failed; exit 1; }; echo ack $i; sleep 0.02; done`, "--mount", mount)
	acked := func() int { return strings.Count(writer.String(), "ack ") }
	p.eventually("the pod writes", func() error {
		if acked() < 10 {
			return errors.New(writer.String())
		}
		return nil
	})
	rival := p.pod(t, "rival", `cd /v; exec 9>lock; while :; do if flock -n 9; then echo stolen; flock -u 9; else echo taken; fi; sleep 0.05; done`, "--mount", mount)
	tried := func() int { return strings.Count(rival.String(), "taken") }
	opener := p.pod(t, "opener", `cd /v; i=0; while :; do i=$((i+1)); echo $i >other$((i % 50)) || { echo failed; exit 1; }; echo opened $i; sleep 0.05; done`, "--mount", mount)
	opened := func() int { return strings.Count(opener.String(), "opened ") }
	progress := func() {
		t.Helper()
		acks, tries, opens := acked(), tried(), opened()
		p.eventually("the pods go on", func() error {
			if w := writer.String(); strings.Contains(w+opener.String(), "failed") || strings.Contains(rival.String(), "stolen") {
				t.Fatalf("a pod sees an error, or loses its lock: %s\n%s\n%s", w[max(0, len(w)-1000):], rival, opener)
			}
			if acked() < acks+20 || tried() < tries+2 || opened() < opens+5 {
				return fmt.Errorf("after %d lines there are %d, after %d tries %d, after %d openings %d", acks, acked(), tries, tried(), opens, opened())
			}
			return nil
		})
	}
	for range 2 {
		for _, d := range drills {
			active, other := p.active()
			progress()
			writer.longest()
			opener.longest()
			d.do(p, active, other)
			progress()
			p.eventually("a filer is active, and the other stands by", p.settled)
			t.Logf("%s: the longest pause %.2fs, of opening %.2fs", d.name, writer.longest().Seconds(), opener.longest().Seconds())
			acks := acked()
			text, err := os.ReadFile(filepath.Join(p.pool, "vol", "data", "log"))
			lines := strings.Split(string(text), "\n")
			for i := range acks {
				if err != nil || i >= len(lines) || lines[i] != fmt.Sprint("line ", i+1) {
					t.Fatalf("line %d of %d that were acknowledged is not there: %v", i+1, acks, err)
				}
			}
		}
	}
}
