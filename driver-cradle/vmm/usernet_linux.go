package vmm

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"github.com/cradlestack/cradlestack/driver-cradle/hostfile"
	"github.com/cradlestack/cradlestack/spec"
)

// The user network as the guest has to set it up: QEMU's defaults, without IPv6.
const (
	UserAddress = "10.0.2.15/24"
	UserGateway = "10.0.2.2"
)

// ErrPortTaken is part of the error of a start whose published port another program has.
var ErrPortTaken = errors.New("port is taken on the host")

// firstFreePort is where ports begin that anybody may listen on, unless the host says otherwise.
func firstFreePort() uint16 {
	data, err := hostfile.Read("/proc/sys/net/ipv4/ip_unprivileged_port_start", 16)
	if err == nil {
		if n, err := strconv.ParseUint(strings.TrimSpace(string(data)), 10, 16); err == nil {
			return uint16(n)
		}
	}
	return 1024
}

// completePublish fills in the defaults of published ports and refuses what QEMU can't do.
func completePublish(ports []spec.Publish) ([]spec.Publish, error) {
	done := make([]spec.Publish, len(ports))
	for i, p := range ports {
		if p.Protocol == "" {
			p.Protocol = "tcp"
		}
		if p.Protocol != "tcp" && p.Protocol != "udp" {
			return nil, fmt.Errorf("publish port %d: protocol %q is neither tcp nor udp", p.Port, p.Protocol)
		}
		if p.Port == 0 {
			return nil, errors.New("publish: port 0 of the pod")
		}
		if p.HostIP == "" {
			p.HostIP = "0.0.0.0"
		}
		ip, err := netip.ParseAddr(p.HostIP)
		if err != nil || !ip.Is4() {
			return nil, fmt.Errorf("publish port %d: host address %q is no IPv4 address, and the user network has no other", p.Port, p.HostIP)
		}
		done[i] = p
	}
	return done, nil
}

// plugUserNet connects the machine's network interface, on a hub, with a user network.
func (m *Machine) plugUserNet(ctx context.Context, ports []spec.Publish) error {
	type str struct {
		Str string `json:"str"`
	}
	forwards := []str{}
	for _, p := range ports {
		forwards = append(forwards, str{fmt.Sprintf("%s:%s:%d-:%d", p.Protocol, p.HostIP, p.HostPort, p.Port)})
	}
	err := m.QMP(ctx, "netdev_add", map[string]any{"type": "user", "id": "user", "ipv6": false, "hostfwd": forwards}, nil)
	if err == nil {
		err = m.QMP(ctx, "netdev_add", map[string]any{"type": "hubport", "id": "user-port", "hubid": 0, "netdev": "user"}, nil)
	}
	if err != nil {
		if strings.Contains(err.Error(), "host forwarding rule") {
			return fmt.Errorf("publish ports: %w: %w: choose another one", ErrPortTaken, err)
		}
		return fmt.Errorf("user network: %w", err)
	}
	if len(ports) == 0 {
		return nil
	}
	var table string
	if err := m.QMP(ctx, "human-monitor-command", map[string]any{"command-line": "info usernet"}, &table); err != nil {
		return fmt.Errorf("user network: %w", err)
	}
	chosen, err := hostPorts(table, ports)
	if err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.state.Info.Publish = chosen
	return nil
}

// hostPorts completes published ports with the host ports in QEMU's table, whose lines look so:
//
//	TCP[HOST_FORWARD]  12         0.0.0.0 42067       10.0.2.15    80     0     0
func hostPorts(table string, ports []spec.Publish) ([]spec.Publish, error) {
	type forward struct {
		protocol, ip string
		port         uint16
	}
	have := map[forward][]uint16{}
	for s := bufio.NewScanner(strings.NewReader(table)); s.Scan(); {
		f := strings.Fields(s.Text())
		if len(f) < 6 || !strings.HasSuffix(f[0], "[HOST_FORWARD]") {
			continue
		}
		host, herr := strconv.ParseUint(f[3], 10, 16)
		guest, gerr := strconv.ParseUint(f[5], 10, 16)
		if herr != nil || gerr != nil {
			continue
		}
		ip := f[2]
		if ip == "*" {
			ip = "0.0.0.0"
		}
		k := forward{strings.ToLower(strings.TrimSuffix(f[0], "[HOST_FORWARD]")), ip, uint16(guest)}
		have[k] = append(have[k], uint16(host))
	}
	chosen := make([]spec.Publish, len(ports))
	for i, p := range ports {
		if p.HostPort == 0 {
			k := forward{p.Protocol, p.HostIP, p.Port}
			if len(have[k]) == 0 {
				return nil, fmt.Errorf("publish port %d/%s: QEMU does not say which port it took", p.Port, p.Protocol)
			}
			p.HostPort, have[k] = have[k][0], have[k][1:]
		}
		chosen[i] = p
	}
	return chosen, nil
}
