// Package ganesha serves directories by NFS-Ganesha, a process of its own, over NFS 4.1 and, where this host has a portmapper, version 3: with locks that
// clients see of each other, and that outlast it. It is an nfs.Engine. It knows exports, not volumes.
//
// The process reads a configuration that is written anew for each change, and takes it over when it is told to; it has no bus. It dies with the one that
// has started it, and is started again when it dies alone.
package ganesha

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"github.com/cradlestack/cradlestack/csi-plugin/filer/nfs"
)

// Version is the option that clients mount with.
const Version = "vers=4.1"

// Times in seconds. A client that nobody hears of for leaseTime loses its locks to who asks for them. After a start the server gives out locks and opens
// files only to who had them before, until all of those have come back, but not for longer than graceTime: by then Linux has tried to connect again, whose patience
// doubles from 3 s to 24 s.
const (
	leaseTime = 10
	graceTime = 40
)

// An export with the number that file handles have of it.
type export struct {
	nfs.Export
	id     uint16
	handle []byte // the kernel's, of its root: NFS-Ganesha's ends with it
}

// A configuration is what NFS-Ganesha is told (ganesha-config(8)).
type configuration struct {
	listen   netip.AddrPort
	version3 bool
	recovery string // directory of what it has to know of clients after a restart
	name     string // of the server, the same on each host that may serve: else clients would not claim their locks
	shared   bool   // file systems are other hosts' as well, which have other numbers for the devices
	exports  map[string]export
}

func (c configuration) String() string {
	protocols := "4"
	if c.version3 {
		protocols = "3, 4"
	}
	var b strings.Builder
	fmt.Fprintf(&b, "NFS_CORE_PARAM { Protocols = %s; Bind_Addr = %s; NFS_Port = %d; Enable_UDP = false; Enable_NLM = false; Enable_RQUOTA = false; mount_path_pseudo = true; fsid_device = %t; RPC_Max_Connections = 10000; }\n",
		protocols, c.listen.Addr(), c.listen.Port(), !c.shared)
	// All minor versions keep what they know in memory; that of 2 has not been tested.
	fmt.Fprintf(&b, "NFSV4 { Minor_Versions = 0, 1; Lease_Lifetime = %d; Grace_Period = %d; RecoveryBackend = fs_ng; RecoveryRoot = %s; Server_Scope = %s; Server_Owner = %s; Only_Numeric_Owners = true; Delegations = false; Max_Client_Ids = 16384; }\n",
		leaseTime, graceTime, quote(c.recovery), quote(c.name), quote(c.name))
	// The files are changed by other protocols, too: nothing is taken from a cache without a look at the file.
	fmt.Fprintf(&b, "MDCACHE { Dir_Chunk = 0; }\nEXPORT_DEFAULTS { Access_Type = None; Protocols = %s; Transports = TCP; SecType = sys; Squash = No_Root_Squash; Attr_Expiration_Time = 0; }\n", protocols)
	b.WriteString("NFS_KRB5 { Active_krb5 = false; }\nLOG { Default_Log_Level = EVENT; COMPONENTS { DBUS = FATAL; NFS_CB = FATAL; } }\n")
	for _, path := range slices.Sorted(maps.Keys(c.exports)) {
		e := c.exports[path]
		access := "RW"
		if e.ReadOnly {
			access = "RO"
		}
		var clients []string
		for _, p := range e.Clients {
			clients = append(clients, networks(p)...)
		}
		// The file system's id is the volume's, whatever the host calls the file system.
		sum := sha256.Sum256([]byte(e.Volume))
		fmt.Fprintf(&b, "EXPORT { Export_Id = %d; Path = %s; Pseudo = %s; Filesystem_Id = %d.%d; Disable_ACL = true; FSAL { Name = VFS; } ",
			e.id, quote(e.Root), quote(e.Path), binary.BigEndian.Uint64(sum[:])>>1, binary.BigEndian.Uint64(sum[8:])>>1)
		if len(clients) > 0 { // else nobody may use it
			fmt.Fprintf(&b, "CLIENT { Clients = %s; Access_Type = %s; Protocols = %s; } ", strings.Join(clients, ", "), access, protocols)
		}
		b.WriteString("}\n")
	}
	return b.String()
}

// quote writes a string as the configuration has it: whatever is in it, it ends nowhere else.
func quote(s string) string {
	return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(s) + `"`
}

// maxBits is the longest prefix of an IPv6 network that can be written: the configuration takes two digits.
const maxBits = 99

// networks are those that a prefix is written as. Each has at least one bit: of none, it would be no network there.
func networks(p netip.Prefix) []string {
	p = p.Masked()
	switch {
	case p.IsSingleIP():
		return []string{p.Addr().String()}
	case p.Bits() > 0:
		return []string{p.String()}
	case p.Addr().Is4():
		return []string{"0.0.0.0/1", "128.0.0.0/1"}
	}
	return []string{"::/1", "8000::/1"}
}

// check refuses what the configuration could not say.
func check(e nfs.Export) error {
	if !strings.HasPrefix(e.Path, "/") || strings.Count(e.Path, "/") > 1 || len(e.Path) > nfs.MaxPath || hasControl(e.Path) || strings.HasPrefix(e.Path, "/.") || e.Path == "/" {
		return fmt.Errorf("export %.80q: it has to be / and one name", e.Path)
	}
	if !strings.HasPrefix(e.Root, "/") || hasControl(e.Root) {
		return fmt.Errorf("export of volume %s: %q is no path that can be told NFS-Ganesha", e.Volume, e.Root)
	}
	if len(e.Clients) == 0 {
		return fmt.Errorf("export of volume %s: it is for no clients", e.Volume)
	}
	for _, p := range e.Clients {
		if !p.IsValid() || p.Addr().Is4In6() || p.Addr().Zone() != "" || p.Addr().Is6() && p.Bits() > maxBits && !p.IsSingleIP() {
			return fmt.Errorf("client %s: NFS-Ganesha takes IPv4 networks, IPv6 networks of at most %d bits, and addresses", p, maxBits)
		}
	}
	return nil
}

func hasControl(s string) bool {
	return strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r == 0x7f })
}
