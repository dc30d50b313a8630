package volume

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Retention says how many automatic snapshots of each kind are kept. The zero value is none.
type Retention struct{ Hourly, Daily, Weekly, Monthly int }

type kind struct {
	name  string
	count func(*Retention) *int
	begin func(time.Time) time.Time // of the period that a time is in
}

// kinds of automatic snapshots. Each is taken once in its period, which begins in UTC; weeks begin on Monday.
var kinds = []kind{
	{"hourly", func(r *Retention) *int { return &r.Hourly }, func(t time.Time) time.Time { return t.Truncate(time.Hour) }},
	{"daily", func(r *Retention) *int { return &r.Daily }, day},
	{"weekly", func(r *Retention) *int { return &r.Weekly }, func(t time.Time) time.Time { return day(t).AddDate(0, 0, -(int(t.Weekday())+6)%7) }},
	{"monthly", func(r *Retention) *int { return &r.Monthly }, func(t time.Time) time.Time { return day(t).AddDate(0, 0, 1-t.Day()) }},
}

func day(t time.Time) time.Time { return time.Date(t.Year(), t.Month(), t.Day(), 0, 0, 0, 0, time.UTC) }

// maxKept of one kind.
const maxKept = 1000

// NoSnapshots is what is written where there are to be none, although there would be otherwise.
const NoSnapshots = "none"

// ParseRetention reads hourly=24,daily=7,weekly=4,monthly=12, or some of these, or none.
func ParseRetention(s string) (r Retention, err error) {
	if s == NoSnapshots {
		return r, nil
	}
	for part := range strings.SplitSeq(s, ",") {
		name, number, _ := strings.Cut(part, "=")
		n, nerr := strconv.Atoi(number)
		i := slices.IndexFunc(kinds, func(k kind) bool { return k.name == name })
		if i < 0 || nerr != nil || n < 1 || n > maxKept || *kinds[i].count(&r) != 0 {
			return Retention{}, fmt.Errorf("%q is no number of snapshots to keep; write hourly=24,daily=7,weekly=4,monthly=12, some of these, or none", abbreviate(part))
		}
		*kinds[i].count(&r) = n
	}
	return r, nil
}

// String is what ParseRetention reads, "" for none.
func (r Retention) String() string {
	var parts []string
	for _, k := range kinds {
		if n := *k.count(&r); n > 0 {
			parts = append(parts, fmt.Sprintf("%s=%d", k.name, n))
		}
	}
	return strings.Join(parts, ",")
}

// MarshalText is String.
func (r Retention) MarshalText() ([]byte, error) { return []byte(r.String()), nil }

// UnmarshalText is ParseRetention, of "" none.
func (r *Retention) UnmarshalText(text []byte) (err error) {
	if len(text) > 0 {
		*r, err = ParseRetention(string(text))
	}
	return err
}

// stamp is how the beginning of a period is written in a snapshot's name.
const stamp = "20060102T150405Z"

// Scheduled is what is kept of a volume's automatic snapshots: as its parameters say, unless that was changed since.
func (v Volume) Scheduled() Retention {
	if v.Schedule == "" {
		return v.Snapshots
	}
	r, err := ParseRetention(v.Schedule)
	if err != nil { // of a later version of this program
		return v.Snapshots
	}
	return r
}

// Due says which automatic snapshots a volume should have at the time now that it has not, by name, and which ones are one too many.
func (v Volume) Due(has []Snapshot, now time.Time) (take []string, drop []SnapshotID) {
	p := v.Parameters
	p.Snapshots = v.Scheduled()
	return p.Due(has, now)
}

// CheckSchedule reads what a volume's schedule is to be: as ParseRetention does, and "" for what its parameters say.
func CheckSchedule(s string) error {
	if s == "" {
		return nil
	}
	if _, err := ParseRetention(s); err != nil {
		return Invalid("schedule", "%v", err)
	}
	return nil
}

// Due says which automatic snapshots a volume should have at the time now that it has not, by name, and which ones are one too many.
func (p Parameters) Due(has []Snapshot, now time.Time) (take []string, drop []SnapshotID) {
	for _, k := range kinds {
		t, d := k.due(*k.count(&p.Snapshots), has, now.UTC())
		take, drop = append(take, t...), append(drop, d...)
	}
	keep := 0
	if p.Cold != (Retention{}) {
		keep = 2 // one is copied, and compared with the one before it
	}
	t, d := cold.due(keep, has, now.UTC())
	return append(take, t...), append(drop, d...)
}

// cold is the kind of those that are copied to cold storage.
var cold = kind{name: "cold", begin: kinds[0].begin}

// ofSchedule says whether a name is one that Due gives.
func ofSchedule(name string) bool {
	of, at, _ := strings.Cut(name, "-")
	_, err := time.Parse(stamp, at)
	return err == nil && (of == cold.name || slices.ContainsFunc(kinds, func(k kind) bool { return k.name == of }))
}

// ForCold says whether a snapshot is one that is to be copied to cold storage.
func (s Snapshot) ForCold() bool { return s.is(cold) }

// Newest says whether no later one for cold storage than this can have been taken by a time.
func (s Snapshot) Newest(now time.Time) bool {
	return s.ForCold() && s.ID.Name == cold.at(now)
}

// at is the name of the one that is taken at a time.
func (k kind) at(now time.Time) string { return k.name + "-" + k.begin(now.UTC()).Format(stamp) }

func (s Snapshot) is(k kind) bool { return s.Automatic && strings.HasPrefix(s.ID.Name, k.name+"-") }

func (k kind) due(keep int, has []Snapshot, now time.Time) (take []string, drop []SnapshotID) {
	var kept []Snapshot
	for _, s := range has {
		if s.is(k) {
			kept = append(kept, s)
		}
	}
	name := k.at(now)
	if keep > 0 && !slices.ContainsFunc(kept, func(s Snapshot) bool { return s.ID.Name == name }) {
		take = append(take, name)
		keep-- // what is to come is kept as well
	}
	// The newest first. What has a name of the future was taken while the clock was ahead, or it is behind now: either way before what is taken from now on.
	ahead := func(s Snapshot) int { return max(0, cmp.Compare(s.ID.Name, name)) }
	slices.SortFunc(kept, func(a, b Snapshot) int {
		return cmp.Or(cmp.Compare(ahead(a), ahead(b)), cmp.Compare(b.ID.Name, a.ID.Name))
	})
	for _, s := range kept[min(keep, len(kept)):] {
		drop = append(drop, s.ID)
	}
	return take, drop
}

// Keep says which of some copies are kept, by the times at which they were taken, oldest first: of each kind the newest one of each of its newest periods. The
// newest of all is always kept.
func (r Retention) Keep(taken []time.Time) []bool {
	keep := make([]bool, len(taken))
	if len(taken) > 0 {
		keep[len(taken)-1] = true
	}
	for _, k := range kinds {
		var period time.Time
		left := *k.count(&r)
		for i := len(taken) - 1; i >= 0; i-- {
			if began := k.begin(taken[i].UTC()); i == len(taken)-1 || !began.Equal(period) {
				if left == 0 {
					break
				}
				period, keep[i] = began, true
				left--
			}
		}
	}
	return keep
}
