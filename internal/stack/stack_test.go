package stack

import (
	"context"
	"strings"
	"testing"
)

const filterTable = `*filter
:INPUT ACCEPT [0:0]
:FORWARD ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:CNI-FORWARD - [0:0]
:NOMAD-ADMIN - [0:0]
-A INPUT -i eth1 -j DROP
-A FORWARD -m comment --comment "CNI firewall plugin rules" -j CNI-FORWARD
-A CNI-FORWARD -m comment --comment "CNI firewall plugin admin overrides" -j NOMAD-ADMIN
-A NOMAD-ADMIN -d 172.27.0.0/20 -o cradle0 -j ACCEPT
COMMIT
`

const natTable = `*nat
:PREROUTING ACCEPT [0:0]
:POSTROUTING ACCEPT [0:0]
:CNI-HOSTPORT-DNAT - [0:0]
:CNI-HOSTPORT-MASQ - [0:0]
:CNI-HOSTPORT-SETMARK - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j CNI-HOSTPORT-DNAT
-A OUTPUT -m addrtype --dst-type LOCAL -j CNI-HOSTPORT-DNAT
-A POSTROUTING -m comment --comment "CNI portfwd requiring masquerade" -j CNI-HOSTPORT-MASQ
-A POSTROUTING -s 10.0.0.0/8 -j MASQUERADE
-A CNI-HOSTPORT-MASQ -m mark --mark 0x2000/0x2000 -j MASQUERADE
-A CNI-HOSTPORT-SETMARK -m comment --comment "CNI portfwd masquerade mark" -j MARK --set-xmark 0x2000/0x2000
COMMIT
`

func TestUnneeded(t *testing.T) {
	for _, test := range []struct{ name, table, rules, want string }{
		{"the last bridge", "filter", filterTable, `*filter
-D NOMAD-ADMIN -d 172.27.0.0/20 -o cradle0 -j ACCEPT
-D FORWARD -m comment --comment "CNI firewall plugin rules" -j CNI-FORWARD
-D CNI-FORWARD -m comment --comment "CNI firewall plugin admin overrides" -j NOMAD-ADMIN
-X CNI-FORWARD
-X NOMAD-ADMIN
COMMIT
`},
		{"another bridge stays", "filter", strings.Replace(filterTable, "-A NOMAD-ADMIN", "-A NOMAD-ADMIN -d 172.26.64.0/20 -o nomad -j ACCEPT\n-A NOMAD-ADMIN", 1), `*filter
-D NOMAD-ADMIN -d 172.27.0.0/20 -o cradle0 -j ACCEPT
COMMIT
`},
		{"another's pod stays", "filter", strings.Replace(filterTable, "COMMIT", "-A CNI-FORWARD -s 172.26.64.2/32 -j ACCEPT\nCOMMIT", 1), `*filter
-D NOMAD-ADMIN -d 172.27.0.0/20 -o cradle0 -j ACCEPT
COMMIT
`},
		{"ports", "nat", natTable, `*nat
-D PREROUTING -m addrtype --dst-type LOCAL -j CNI-HOSTPORT-DNAT
-D OUTPUT -m addrtype --dst-type LOCAL -j CNI-HOSTPORT-DNAT
-D POSTROUTING -m comment --comment "CNI portfwd requiring masquerade" -j CNI-HOSTPORT-MASQ
-D CNI-HOSTPORT-MASQ -m mark --mark 0x2000/0x2000 -j MASQUERADE
-D CNI-HOSTPORT-SETMARK -m comment --comment "CNI portfwd masquerade mark" -j MARK --set-xmark 0x2000/0x2000
-X CNI-HOSTPORT-DNAT
-X CNI-HOSTPORT-MASQ
-X CNI-HOSTPORT-SETMARK
COMMIT
`},
		{"another's ports stay", "nat", strings.Replace(natTable, ":CNI-HOSTPORT-DNAT", ":CNI-DN-ef76884b58bf2ed9057db - [0:0]\n:CNI-HOSTPORT-DNAT", 1), ""},
		{"nothing", "nat", "*nat\n:PREROUTING ACCEPT [0:0]\nCOMMIT\n", ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			if got := unneeded(test.table, test.rules, "cradle0"); got != test.want {
				t.Errorf("got\n%s\nwant\n%s", got, test.want)
			}
		})
	}
}

// Of two stacks one comes up at a time.
func TestLockHost(t *testing.T) {
	done, err := lockHost(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	impatient, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := lockHost(impatient); err == nil || !strings.Contains(err.Error(), "another stack") {
		t.Errorf("a second one: %v", err)
	}
	done()
	if done, err = lockHost(t.Context()); err != nil {
		t.Fatal(err)
	}
	done()
}
