// Package netnstest makes network namespaces for servers that have to have a host's usual ports: of their own, reachable from this host, and from guests
// whose network goes through it. It needs root.
package netnstest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
)

// A Namespace is there until Close, or until its process was killed and another one makes one of the same kind.
type Namespace struct {
	Host string // its address

	name string
}

var made atomic.Int32

// New makes a namespace. Its kind is a short lower-case word.
func New(kind string) (_ *Namespace, err error) {
	if err := sweep(kind); err != nil {
		return nil, err
	}
	// Other processes do the same on this host.
	pid, n := os.Getpid(), made.Add(1)
	net4 := fmt.Sprintf("10.%d.%d.", 128+(pid>>8+int(n)*7)&127, pid&255)
	s := &Namespace{Host: net4 + "2", name: fmt.Sprintf("%s-%d-%d", kind, pid, n)}
	outside, inside := fmt.Sprintf("th%dn%d", pid, n), fmt.Sprintf("tn%dn%d", pid, n)
	if err := ip("netns add " + s.name); err != nil {
		return nil, err
	}
	for _, args := range []string{
		"link add " + outside + " type veth peer name " + inside + " netns " + s.name,
		"addr add " + net4 + "1/30 dev " + outside,
		"link set " + outside + " up",
		"-n " + s.name + " link set lo up",
		"-n " + s.name + " addr add " + s.Host + "/30 dev " + inside,
		"-n " + s.name + " link set " + inside + " up",
	} {
		if err := ip(args); err != nil {
			return nil, errors.Join(err, s.Close())
		}
	}
	return s, nil
}

// Name is what ip netns knows it by.
func (s *Namespace) Name() string { return s.name }

// Command is a command that runs in the namespace, in a mount namespace of its own.
func (s *Namespace) Command(ctx context.Context, args ...string) *exec.Cmd {
	return exec.CommandContext(ctx, "ip", append([]string{"netns", "exec", s.name}, args...)...)
}

// Close removes the namespace; its processes have to be ended before.
func (s *Namespace) Close() error {
	return ip("netns del " + s.name)
}

// sweep ends what tests that were killed have left.
func sweep(kind string) error {
	namespaces, err := filepath.Glob("/run/netns/" + kind + "-*-*")
	for _, path := range namespaces {
		name := filepath.Base(path)
		var pid, n int
		if _, err := fmt.Sscanf(name, kind+"-%d-%d", &pid, &n); err != nil || syscall.Kill(pid, 0) == nil {
			continue
		}
		// None where the test had mounts of its own, which its namespace was in, or where somebody else is sweeping.
		out, _ := exec.Command("ip", "netns", "pids", name).Output()
		for field := range strings.FieldsSeq(string(out)) {
			if pid, err := strconv.Atoi(field); err == nil {
				_ = syscall.Kill(pid, syscall.SIGKILL)
			}
		}
		_ = ip("netns del " + name) // likewise
	}
	return err
}

func ip(args string) error {
	if out, err := exec.Command("ip", strings.Fields(args)...).CombinedOutput(); err != nil {
		return fmt.Errorf("ip %s: %w: %s", args, err, out)
	}
	return nil
}
