package network

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"slices"
	"strings"

	"github.com/cradlestack/cradlestack/driver-cradle/wire"
)

// Where a host keeps its resolvers. The second is systemd-resolved's list of those that its stub at 127.0.0.53 asks.
const (
	resolvConf = "/etc/resolv.conf"
	upstreams  = "/run/systemd/resolve/resolv.conf"
)

// HostDNS is the host's /etc/resolv.conf as a guest can use it: resolvers on the host's loopback are replaced by those that they ask,
// where the host knows them. Servers is empty where none is left.
func HostDNS() (wire.DNS, error) {
	d, err := hostDNS(resolvConf, upstreams)
	if err != nil {
		return d, fmt.Errorf("host's resolvers: %w", err)
	}
	return d, nil
}

func hostDNS(conf, upstreams string) (wire.DNS, error) {
	d, err := readResolvConf(conf)
	if err != nil {
		return wire.DNS{}, err
	}
	local := len(d.Servers)
	d.Servers = slices.DeleteFunc(d.Servers, isLocal)
	if local -= len(d.Servers); local > 0 && len(d.Servers) == 0 {
		up, err := readResolvConf(upstreams)
		if err != nil {
			return wire.DNS{}, err
		}
		d.Servers = slices.DeleteFunc(up.Servers, isLocal)
	}
	return d, nil
}

// isLocal says whether only the host itself gets to a server: on its loopback, or on a link of its own.
func isLocal(server string) bool {
	a, err := netip.ParseAddr(server)
	return err != nil || a.IsLoopback() || a.IsUnspecified() || a.Zone() != "" || a.IsLinkLocalUnicast()
}

func readResolvConf(path string) (wire.DNS, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return wire.DNS{}, nil
	}
	if err != nil {
		return wire.DNS{}, err
	}
	defer f.Close()
	return parseResolvConf(f)
}

// parseResolvConf reads resolv.conf(5).
func parseResolvConf(r io.Reader) (wire.DNS, error) {
	var d wire.DNS
	lines := bufio.NewScanner(io.LimitReader(r, 64<<10))
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) < 2 || strings.ContainsAny(fields[0][:1], "#;") {
			continue
		}
		for i, f := range fields {
			if strings.ContainsAny(f[:1], "#;") {
				fields = fields[:i]
				break
			}
		}
		switch fields[0] {
		case "nameserver":
			if len(fields) > 1 {
				d.Servers = append(d.Servers, fields[1])
			}
		case "search", "domain":
			d.Search = slices.DeleteFunc(slices.Clone(fields[1:]), func(s string) bool { return s == "." })
		case "options":
			d.Options = append(d.Options, fields[1:]...)
		}
	}
	return d, lines.Err()
}
