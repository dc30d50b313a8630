package ganesha

import (
	"errors"
	"log/slog"
	"net/netip"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cradlestack/cradlestack/csi-plugin/filer/nfs"
)

func prefixes(texts ...string) (all []netip.Prefix) {
	for _, text := range texts {
		all = append(all, netip.MustParsePrefix(text))
	}
	return all
}

// What is written is what NFS-Ganesha reads, whatever paths are called.
func TestConfiguration(t *testing.T) {
	c := configuration{
		listen: netip.MustParseAddrPort("192.0.2.1:2049"), recovery: `/state/"; } EXPORT {`, name: "cradle-filer-00", exports: map[string]export{
			"/v.secret": {Export: nfs.Export{Path: "/v.secret", Root: `/run/a "b" \c"`, Volume: "v", ReadOnly: true, Clients: prefixes("10.1.0.0/16", "192.0.2.7/32", "2001:db8::/64", "::/0")}, id: 7},
			"/a.secret": {Export: nfs.Export{Path: "/a.secret", Root: "/a", Volume: "a", Clients: prefixes("0.0.0.0/0")}, id: 9},
		},
	}
	const want = `NFS_CORE_PARAM { Protocols = 4; Bind_Addr = 192.0.2.1; NFS_Port = 2049; Enable_UDP = false; Enable_NLM = false; Enable_RQUOTA = false; mount_path_pseudo = true; fsid_device = true; RPC_Max_Connections = 10000; }
NFSV4 { Minor_Versions = 0, 1; Lease_Lifetime = 10; Grace_Period = 40; RecoveryBackend = fs_ng; RecoveryRoot = "/state/\"; } EXPORT {"; Server_Scope = "cradle-filer-00"; Server_Owner = "cradle-filer-00"; Only_Numeric_Owners = true; Delegations = false; Max_Client_Ids = 16384; }
MDCACHE { Dir_Chunk = 0; }
EXPORT_DEFAULTS { Access_Type = None; Protocols = 4; Transports = TCP; SecType = sys; Squash = No_Root_Squash; Attr_Expiration_Time = 0; }
NFS_KRB5 { Active_krb5 = false; }
LOG { Default_Log_Level = EVENT; COMPONENTS { DBUS = FATAL; NFS_CB = FATAL; } }
EXPORT { Export_Id = 9; Path = "/a"; Pseudo = "/a.secret"; Filesystem_Id = 7299139317422481125.9034529651209399846; Disable_ACL = true; FSAL { Name = VFS; } CLIENT { Clients = 0.0.0.0/1, 128.0.0.0/1; Access_Type = RW; Protocols = 4; } }
EXPORT { Export_Id = 7; Path = "/run/a \"b\" \\c\""; Pseudo = "/v.secret"; Filesystem_Id = 2759057506101679926.2370880218248641895; Disable_ACL = true; FSAL { Name = VFS; } CLIENT { Clients = 10.1.0.0/16, 192.0.2.7, 2001:db8::/64, ::/1, 8000::/1; Access_Type = RO; Protocols = 4; } }
`
	if got := c.String(); got != want {
		t.Errorf("the configuration is\n%s\nnot\n%s", got, want)
	}
	c.version3 = true
	if got := c.String(); strings.Count(got, "Protocols = 3, 4;") != 4 {
		t.Errorf("with version 3 it is\n%s", got)
	}
}

func TestCheck(t *testing.T) {
	good := nfs.Export{Path: "/v.0123", Root: "/run/v", Volume: "v", Clients: prefixes("10.0.0.0/8", "fd00::/99", "fd00::1/128", "0.0.0.0/0")}
	if err := check(good); err != nil {
		t.Error(err)
	}
	for want, change := range map[string]func(*nfs.Export){
		"one name":            func(e *nfs.Export) { e.Path = "/v/0123" },
		"and one name":        func(e *nfs.Export) { e.Path = "/" },
		"be / and one name":   func(e *nfs.Export) { e.Path = "/v\n}" },
		"has to be /":         func(e *nfs.Export) { e.Path = "/.." },
		"no path":             func(e *nfs.Export) { e.Root = "/run/v\nEXPORT {}" },
		"no path that can be": func(e *nfs.Export) { e.Root = "v" },
		"no clients":          func(e *nfs.Export) { e.Clients = nil },
		"client fd00::/100":   func(e *nfs.Export) { e.Clients = prefixes("fd00::/100") },
		"client ::ffff:1.2.3.": func(e *nfs.Export) {
			e.Clients = []netip.Prefix{netip.PrefixFrom(netip.MustParseAddr("::ffff:1.2.3.4"), 128)}
		},
		"client invalid": func(e *nfs.Export) { e.Clients = []netip.Prefix{{}} },
	} {
		e := good
		change(&e)
		if err := check(e); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: %v; want %s", e, err, want)
		}
	}
}

func TestNumbers(t *testing.T) {
	dir := t.TempDir()
	s := &Server{Config: Config{State: dir}, ids: ids{Last: 65534, Of: map[string]uint16{"/one": 1}}}
	var got []uint16
	for _, path := range []string{"/a", "/b", "/a", "/one"} {
		id, err := s.number(path)
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, id)
	}
	if want := []uint16{65535, 2, 65535, 1}; !slices.Equal(got, want) { // 0 is the root's
		t.Errorf("the exports have the numbers %v, not %v", got, want)
	}
	first, err := s.epoch()
	if err != nil {
		t.Fatal(err)
	}
	if second, err := s.epoch(); err != nil || second <= first {
		t.Errorf("after epoch %d there is %d, %v", first, second, err)
	}
}

// A process that has no end, as the storage keeps a call of its, has nobody hold a volume; the next one does once it has ended.
func TestHoldStuck(t *testing.T) {
	cmd := exec.Command("sleep", "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Wait() }) // it is killed
	s := &Server{Config: Config{Log: slog.New(slog.DiscardHandler)}, holding: 10 * time.Millisecond, wake: make(chan struct{}, 1)}
	c := &child{cmd: cmd, done: make(chan struct{})}
	s.child = c
	if err := s.Hold("v", func() error { t.Error("it is held"); return nil }); !errors.Is(err, nfs.ErrStuck) || !strings.Contains(err.Error(), "volume v") {
		t.Errorf("held while the storage keeps a call: %v", err)
	}
	if s.held != 0 || s.alive() != c {
		t.Errorf("it counts as held (%d), or the process as ended", s.held)
	}
	close(c.done)
	held := false
	if err := s.Hold("v", func() error { held = true; return nil }); err != nil || !held || s.held != 0 {
		t.Errorf("held once it has ended: %t, %v, %d", held, err, s.held)
	}
}
