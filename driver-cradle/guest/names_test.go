package guest

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"golang.org/x/net/dns/dnsmessage"
)

const someNames = `172.26.64.3 db.shop db database
172.26.64.4 cache1.shop cache1 cache # a comment
172.26.64.5 cache2.shop cache2 cache
fd00:26::5 cache2.shop cache2 cache
nonsense here
172.26.64.9
`

// query asks for the records of a name and a type.
func query(t testing.TB, name string, kind dnsmessage.Type) []byte {
	t.Helper()
	q, err := (&dnsmessage.Message{
		Header:    dnsmessage.Header{ID: 77, RecursionDesired: true},
		Questions: []dnsmessage.Question{{Name: dnsmessage.MustNewName(name), Type: kind, Class: dnsmessage.ClassINET}},
	}).Pack()
	if err != nil {
		t.Fatal(err)
	}
	return q
}

func TestNames(t *testing.T) {
	table := parseNames([]byte(someNames))
	for _, x := range []struct {
		name string
		kind dnsmessage.Type
		want string // no answer: DNS is asked
	}{
		{"db.", dnsmessage.TypeA, "[172.26.64.3]"},
		{"DataBase.", dnsmessage.TypeA, "[172.26.64.3]"},
		{"db.shop.", dnsmessage.TypeA, "[172.26.64.3]"},
		{"cache.", dnsmessage.TypeA, "[172.26.64.4 172.26.64.5]"},
		{"cache.", dnsmessage.TypeAAAA, "[fd00:26::5]"},
		{"db.", dnsmessage.TypeAAAA, "[]"},
		{"db.", dnsmessage.TypeMX, "[]"},
		{"3.64.26.172.in-addr.arpa.", dnsmessage.TypePTR, "[db.shop.]"},
		{"8.64.26.172.in-addr.arpa.", dnsmessage.TypePTR, ""},
		{"64.26.172.in-addr.arpa.", dnsmessage.TypePTR, ""},
		{"other.", dnsmessage.TypeA, ""},
		{"db.other.", dnsmessage.TypeA, ""},
		{"a.", dnsmessage.TypeA, ""},
	} {
		answer := table.answer(query(t, x.name, x.kind))
		if answer == nil {
			if x.want != "" {
				t.Errorf("%s %v: no answer", x.name, x.kind)
			}
			continue
		}
		var m dnsmessage.Message
		if err := m.Unpack(answer); err != nil {
			t.Fatal(err)
		}
		got := []string{}
		for _, r := range m.Answers {
			switch b := r.Body.(type) {
			case *dnsmessage.AResource:
				got = append(got, fmt.Sprintf("%d.%d.%d.%d", b.A[0], b.A[1], b.A[2], b.A[3]))
			case *dnsmessage.AAAAResource:
				got = append(got, "fd00:26::5")
			case *dnsmessage.PTRResource:
				got = append(got, b.PTR.String())
			}
		}
		slices.Sort(got)
		if fmt.Sprint(got) != x.want || m.ID != 77 || !m.Response || !m.RecursionAvailable || m.RCode != dnsmessage.RCodeSuccess || len(m.Questions) != 1 {
			t.Errorf("%s %v: %v, %+v; want %s", x.name, x.kind, got, m.Header, x.want)
		}
	}
}

// More addresses than a datagram takes are asked for over TCP.
func TestNamesTruncated(t *testing.T) {
	var file strings.Builder
	for i := range 100 {
		fmt.Fprintf(&file, "172.26.64.%d all\n", i)
	}
	answer := parseNames([]byte(file.String())).answer(query(t, "all.", dnsmessage.TypeA))
	var m dnsmessage.Message
	if err := m.Unpack(truncated(answer)); err != nil || !m.Truncated || len(m.Answers) != 0 || len(m.Questions) != 1 {
		t.Errorf("%+v, %v", m, err)
	}
	if err := m.Unpack(failure(query(t, "x.", dnsmessage.TypeA))); err != nil || m.RCode != dnsmessage.RCodeServerFailure || m.ID != 77 {
		t.Errorf("a failure is %+v, %v", m, err)
	}
}

// Whatever a container asks, the agent goes on.
func FuzzNames(f *testing.F) {
	f.Add([]byte(someNames), query(f, "db.", dnsmessage.TypeA))
	f.Add([]byte("::1 a\n"), query(f, "a.", dnsmessage.TypeAAAA))
	f.Fuzz(func(t *testing.T, file, query []byte) {
		answer := parseNames(file).answer(query)
		for _, a := range [][]byte{answer, failure(query), truncated(query)} {
			var m dnsmessage.Message
			if a != nil && m.Unpack(a) != nil {
				t.Fatalf("an answer that nobody can read: %x", a)
			}
		}
	})
}
