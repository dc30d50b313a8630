package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	consulapi "github.com/hashicorp/consul/api"
)

// A lock is a set's key in Consul, whose holder's filer is the active one.
type lock struct {
	client *consulapi.Client
	set    string
}

func (l lock) key() string { return "cradle-filer/" + l.set + "/active" }

// A tenure is the key's value: who is active, or was last.
type tenure struct {
	Member  string    `json:"member"`
	Session string    `json:"session"` // of this tenure, and no other
	Address string    `json:"address,omitempty"`
	Control string    `json:"control,omitempty"` // host:port where other members reach it
	Since   time.Time `json:"since"`
	Why     string    `json:"why"`            // it moved there
	Pool    string    `json:"pool,omitempty"` // that the set has
	Serving bool      `json:"serving,omitempty"`

	// Ended says, and why, that this member has nothing of the pool any more by this tenure, and nobody by an earlier one.
	Ended string `json:"ended,omitempty"`
}

func parseTenure(p *consulapi.KVPair) (t tenure, err error) {
	if p == nil || len(p.Value) == 0 {
		return t, nil
	}
	if err := json.Unmarshal(p.Value, &t); err != nil {
		return t, fmt.Errorf("consul key %s: %w; stop all filers of the set, and remove it", p.Key, err)
	}
	return t, nil
}

func (t tenure) bytes() []byte {
	b, _ := json.Marshal(t) // there is nothing that could not be
	return b
}

// consistent asks Consul's leader, and that whether it still is: what is answered was so after the question.
func consistent(ctx context.Context) *consulapi.QueryOptions {
	return (&consulapi.QueryOptions{RequireConsistent: true}).WithContext(ctx)
}

func writing(ctx context.Context) *consulapi.WriteOptions {
	return new(consulapi.WriteOptions).WithContext(ctx)
}

// holder is the session that has the lock, and what it says.
func (l lock) holder(ctx context.Context) (session string, t tenure, err error) {
	p, _, err := l.client.KV().Get(l.key(), consistent(ctx))
	if err != nil || p == nil {
		return "", t, err
	}
	t, err = parseTenure(p)
	return p.Session, t, err
}

// take takes the lock for a session, if it is as it was when p was read: nobody has had it since.
func (l lock) take(ctx context.Context, session string, p *consulapi.KVPair, t tenure) (bool, error) {
	same := &consulapi.KVTxnOp{Verb: consulapi.KVCheckNotExists, Key: l.key()}
	if p != nil {
		same = &consulapi.KVTxnOp{Verb: consulapi.KVCheckIndex, Key: l.key(), Index: p.ModifyIndex}
	}
	ok, _, _, err := l.client.Txn().Txn(consulapi.TxnOps{
		{KV: same}, {KV: &consulapi.KVTxnOp{Verb: consulapi.KVLock, Key: l.key(), Value: t.bytes(), Session: session}},
	}, new(consulapi.QueryOptions).WithContext(ctx))
	return ok, err
}

// tell says something else, as long as this session has the lock.
func (l lock) tell(ctx context.Context, session string, t tenure) (bool, error) {
	ok, _, _, err := l.client.Txn().Txn(consulapi.TxnOps{
		{KV: &consulapi.KVTxnOp{Verb: consulapi.KVCheckSession, Key: l.key(), Session: session}}, {KV: &consulapi.KVTxnOp{Verb: consulapi.KVSet, Key: l.key(), Value: t.bytes()}},
	}, new(consulapi.QueryOptions).WithContext(ctx))
	return ok, err
}

// endedKey is where whoever has taken the lock meanwhile finds that the tenure before has ended: a value of nothing but its session.
func (l lock) endedKey() string { return "cradle-filer/" + l.set + "/ended" }

// hasEnded says whether the member of a tenure has said so, or its warden.
func (l lock) hasEnded(ctx context.Context, session string) bool {
	p, _, err := l.client.KV().Get(l.endedKey(), new(consulapi.QueryOptions).WithContext(ctx))
	return err == nil && p != nil && session != "" && string(p.Value) == session
}

// ended gives the lock back, and says that nobody has to wait for that tenure, be it that another one does already.
func (l lock) ended(ctx context.Context, session, why string) error {
	for {
		p, _, err := l.client.KV().Get(l.key(), consistent(ctx))
		if err != nil || p == nil {
			return err
		}
		t, err := parseTenure(p)
		if err != nil {
			return err
		}
		if t.Session != session || p.Session != "" && p.Session != session {
			_, err := l.client.KV().Put(&consulapi.KVPair{Key: l.endedKey(), Value: []byte(session)}, writing(ctx))
			return err
		}
		if p.Session == "" && t.Ended != "" {
			return nil // it was said
		}
		t.Ended, t.Serving = why, false
		p.Value = t.bytes()
		var ok bool
		if p.Session == session {
			ok, _, err = l.client.KV().Release(p, writing(ctx))
		} else {
			ok, _, err = l.client.KV().CAS(p, writing(ctx))
		}
		if ok || err != nil {
			return err
		}
	}
}

// consulConfig is for the agent at an address; "" is the environment's choice.
func consulConfig(address string) *consulapi.Config {
	config := consulapi.DefaultConfig()
	if address != "" {
		config.Address = address
	}
	return config
}

// Consul's names of what a member registers.
func (l lock) membersService() string { return l.set + "-member" }

func (l lock) memberID(member string) string { return l.set + "-member-" + member }

func (l lock) activeID(member string) string { return l.set + "-active-" + member }

// members are those whose process is well.
func (l lock) members(ctx context.Context) (names []string, err error) {
	all, _, err := l.client.Health().Service(l.membersService(), "", true, new(consulapi.QueryOptions).WithContext(ctx))
	for _, e := range all {
		names = append(names, strings.TrimPrefix(e.Service.ID, l.membersService()+"-"))
	}
	return names, err
}

// hostID is what members tell theirs by, in Consul.
const hostID = "hostid"

// errCloned is that another member can't be told from this one.
var errCloned = errors.New("two hosts of the set were made from one")

// alone refuses a hostid, unless that is "", which another member's host has as well, be it there or not: ZFS would take the two hosts for one, and let both import the
// same zpool. So it does a name that a member on another host has, unless that is away. This member is registered.
func (l lock) alone(ctx context.Context, member, id string) error {
	all, _, err := l.client.Health().Service(l.membersService(), "", false, consistent(ctx))
	var named, numbered []string // hosts
	like := false
	for _, e := range all {
		own := e.Service.ID == l.memberID(member)
		if own && e.Checks.AggregatedStatus() != consulapi.HealthCritical {
			named = append(named, e.Node.Node)
		}
		if e.Service.Meta[hostID] == id {
			numbered = append(numbered, e.Node.Node)
			like = like || !own
		}
	}
	switch {
	case id != "" && (like || len(numbered) > 1): // this one may not be among them yet
		return fmt.Errorf("%w: there is %s with this one's hostid, %s: remove /etc/hostid here, run zgenhostid, and boot; if that host is no more, have Consul forget it (consul force-leave -prune)", errCloned, strings.Join(numbered, " and "), id)
	case len(named) > 1:
		return fmt.Errorf("%w: %s have a member %s: give this one another name with --member", errCloned, strings.Join(named, " and "), member)
	}
	return err
}

// fate says what has become of a member, as far as Consul knows.
func (l lock) fate(ctx context.Context, member string) string {
	all, _, err := l.client.Health().Service(l.membersService(), "", false, new(consulapi.QueryOptions).WithContext(ctx))
	if err != nil {
		return "what became of " + member + " is not known: " + err.Error()
	}
	for _, e := range all {
		if e.Service.ID != l.memberID(member) {
			continue
		}
		for _, c := range e.Checks {
			if c.Status == consulapi.HealthCritical {
				return fmt.Sprintf("%s does not answer: %s: %.200s", member, c.Name, strings.TrimSpace(c.Output))
			}
		}
		return member + " has lost its session, and answers"
	}
	return member + " is gone"
}

var errNoConsul = errors.New("consul does not answer")
