package spec

import (
	"net/netip"
	"slices"
	"strings"
	"testing"
)

func TestNFSMounts(t *testing.T) {
	for _, x := range []struct {
		volume NFSVolume
		ip     string
		want   []string
	}{
		{
			NFSVolume{Address: "filer", Export: "/data", Options: "hard,vers=4.1"},
			"192.0.2.1",
			[]string{"nfs4 filer:/data hard,vers=4.1,addr=192.0.2.1,clientaddr=0.0.0.0"},
		},
		{
			NFSVolume{Address: "filer:12049", Export: "/data", Options: "nfsvers=3,soft"},
			"192.0.2.1",
			[]string{
				"nfs filer:/data soft,port=12049,vers=3,addr=192.0.2.1,nolock,proto=tcp,mountproto=tcp,mountport=12049",
				"nfs filer:/data soft,port=12049,vers=3,addr=192.0.2.1,nolock,proto=tcp,mountproto=tcp",
			},
		},
		{
			NFSVolume{Address: "filer", Export: "/data", Options: "vers=3,lock,proto=udp,mountport=20048,port=2050"},
			"::ffff:192.0.2.1",
			[]string{"nfs filer:/data lock,proto=udp,mountport=20048,port=2050,vers=3,addr=192.0.2.1,mountproto=tcp"},
		},
		{ // "NFS: Server address does not match proto= option" is what the kernel says to tcp with such an address
			NFSVolume{Address: "2001:db8::1", Export: "/"},
			"2001:db8::1",
			[]string{
				"nfs4 [2001:db8::1]:/ vers=4.2,addr=2001:db8::1,clientaddr=::", "nfs4 [2001:db8::1]:/ vers=4.1,addr=2001:db8::1,clientaddr=::",
				"nfs4 [2001:db8::1]:/ vers=4.0,addr=2001:db8::1,clientaddr=::", "nfs [2001:db8::1]:/ vers=3,addr=2001:db8::1,nolock,proto=tcp6,mountproto=tcp6",
			},
		},
		{
			NFSVolume{Address: "[2001:db8::1]:2050", Export: "/a b,c:d", Options: "vers=3"},
			"2001:db8::1",
			[]string{
				"nfs [2001:db8::1]:/a b,c:d port=2050,vers=3,addr=2001:db8::1,nolock,proto=tcp6,mountproto=tcp6,mountport=2050",
				"nfs [2001:db8::1]:/a b,c:d port=2050,vers=3,addr=2001:db8::1,nolock,proto=tcp6,mountproto=tcp6",
			},
		},
		{NFSVolume{Address: "h", Export: "/", Options: "addr=127.0.0.1"}, "192.0.2.1", []string{"nfs option addr is set by who mounts"}},
		{NFSVolume{Address: "h:1,suid", Export: "/"}, "192.0.2.1", []string{`nfs server "h:1,suid": "1,suid" is no port`}},
		{NFSVolume{Address: "h:0", Export: "/"}, "192.0.2.1", []string{`nfs server "h:0": "0" is no port`}},
	} {
		var options, got []string
		if x.volume.Options != "" {
			options = strings.Split(x.volume.Options, ",")
		}
		mounts, err := x.volume.Mounts(netip.MustParseAddr(x.ip), options)
		if err != nil {
			got = []string{err.Error()}
		}
		for _, m := range mounts {
			got = append(got, m.Type+" "+m.Source+" "+strings.Join(m.Data, ","))
		}
		if !slices.Equal(got, x.want) {
			t.Errorf("%+v:\n got %q\nwant %q", x.volume, got, x.want)
		}
	}
}
