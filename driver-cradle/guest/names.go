package guest

import (
	"bytes"
	"math/rand/v2"
	"net/netip"
	"strings"

	"golang.org/x/net/dns/dnsmessage"
)

// namesTTL is how many seconds an answer about a name of the pod's networks may be kept: its containers come and go.
const namesTTL = 1

// A nameTable is what a file with lines of /etc/hosts says, names in lower case.
type nameTable struct {
	addresses map[string][]netip.Addr
	names     map[netip.Addr]string // the first one of each address
}

func parseNames(file []byte) nameTable {
	t := nameTable{map[string][]netip.Addr{}, map[netip.Addr]string{}}
	for line := range bytes.Lines(file) {
		text, _, _ := strings.Cut(string(line), "#")
		fields := strings.Fields(text)
		if len(fields) < 2 {
			continue
		}
		address, err := netip.ParseAddr(fields[0])
		if err != nil {
			continue
		}
		if _, known := t.names[address]; !known {
			t.names[address] = fields[1]
		}
		for _, name := range fields[1:] {
			name = strings.ToLower(name)
			t.addresses[name] = append(t.addresses[name], address)
		}
	}
	return t
}

// answer answers a question about a name of the table; nil where DNS has to be asked.
func (t nameTable) answer(query []byte) []byte {
	var p dnsmessage.Parser
	header, err := p.Start(query)
	if err != nil || header.Response || header.OpCode != 0 {
		return nil
	}
	q, err := p.Question()
	if err != nil || q.Class != dnsmessage.ClassINET {
		return nil
	}
	name := strings.TrimSuffix(strings.ToLower(q.Name.String()), ".")
	var found []dnsmessage.ResourceBody
	if q.Type == dnsmessage.TypePTR {
		own, ok := t.names[reversed(name)]
		target, err := dnsmessage.NewName(own + ".")
		if !ok || err != nil {
			return nil
		}
		found = append(found, &dnsmessage.PTRResource{PTR: target})
	} else {
		addresses, ok := t.addresses[name]
		if !ok {
			return nil
		}
		for _, a := range addresses {
			switch {
			case q.Type == dnsmessage.TypeA && a.Is4():
				found = append(found, &dnsmessage.AResource{A: a.As4()})
			case q.Type == dnsmessage.TypeAAAA && a.Is6():
				found = append(found, &dnsmessage.AAAAResource{AAAA: a.As16()})
			}
		}
		rand.Shuffle(len(found), func(i, j int) { found[i], found[j] = found[j], found[i] })
	}
	m := dnsmessage.Message{
		Header:    dnsmessage.Header{ID: header.ID, Response: true, RecursionDesired: header.RecursionDesired, RecursionAvailable: true},
		Questions: []dnsmessage.Question{q},
	}
	for _, body := range found {
		m.Answers = append(m.Answers, dnsmessage.Resource{Header: dnsmessage.ResourceHeader{Name: q.Name, Class: q.Class, TTL: namesTTL}, Body: body})
	}
	out, err := m.Pack()
	if err != nil {
		return nil
	}
	return out
}

// reversed is the IPv4 address that a PTR question is about; the zero address for any other.
func reversed(name string) netip.Addr {
	digits, ok := strings.CutSuffix(name, ".in-addr.arpa")
	parts := strings.Split(digits, ".")
	if !ok || len(parts) != 4 {
		return netip.Addr{}
	}
	a, _ := netip.ParseAddr(strings.Join([]string{parts[3], parts[2], parts[1], parts[0]}, "."))
	return a
}

// failure answers a question that can't be answered.
func failure(query []byte) []byte {
	var p dnsmessage.Parser
	header, err := p.Start(query)
	if err != nil || header.Response {
		return nil
	}
	m := dnsmessage.Message{Header: dnsmessage.Header{
		ID: header.ID, Response: true, RecursionDesired: header.RecursionDesired, RecursionAvailable: true, RCode: dnsmessage.RCodeServerFailure,
	}}
	m.Questions, _ = p.AllQuestions()
	out, err := m.Pack()
	if err != nil {
		return nil
	}
	return out
}

// truncated is an answer without its records, with the flag that says to ask again over TCP: what is too long for a datagram.
func truncated(answer []byte) []byte {
	var p dnsmessage.Parser
	header, err := p.Start(answer)
	if err != nil {
		return nil
	}
	header.Truncated = true
	m := dnsmessage.Message{Header: header}
	m.Questions, _ = p.AllQuestions()
	out, err := m.Pack()
	if err != nil {
		return nil
	}
	return out
}
