//go:build vm

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
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A namespace is a pod's as a container runtime prepares it: eth0 on a bridge of the host. Each has a subnet of its own, as tests of other processes run
// on the same host.
type namespace struct {
	name, path, bridge string
	host4, host6       string // addresses of the bridge
	pod4, pod6         string // addresses of eth0
}

func newNamespace(t testing.TB) *namespace {
	t.Helper()
	pid := os.Getpid()
	net4, net6 := fmt.Sprintf("10.%d.%d.", 64+pid>>8&63, pid&255), fmt.Sprintf("fd89:%x:%x::", pid>>16, pid&0xffff)
	n := &namespace{
		name: fmt.Sprintf("kcradle-%d", pid), path: fmt.Sprintf("/run/netns/kcradle-%d", pid), bridge: fmt.Sprintf("kc%d", pid),
		host4: net4 + "1", host6: net6 + "1", pod4: net4 + "7", pod6: net6 + "7",
	}
	ip := func(args string) { t.Helper(); sh(t, "ip", strings.Fields(args)...) }
	ip("netns add " + n.name)
	t.Cleanup(func() { ip("netns del " + n.name) })
	ip("link add " + n.bridge + " type bridge")
	t.Cleanup(func() { ip("link del " + n.bridge) })
	ip("addr add " + n.host4 + "/24 dev " + n.bridge)
	ip("addr add " + n.host6 + "/64 dev " + n.bridge + " nodad")
	ip("link set " + n.bridge + " up")
	ip("link add v" + n.bridge + " mtu 1400 type veth peer name eth0 mtu 1400 netns " + n.name)
	ip("link set v" + n.bridge + " master " + n.bridge + " up")
	ip("-n " + n.name + " link set lo up")
	ip("-n " + n.name + " link set eth0 up")
	ip("-n " + n.name + " addr add " + n.pod4 + "/24 dev eth0")
	ip("-n " + n.name + " addr add " + n.pod6 + "/64 dev eth0 nodad")
	ip("-n " + n.name + " route add default via " + n.host4)
	return n
}

func (n *namespace) links(t testing.TB) string { t.Helper(); return sh(t, "ip", "-n", n.name, "link") }

// settings are what a pod may have changed in the namespace.
func (n *namespace) settings(t testing.TB) string {
	t.Helper()
	s := sh(t, "ip", "netns", "exec", n.name, "sysctl", "net.ipv4.ip_local_port_range", "net.ipv4.conf.lo.accept_local", "net.ipv4.conf.lo.route_localnet")
	s += sh(t, "tc", "-n", n.name, "qdisc", "show")
	for _, side := range []string{"ingress", "egress"} {
		for _, link := range []string{"eth0", "lo"} {
			out, _ := exec.Command("tc", "-n", n.name, "filter", "show", "dev", link, side).Output() // there may be nothing to hold filters
			s += string(out)
		}
	}
	return s
}

// in calls f on a thread that is in the namespace.
func (n *namespace) in(f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		ns, err := os.Open(n.path)
		if err == nil {
			err = unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET)
			ns.Close()
		}
		if err == nil {
			err = f()
		}
		done <- err
	}()
	return <-done
}

func (n *namespace) listen(t testing.TB, address string) (l net.Listener) {
	t.Helper()
	if err := n.in(func() (err error) { l, err = net.Listen("tcp", address); return err }); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// greet answers every connection with its two addresses, and then with what comes in.
func greet(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		fmt.Fprintf(c, "%v to %v\n", c.RemoteAddr().(*net.TCPAddr).IP, c.LocalAddr().(*net.TCPAddr).IP)
		c.(*net.TCPConn).CloseWrite()
		io.Copy(io.Discard, c)
		c.Close()
	}
}

// ask connects to address, from the namespace or where n is nil from the host, and returns what the server says. For datagrams it sends "hello", again
// where no answer comes.
func (n *namespace) ask(t testing.TB, network, address string) (answer string, err error) {
	t.Helper()
	ask := func() error {
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		c, err := new(net.Dialer).DialContext(ctx, network, address)
		if err != nil {
			return err
		}
		defer c.Close()
		for network == "udp" {
			if _, err := io.WriteString(c, "hello\n"); err != nil {
				return err
			}
			c.SetReadDeadline(time.Now().Add(5 * time.Second))
			buf := make([]byte, 100)
			n, err := c.Read(buf)
			answer = string(buf[:n])
			if !errors.Is(err, os.ErrDeadlineExceeded) || ctx.Err() != nil {
				return err
			}
		}
		c.SetDeadline(time.Now().Add(patience))
		data, err := io.ReadAll(c)
		answer = string(data)
		return err
	}
	if n == nil {
		return answer, ask()
	}
	err = n.in(ask)
	return answer, err
}

// services is what TestVMNetns runs in the pod: each connection to TCP port 80 is told its addresses, 81 likewise at the loopback address alone, 84 sends
// much, and datagrams to 53 come back.
const services = `
	use IO::Socket::IP; use Socket qw(SOL_SOCKET SO_REUSEADDR);
	$SIG{CHLD} = "IGNORE";
	sub serve {
		my $l = IO::Socket::IP->new(Listen => 5, ReuseAddr => 1, @_) or die "listen: $@";
		return if fork;
		while (my $c = $l->accept) {
			print $c $c->sockport == 84 ? "0123456789abcdef" x (1 << 17) : $c->peerhost . " to " . $c->sockhost . "\n";
			close $c;
		}
	}
	serve(LocalHost => "::", LocalPort => 80, V6Only => 0);
	serve(LocalHost => "127.0.0.1", LocalPort => 81);
	serve(LocalHost => "0.0.0.0", LocalPort => 84);
	my $s = IO::Socket::IP->new(Proto => "udp", LocalHost => "::", LocalPort => 53, V6Only => 0) or die "udp: $@";
	print "ready\n"; STDOUT->flush;
	while (1) { $s->recv(my $m, 1000); $s->send($m) }
`

// Seen from outside the namespace looks as if the container were in it, and seen from inside as well.
func TestVMNetns(t *testing.T) {
	w := theWorld(t)
	n := newNamespace(t)
	settings := n.settings(t)
	upstream := n.listen(t, "127.0.0.1:9191")
	go greet(upstream)
	secret := n.listen(t, "127.0.0.1:9192")
	go greet(secret)
	dir := filepath.Join(t.TempDir(), "pod")
	t.Cleanup(func() { w.run(t, "rm", "-f", dir) })
	w.must(t, "summon", dir, "oci:"+w.images+"/debian", "--netns", n.path, "--upstream", "9191", "--upstream", "9193", "--", "perl", "-e", services)
	w.must(t, "run", "-d", dir)
	within(t, "the container is ready", func() bool { return strings.Contains(w.must(t, "logs", dir), "ready\n") })

	out := w.must(t, "exec", dir, "sh", "-c", "cat /sys/class/net/eth0/address /sys/class/net/eth0/mtu /proc/net/route; cat /proc/sys/net/ipv4/ip_local_port_range")
	mac := strings.TrimSpace(sh(t, "ip", "netns", "exec", n.name, "cat", "/sys/class/net/eth0/address"))
	for _, want := range []string{mac + "\n", "\n1400\n", "\n46884\t60999\n"} {
		if !strings.Contains("\n"+out, want) {
			t.Errorf("the guest has no %q:\n%s", want, out)
		}
	}
	own := n.listen(t, ":9000")
	go greet(own)
	var host net.Listener
	host, err := net.Listen("tcp", ":0")
	if err != nil {
		t.Fatal(err)
	}
	defer host.Close()
	go greet(host)
	port := host.Addr().(*net.TCPAddr).Port
	outside := (*namespace)(nil)
	talk := func(when string) {
		for _, c := range []struct {
			from          *namespace
			network       string
			host          string
			port          int
			want, refused string
		}{
			{outside, "tcp", n.pod4, 80, "::ffff:" + n.host4 + " to ::ffff:" + n.pod4, ""},
			{outside, "tcp", n.pod6, 80, n.host6 + " to " + n.pod6, ""},
			{outside, "tcp", n.pod4, 81, "", "connection refused"},
			{outside, "udp", n.pod4, 53, "hello", ""},
			{outside, "udp", n.pod6, 53, "hello", ""},
			{n, "tcp", "127.0.0.1", 80, "::ffff:127.0.0.1 to ::ffff:127.0.0.1", ""},
			{n, "tcp", n.pod4, 80, "::ffff:" + n.pod4 + " to ::ffff:" + n.pod4, ""},
			{n, "tcp", "::1", 80, "::1 to " + n.pod6, ""},
			{n, "tcp", n.pod6, 80, n.pod6 + " to " + n.pod6, ""},
			{n, "tcp", "127.0.0.1", 81, "127.0.0.1 to 127.0.0.1", ""},
			{n, "tcp", n.pod4, 81, "", "connection refused"},
			{n, "tcp", "127.0.0.1", 82, "", "connection refused"},
			{n, "udp", "127.0.0.1", 53, "hello", ""},
			{n, "udp", n.pod4, 53, "hello", ""},
			{n, "udp", "::1", 53, "hello", ""},
			{n, "udp", n.pod6, 53, "hello", ""},
			// What the namespace's own processes do.
			{n, "tcp", n.host4, port, n.pod4 + " to " + n.host4, ""},
			{n, "tcp", n.host6, port, n.pod6 + " to " + n.host6, ""},
			{n, "tcp", "127.0.0.1", 9191, "127.0.0.1 to 127.0.0.1", ""},
			{outside, "tcp", n.pod4, 9000, n.host4 + " to " + n.pod4, ""},
			{outside, "tcp", n.pod6, 9000, n.host6 + " to " + n.pod6, ""},
		} {
			address := net.JoinHostPort(c.host, strconv.Itoa(c.port))
			got, err := c.from.ask(t, c.network, address)
			got = strings.TrimSpace(got)
			if c.refused != "" {
				if !errors.Is(err, unix.ECONNREFUSED) {
					t.Errorf("%s: from inside %v: %s %s: %q, %v", when, c.from != nil, c.network, address, got, err)
				}
			} else if err != nil || got != c.want {
				t.Errorf("%s: from inside %v: %s %s: %q, %v; want %q", when, c.from != nil, c.network, address, got, err, c.want)
			}
		}
	}
	// What the container does: to upstreams, through sockets of both families, and out.
	calls := [][3]string{
		{"127.0.0.1", "9191", "127.0.0.1 to 127.0.0.1 by 127.0.0.1"},
		{"::ffff:127.0.0.1", "9191", "127.0.0.1 to 127.0.0.1 by ::ffff:127.0.0.1"},
		{"127.0.0.1", "9192", "Connection refused"},
		{"169.254.255.2", "9192", "timed out"},
		{n.host4, strconv.Itoa(port), n.pod4 + " to " + n.host4 + " by " + n.host4},
		{n.host6, strconv.Itoa(port), n.pod6 + " to " + n.host6 + " by " + n.host6},
	}
	call := func(when string) {
		args := []string{"exec", dir, "perl", "-MIO::Socket::IP", "-e", `
			while (my ($host, $port) = splice @ARGV, 0, 2) {
				my $s = IO::Socket::IP->new(PeerHost => $host, PeerPort => $port, Timeout => $host =~ /^169/ ? 2 : 60) or do { print $@ =~ s/\s+/ /gr, "\n"; next };
				my $line = <$s>; chomp $line; print "$line by ", $s->peerhost, "\n";
			}`}
		for _, c := range calls {
			args = append(args, c[0], c[1])
		}
		out := strings.Split(w.must(t, args...), "\n")
		if len(out) != len(calls)+1 {
			t.Fatalf("%s: the container says %q", when, out)
		}
		for i, c := range calls {
			if !strings.Contains(out[i], c[2]) {
				t.Errorf("%s: the container at %s, port %s: %q, want %q", when, c[0], c[1], out[i], c[2])
			}
		}
	}
	talk("at first")
	call("at first")
	// Large, each way.
	large := bytes.Repeat([]byte("0123456789abcdef"), 1<<17)
	send := func(l net.Listener) {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			c.Write(large)
			c.Close()
		}
	}
	sender, err := net.Listen("tcp", n.host4+":0")
	if err != nil {
		t.Fatal(err)
	}
	defer sender.Close()
	go send(sender)
	go send(n.listen(t, "127.0.0.1:9193"))
	for _, address := range []string{sender.Addr().String(), "127.0.0.1:9193"} {
		host, port, _ := net.SplitHostPort(address)
		if out := w.must(t, "exec", dir, "perl", "-MIO::Socket::IP", "-e", `
			my $s = IO::Socket::IP->new(PeerHost => $ARGV[0], PeerPort => $ARGV[1]) or die $@; local $/; print length(<$s>)`, host, port); out != strconv.Itoa(len(large)) {
			t.Errorf("of %d bytes from %s the container got %s", len(large), address, out)
		}
	}
	for from, address := range map[*namespace]string{outside: n.pod4 + ":84", n: "127.0.0.1:84"} {
		if got, err := from.ask(t, "tcp", address); err != nil || got != string(large) {
			t.Errorf("of %d bytes from %s came %d, %v", len(large), address, len(got), err)
		}
	}
	for _, ping := range [][]string{{n.pod4}, {n.pod6}, {"-M", "do", "-s", "1372", n.pod4}} {
		sh(t, "ping", append([]string{"-n", "-c", "1", "-W", "10"}, ping...)...)
	}
	for _, address := range []string{n.host4, n.host6} {
		sh(t, "ip", "netns", "exec", n.name, "ping", "-n", "-c", "1", "-W", "10", address)
	}

	other := w.summon(t, "--netns", n.path, "--", "true")
	if _, stderr, code := w.run(t, "run", other); code != 125 || !strings.Contains(stderr, "network namespace is in use by another pod") || !strings.Contains(stderr, "container {}") {
		t.Errorf("a second pod in the namespace: exit code %d, %s", code, stderr)
	}
	// None of that depends on the process that attends to the pod.
	killAndWait(t, w.status(t, dir).Attendant)
	talk("without an attendant")
	if s := w.status(t, dir); s.Attendant == 0 {
		t.Errorf("status %+v", s)
	}
	talk("taken up")
	call("taken up")
	w.must(t, "stop", "-t", "0", dir)
	if links := n.links(t); strings.Contains(links, "cradle0") {
		t.Errorf("a tap is left: %s", links)
	}
	if after := n.settings(t); after != settings {
		t.Errorf("the namespace was\n%s, and is\n%s", settings, after)
	}
}
