package volume

import (
	"errors"
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cradlestack/cradlestack/spec"
)

func TestParseParameters(t *testing.T) {
	all := map[string]string{
		"class": "lv2", "pool": "red", "fs": "xfs", "attach": "direct", "compression": "zstd", "volblocksize": "16KiB", "iops": "500", "bandwidth": "100MiB",
		"snapshots": "hourly=24,monthly=12", "cold": "daily=7",
	}
	p, err := ParseParameters(all)
	want := Parameters{
		Class: LV2, Pool: "red", FS: "xfs", Direct: true, Compression: "zstd", BlockSize: 16 << 10,
		Limits: spec.IOLimits{IOPS: 500, Bandwidth: 100 << 20}, Snapshots: Retention{Hourly: 24, Monthly: 12}, Cold: Retention{Daily: 7},
	}
	if err != nil || p != want {
		t.Errorf("%+v, %v; want %+v", p, err, want)
	}
	if back := p.Map(); !maps.Equal(back, all) {
		t.Errorf("written again they are %v", back)
	}
	if len(all) != len(parameters) {
		t.Errorf("%d of %d parameters are tested", len(all), len(parameters))
	}
	if p, err := ParseParameters(nil); err != nil || p != (Parameters{Class: NFS}) {
		t.Errorf("none: %+v, %v", p, err)
	}
}

// The table of docs/csi.md has the parameters that there are.
func TestParametersAreTold(t *testing.T) {
	page, err := os.ReadFile("../../docs/csi.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, _ := strings.Cut(string(page), "\n## Parameters\n")
	section, _, _ = strings.Cut(section, "\n#")
	told := map[string]bool{}
	for row := range strings.Lines(section) {
		if cells := strings.Split(row, "|"); len(cells) > 2 {
			for _, name := range regexp.MustCompile("`([^`]+)`").FindAllStringSubmatch(cells[1], -1) {
				told[name[1]] = true
			}
		}
	}
	for name := range told {
		if parameters[name] == nil {
			t.Errorf("docs/csi.md tells of the parameter %s, which there is not", name)
		}
	}
	for name := range parameters {
		if !told[name] {
			t.Errorf("docs/csi.md does not tell of the parameter %s", name)
		}
	}
}

func TestParseParametersErrors(t *testing.T) {
	for _, c := range []struct{ name, value, want string }{
		{"size", "1GiB", `parameter "size": there is none; known are attach, bandwidth, class, `},
		{strings.Repeat("x", 1000), "", `there is none`},
		{"class", "gp", `parameter class: "gp" is none of nfs, lv2, gfs`},
		{"class", "", `parameter class: "" is none of nfs, lv2, gfs`},
		{"pool", "../red", `parameter pool: "../red" is no name of a pool`},
		{"fs", "btrfs", `parameter fs: "btrfs" is none of ext4, xfs`},
		{"attach", "guest", `parameter attach: "guest" is none of host, direct`},
		{"compression", "zip", `parameter compression: "zip" is none of`},
		{"volblocksize", "12KiB", `parameter volblocksize: "12KiB" is no block size; write a power of two from 4KiB to 128KiB`},
		{"volblocksize", "2KiB", `parameter volblocksize: "2KiB" is no block size`},
		{"volblocksize", "1MiB", `parameter volblocksize: "1MiB" is no block size`},
		{"snapshots", "", `parameter snapshots: "" will not do`},
		{"snapshots", "hourly", `"hourly" is no number of snapshots to keep`},
		{"snapshots", "yearly=1", `"yearly=1" is no number of snapshots to keep`},
		{"snapshots", "daily=1,daily=2", `"daily=2" is no number of snapshots to keep`},
		{"snapshots", "daily=100000", `"daily=100000" is no number of snapshots to keep`},
		{"iops", "0", `parameter iops: "0" is no number of operations`},
		{"iops", "many", `parameter iops: "many" is no number of operations`},
		{"bandwidth", "-1", `parameter bandwidth: "-1" is no number of bytes`},
		{"cold", "on", `parameter cold: "on" will not do`},
		{"cold", "daily=7", `parameter cold: is for block volumes; set class=lv2`},
		{"iops", "5", `parameter iops, bandwidth: are kept by the guest's machine, of its disks: set attach=direct`},
	} {
		_, err := ParseParameters(map[string]string{c.name: c.value})
		if !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%.20s=%s: %v; want %s", c.name, c.value, err, c.want)
		}
		if err != nil && len(err.Error()) > 300 {
			t.Errorf("%.20s: a message of %d bytes", c.name, len(err.Error()))
		}
	}
}

func TestCheckPools(t *testing.T) {
	for _, c := range []struct {
		pools []string
		want  string // "" is accepted
	}{
		{nil, ""},
		{[]string{"/a", "red=/b", "blue=/c"}, ""},
		{[]string{"/a", "/b"}, "--pool /b: --pool /a is called default as well; write another NAME=/b"},
		{[]string{"red=/a", "red=/b"}, "--pool red=/b: --pool red=/a is called red as well"},
		{[]string{"/a", "red=/a/"}, "--pool red=/a/: --pool /a is the same place"},
		{[]string{"../x=/a"}, `"../x" is no name of a pool`},
	} {
		err := CheckPools(c.pools)
		if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%q: %v; want %q", c.pools, err, c.want)
		}
	}
	if err := NoPool("read", []string{"default", "red"}); !errors.Is(err, ErrInvalid) || err.Error() != `parameter pool: there is no pool "read"; known are default, red` {
		t.Error(err)
	}
}

func TestChoose(t *testing.T) {
	for _, c := range []struct {
		size, limit, want int64 // want 0 is ErrRange
	}{
		{0, 0, 1000},
		{1, 0, 200},
		{201, 0, 300},
		{300, 0, 300},
		{300, 300, 300},
		{0, 500, 500},
		{0, 550, 500},
		{0, 150, 0},
		{301, 399, 0},
		{301, 400, 400},
		{MaxSize + 1, 0, 0},
	} {
		got, err := Request{Name: "v", Size: c.size, Limit: c.limit}.Choose(1000, 200, 100)
		if got != c.want || errors.Is(err, ErrRange) != (c.want == 0) {
			t.Errorf("%d to %d: %d, %v; want %d", c.size, c.limit, got, err, c.want)
		}
	}
}

func TestSnapshotID(t *testing.T) {
	id, err := ParseSnapshotID("data@before-upgrade")
	if err != nil || id != (SnapshotID{"data", "before-upgrade"}) || id.String() != "data@before-upgrade" {
		t.Errorf("%+v, %v", id, err)
	}
	for _, s := range []string{"", "@", "data", "data@", "@x", "a@b@c", "../a@b", "a@../b", "a@b/c"} {
		if id, err := ParseSnapshotID(s); !errors.Is(err, ErrNotFound) {
			t.Errorf("%q: %+v, %v; want ErrNotFound", s, id, err)
		}
	}
}

// The schedule's names are its own: one that somebody else had taken would be no automatic one, and no copy would be made of that hour.
func TestSnapshotNames(t *testing.T) {
	p := Parameters{Snapshots: Retention{1, 1, 1, 1}, Cold: Retention{Hourly: 1}}
	take, _ := p.Due(nil, time.Date(2026, 1, 30, 22, 30, 0, 0, time.UTC))
	if len(take) != 5 {
		t.Fatalf("%q are due", take)
	}
	for _, name := range take {
		r := SnapshotRequest{ID: SnapshotID{"v", name}, Automatic: true}
		if err := r.Check(); err != nil {
			t.Error(err)
		}
		if r.Automatic = false; !errors.Is(r.Check(), ErrInvalid) {
			t.Errorf("%s by hand: %v", name, r.Check())
		}
	}
	for _, name := range []string{"hourly-mine", "cold", "cold-", "yearly-20260130T000000Z", "before-rollback-20260130T000000Z", "20260130T000000Z"} {
		if err := (SnapshotRequest{ID: SnapshotID{"v", name}}).Check(); err != nil {
			t.Error(err)
		}
	}
	if err := (SnapshotRequest{ID: SnapshotID{"v", "../x"}, Automatic: true}).Check(); !errors.Is(err, ErrInvalid) {
		t.Error(err)
	}
}

// What was put in place of the parameter counts; what can't be read does not end the snapshots.
func TestScheduled(t *testing.T) {
	made := Retention{Hourly: 2}
	for schedule, want := range map[string]Retention{"": made, "daily=3": {Daily: 3}, NoSnapshots: {}, "yearly=1": made} {
		v := Volume{Schedule: schedule, Parameters: Parameters{Snapshots: made}}
		if got := v.Scheduled(); got != want {
			t.Errorf("%q: %v, not %v", schedule, got, want)
		}
		take, _ := v.Due(nil, time.Date(2026, 1, 30, 22, 30, 0, 0, time.UTC))
		if daily := slices.Contains(take, "daily-20260130T000000Z"); daily != (want.Daily > 0) || len(take) > 1 {
			t.Errorf("%q: %v are due", schedule, take)
		}
	}
	for schedule, ok := range map[string]bool{"": true, NoSnapshots: true, "hourly=24,daily=7,weekly=4,monthly=6": true, "hourly=0": false, "hourly=1001": false, "hourly=1,hourly=2": false, "none,daily=1": false, "x\n": false} {
		if err := CheckSchedule(schedule); (err == nil) != ok || err != nil && !errors.Is(err, ErrInvalid) {
			t.Errorf("%q: %v", schedule, err)
		}
	}
}

// A month of hours: at each, what is due is taken and what is too many goes; of each kind there are then the newest ones.
func TestRetention(t *testing.T) {
	r, err := ParseRetention("hourly=3,daily=2,weekly=2,monthly=2")
	if err != nil {
		t.Fatal(err)
	}
	p := Parameters{Snapshots: r}
	manual := Snapshot{ID: SnapshotID{"v", "hourly-mine"}} // somebody took it, whatever it is called
	has := []Snapshot{manual}
	now := time.Date(2026, 1, 30, 22, 30, 0, 0, time.FixedZone("", 3600))
	for range 24 * 35 {
		take, drop := p.Due(has, now)
		for _, name := range take {
			has = append(has, Snapshot{ID: SnapshotID{"v", name}, Automatic: true})
		}
		has = slices.DeleteFunc(has, func(s Snapshot) bool { return slices.Contains(drop, s.ID) })
		if take, drop := p.Due(has, now); len(take)+len(drop) > 0 {
			t.Fatalf("%v: again, %v and %v are due", now, take, drop)
		}
		now = now.Add(time.Hour)
	}
	var names []string
	for _, s := range has {
		names = append(names, s.ID.Name)
	}
	slices.Sort(names)
	want := []string{ // the last hour began on 2026-03-06 at 20:00 UTC, a Friday
		"daily-20260305T000000Z", "daily-20260306T000000Z",
		"hourly-20260306T180000Z", "hourly-20260306T190000Z", "hourly-20260306T200000Z", "hourly-mine",
		"monthly-20260201T000000Z", "monthly-20260301T000000Z",
		"weekly-20260223T000000Z", "weekly-20260302T000000Z",
	}
	if !slices.Equal(names, want) {
		t.Errorf("there are\n%v, not\n%v", names, want)
	}
	take, drop := Parameters{}.Due(has, now)
	if len(take) > 0 || len(drop) != len(want)-1 || slices.Contains(drop, manual.ID) {
		t.Errorf("without a schedule any more: %v, %v", take, drop)
	}
}

// The clock is years ahead for some hours, and then it is not, or the other way around: what is taken from then on is kept, and what was taken before goes in its time.
func TestRetentionClock(t *testing.T) {
	p := Parameters{Snapshots: Retention{Hourly: 3}}
	for what, steps := range map[string][]time.Time{
		"ahead":  {time.Date(2026, 1, 30, 22, 30, 0, 0, time.UTC), time.Date(2031, 1, 30, 22, 30, 0, 0, time.UTC), time.Date(2026, 1, 31, 3, 30, 0, 0, time.UTC)},
		"behind": {time.Date(2026, 1, 30, 22, 30, 0, 0, time.UTC), time.Date(1970, 1, 1, 0, 30, 0, 0, time.UTC), time.Date(2026, 1, 31, 3, 30, 0, 0, time.UTC)},
	} {
		var has []Snapshot // in the order in which they were taken
		for _, now := range steps {
			for i := range 5 {
				take, drop := p.Due(has, now.Add(time.Duration(i)*time.Hour))
				for _, name := range take {
					has = append(has, Snapshot{ID: SnapshotID{"v", name}, Automatic: true})
				}
				newest := has[len(has)-1].ID
				has = slices.DeleteFunc(has, func(s Snapshot) bool { return slices.Contains(drop, s.ID) })
				if len(has) == 0 || has[len(has)-1].ID != newest {
					t.Fatalf("%s: after %v %v goes, the newest", what, now, newest)
				}
			}
			for i, s := range has[max(0, len(has)-3):] {
				if want := "hourly-" + now.Add(time.Duration(2+i)*time.Hour).Truncate(time.Hour).Format(stamp); s.ID.Name != want {
					t.Errorf("%s: five hours after %v there is %v, not %s", what, now, s.ID, want)
				}
			}
		}
	}
}

// Of the snapshots for cold storage there are two: the one that is copied, and the one that was.
func TestDueForCold(t *testing.T) {
	p := Parameters{Cold: Retention{Daily: 1}}
	var has []Snapshot
	now := time.Date(2026, 1, 30, 22, 30, 0, 0, time.UTC)
	for range 5 {
		take, drop := p.Due(has, now)
		for _, name := range take {
			has = append(has, Snapshot{ID: SnapshotID{"v", name}, Automatic: true})
		}
		has = slices.DeleteFunc(has, func(s Snapshot) bool { return slices.Contains(drop, s.ID) })
		now = now.Add(time.Hour)
	}
	if len(has) != 2 || has[1].ID.Name != "cold-20260131T020000Z" || !has[1].ForCold() {
		t.Errorf("%+v", has)
	}
}

func TestKeep(t *testing.T) {
	r := Retention{Hourly: 3, Daily: 2, Monthly: 2}
	var taken []time.Time
	for now := time.Date(2026, 1, 30, 0, 10, 0, 0, time.UTC); now.Before(time.Date(2026, 2, 3, 12, 0, 0, 0, time.UTC)); now = now.Add(30 * time.Minute) {
		taken = append(taken, now)
	}
	var kept []string
	for i, keep := range r.Keep(taken) {
		if keep {
			kept = append(kept, taken[i].Format("02-15:04"))
		}
	}
	if want := []string{"31-23:40", "02-23:40", "03-09:40", "03-10:40", "03-11:40"}; !slices.Equal(kept, want) {
		t.Errorf("kept %v; want %v", kept, want)
	}
	if got := (Retention{}).Keep(taken[:2]); got[0] || !got[1] {
		t.Errorf("the newest is always kept: %v", got)
	}
}

// Whatever somebody writes is refused as his mistake, in a few words, or read, written again and read as the same.
func FuzzParseParameters(f *testing.F) {
	for name, value := range map[string]string{
		"class": "lv2", "pool": "red", "fs": "xfs", "attach": "direct", "compression": "zstd", "volblocksize": "16KiB", "snapshots": "hourly=24,daily=7", "iops": "500", "cold": "monthly=12",
	} {
		f.Add(name, value, "class", "lv2")
	}
	f.Add("bandwidth", "1e9TiB", "snapshots", "hourly=-1,,=\x00")
	f.Fuzz(func(t *testing.T, name, value, other, another string) {
		p, err := ParseParameters(map[string]string{name: value, other: another})
		if err != nil {
			if !errors.Is(err, ErrInvalid) || len(err.Error()) > 1000 {
				t.Errorf("%v", err)
			}
			return
		}
		if again, err := ParseParameters(p.Map()); err != nil || again != p {
			t.Errorf("%+v is read again as %+v, %v", p, again, err)
		}
	})
}

// A name that is taken is no path, and no snapshot's name is a volume's.
func FuzzParseSnapshotID(f *testing.F) {
	for _, s := range []string{"data@before-upgrade", "../a@b", "a@b@c", "@", ".a@b", "a/b@c"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		id, err := ParseSnapshotID(s)
		if err != nil {
			if !errors.Is(err, ErrNotFound) || len(err.Error()) > 1000 {
				t.Errorf("%v", err)
			}
			return
		}
		if id.String() != s || !ValidName(id.Volume) || !ValidName(id.Name) || strings.ContainsAny(id.Volume+id.Name, "/@\x00") || strings.HasPrefix(id.Volume, ".") || ValidName(s) {
			t.Errorf("%q is %+v", s, id)
		}
	})
}
