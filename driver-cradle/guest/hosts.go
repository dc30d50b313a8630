package guest

import (
	"strings"

	"github.com/cradlestack/cradlestack/spec"
)

// docker's default /etc/hosts, moby libnetwork/etchosts.
const defaultHosts = "127.0.0.1\tlocalhost\n" +
	"::1\tlocalhost ip6-localhost ip6-loopback\n" +
	"fe00::0\tip6-localnet\n" +
	"ff00::0\tip6-mcastprefix\n" +
	"ff02::1\tip6-allnodes\n" +
	"ff02::2\tip6-allrouters\n"

// hostsFile is the content of a container's /etc/hosts.
func hostsFile(hostname, domainname string, addresses []string, extra []spec.HostEntry) string {
	var b strings.Builder
	b.WriteString(defaultHosts)
	for _, e := range extra {
		b.WriteString(e.Address + "\t" + e.Name + "\n")
	}
	names := hostname
	if domainname != "" {
		names = hostname + "." + domainname + " " + hostname
	}
	for _, a := range addresses {
		b.WriteString(a + "\t" + names + "\n")
	}
	return b.String()
}
