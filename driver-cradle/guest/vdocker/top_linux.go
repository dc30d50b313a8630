package vdocker

import (
	"bufio"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/moby/moby/api/types/container"
	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/driver-cradle/guest"
	"github.com/cradlestack/cradlestack/internal/dockerhttp"
)

// top answers docker top. The guest has no ps: the table is made from /proc, in the formats that ps is asked for most.
func (a *api) top(w http.ResponseWriter, r *http.Request, c *guest.Container) error {
	columns, err := psColumns(dockerhttp.Parameter(r, "ps_args"))
	if err != nil {
		return err
	}
	if c.State().Restarting {
		return dockerhttp.NewError(http.StatusConflict, fmt.Sprintf("container %s is restarting, wait until the container is running", c.Spec().ID))
	}
	pids, err := c.Pids()
	if err != nil {
		return err
	}
	slices.Sort(pids)
	sys := newMachineState(accounts(c.Rootfs()))
	out := container.TopResponse{Processes: [][]string{}}
	for _, col := range columns {
		out.Titles = append(out.Titles, col.title)
	}
	for _, pid := range pids {
		p, err := readProcess(pid)
		if err != nil {
			continue // it has ended
		}
		var row []string
		for _, col := range columns {
			row = append(row, col.value(p, sys))
		}
		out.Processes = append(out.Processes, row)
	}
	c.Emit("top", nil)
	return dockerhttp.Answer(w, http.StatusOK, out)
}

// machineState is what the numbers of processes relate to.
type machineState struct {
	boot   time.Time
	now    time.Time
	memory uint64            // bytes
	names  map[uint32]string // of users
}

func newMachineState(names map[uint32]string) *machineState {
	s := &machineState{now: time.Now(), memory: memoryLimit(podCgroup), names: names}
	var up unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_BOOTTIME, &up)
	s.boot = s.now.Add(-time.Duration(up.Nano()))
	return s
}

// accounts are the container's user names. Its /etc/passwd is resolved inside its root, read only if it is a file, and bounded.
func accounts(rootfs string) map[uint32]string {
	names := map[uint32]string{}
	root, err := openRoot(rootfs)
	if err != nil {
		return names
	}
	defer root.Close()
	f, err := root.open("/etc/passwd", unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY)
	if err != nil {
		return names
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() {
		return names
	}
	lines := bufio.NewScanner(io.LimitReader(f, 1<<20))
	for lines.Scan() {
		fields := strings.Split(lines.Text(), ":")
		if len(fields) < 3 {
			continue
		}
		uid, err := strconv.ParseUint(fields[2], 10, 32)
		if _, taken := names[uint32(uid)]; err == nil && !taken {
			names[uint32(uid)] = fields[0]
		}
	}
	return names
}

// process is what /proc tells about one (proc(5)).
type process struct {
	pid, ppid, pgrp, session int
	tty                      int
	uid, gid                 uint32
	comm, state, args        string
	user, kernel, start      uint64 // clock ticks; start since boot
	priority, nice, threads  int
	virtual, resident        uint64 // bytes
	sessionLeader            bool
	foreground               bool
}

func readProcess(pid int) (*process, error) {
	dir := filepath.Join("/proc", strconv.Itoa(pid))
	stat, err := os.ReadFile(filepath.Join(dir, "stat"))
	if err != nil {
		return nil, err
	}
	p, err := parseStat(string(stat))
	if err != nil {
		return nil, err
	}
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		return nil, err
	}
	p.uid, p.gid = st.Uid, st.Gid
	if f, err := os.Open(filepath.Join(dir, "cmdline")); err == nil {
		cmdline, _ := io.ReadAll(io.LimitReader(f, 4096))
		f.Close()
		p.args = strings.TrimRight(strings.ReplaceAll(string(cmdline), "\x00", " "), " ")
	}
	if p.args == "" {
		p.args = "[" + p.comm + "]"
	}
	return p, nil
}

func parseStat(text string) (*process, error) {
	open, end := strings.IndexByte(text, '('), strings.LastIndexByte(text, ')')
	if open < 0 || end < open {
		return nil, fmt.Errorf("%q is no process status", text)
	}
	f := strings.Fields(text[end+1:])
	if len(f) < 22 {
		return nil, fmt.Errorf("%q is no process status", text)
	}
	n := func(i int) int { v, _ := strconv.Atoi(f[i]); return v }
	u := func(i int) uint64 { v, _ := strconv.ParseUint(f[i], 10, 64); return v }
	p := &process{
		comm: text[open+1 : end], state: f[0], ppid: n(1), pgrp: n(2), session: n(3), tty: n(4), user: u(11), kernel: u(12),
		priority: n(15), nice: n(16), threads: n(17), start: u(19), virtual: u(20), resident: u(21) * uint64(os.Getpagesize()),
	}
	p.pid, _ = strconv.Atoi(strings.TrimSpace(text[:open]))
	p.sessionLeader = p.pid == p.session
	p.foreground = n(5) == p.pgrp && p.tty != 0
	return p, nil
}

func (p *process) cpuTime() time.Duration {
	return time.Duration(p.user+p.kernel) * (time.Second / clockTicks)
}

func (p *process) started(s *machineState) time.Time {
	return s.boot.Add(time.Duration(p.start) * (time.Second / clockTicks))
}

// load is the share of one processor since the process began, in percent.
func (p *process) load(s *machineState) float64 {
	age := s.now.Sub(p.started(s))
	if age <= 0 {
		return 0
	}
	return 100 * float64(p.cpuTime()) / float64(age)
}

func (p *process) userName(s *machineState) string {
	if name := s.names[p.uid]; name != "" {
		return name
	}
	return strconv.Itoa(int(p.uid))
}

// ttyName is the terminal's, as ps shows it: a number of 136:0 and above is a pts.
func (p *process) ttyName() string {
	if p.tty == 0 {
		return "?"
	}
	dev := uint64(p.tty)
	major, minor := unix.Major(dev), unix.Minor(dev)
	if major >= 136 && major <= 143 {
		return "pts/" + strconv.Itoa(int((major-136)<<20|minor))
	}
	return fmt.Sprintf("%d,%d", major, minor)
}

func (p *process) startText(s *machineState) string {
	at := p.started(s)
	if s.now.Sub(at) < 24*time.Hour {
		return at.Format("15:04")
	}
	return at.Format("Jan02")
}

// flags is ps's STAT: the state and what else is known.
func (p *process) flags() string {
	out := p.state
	switch {
	case p.nice < 0:
		out += "<"
	case p.nice > 0:
		out += "N"
	}
	if p.sessionLeader {
		out += "s"
	}
	if p.threads > 1 {
		out += "l"
	}
	if p.foreground {
		out += "+"
	}
	return out
}

func clock(d time.Duration) string {
	s := int(d.Seconds())
	if s >= 86400 {
		return fmt.Sprintf("%d-%02d:%02d:%02d", s/86400, s/3600%24, s/60%60, s%60)
	}
	return fmt.Sprintf("%02d:%02d:%02d", s/3600, s/60%60, s%60)
}

type column struct {
	title string
	value func(*process, *machineState) string
}

func number[T int | uint64](n T) string { return fmt.Sprint(n) }

// columns by ps's format specifiers (ps(1), STANDARD FORMAT SPECIFIERS).
var columns = map[string]column{
	"pid":  {"PID", func(p *process, _ *machineState) string { return number(p.pid) }},
	"ppid": {"PPID", func(p *process, _ *machineState) string { return number(p.ppid) }},
	"pgid": {"PGID", func(p *process, _ *machineState) string { return number(p.pgrp) }},
	"sid":  {"SID", func(p *process, _ *machineState) string { return number(p.session) }},
	"uid":  {"UID", func(p *process, _ *machineState) string { return number(int(p.uid)) }},
	"gid":  {"GID", func(p *process, _ *machineState) string { return number(int(p.gid)) }},
	"user": {"USER", (*process).userName},
	"comm": {"COMMAND", func(p *process, _ *machineState) string { return p.comm }},
	"args": {"COMMAND", func(p *process, _ *machineState) string { return p.args }},
	"cmd":  {"CMD", func(p *process, _ *machineState) string { return p.args }},
	"c":    {"C", func(p *process, s *machineState) string { return number(min(int(p.load(s)), 99)) }},
	"pcpu": {"%CPU", func(p *process, s *machineState) string { return fmt.Sprintf("%.1f", p.load(s)) }},
	"pmem": {"%MEM", func(p *process, s *machineState) string {
		return fmt.Sprintf("%.1f", 100*float64(p.resident)/float64(max(s.memory, 1)))
	}},
	"vsz":    {"VSZ", func(p *process, _ *machineState) string { return number(p.virtual >> 10) }},
	"rss":    {"RSS", func(p *process, _ *machineState) string { return number(p.resident >> 10) }},
	"tty":    {"TT", func(p *process, _ *machineState) string { return p.ttyName() }},
	"stat":   {"STAT", func(p *process, _ *machineState) string { return p.flags() }},
	"s":      {"S", func(p *process, _ *machineState) string { return p.state }},
	"start":  {"STARTED", (*process).startText},
	"stime":  {"STIME", (*process).startText},
	"lstart": {"STARTED", func(p *process, s *machineState) string { return p.started(s).Format(time.ANSIC) }},
	"time":   {"TIME", func(p *process, _ *machineState) string { return clock(p.cpuTime()) }},
	"etime": {"ELAPSED", func(p *process, s *machineState) string {
		return strings.TrimPrefix(clock(s.now.Sub(p.started(s))), "00:")
	}},
	"etimes": {"ELAPSED", func(p *process, s *machineState) string { return number(int(s.now.Sub(p.started(s)).Seconds())) }},
	"ni":     {"NI", func(p *process, _ *machineState) string { return number(p.nice) }},
	"pri":    {"PRI", func(p *process, _ *machineState) string { return number(39 - p.priority) }},
	"nlwp":   {"NLWP", func(p *process, _ *machineState) string { return number(p.threads) }},
	"bsdtime": {"TIME", func(p *process, _ *machineState) string {
		s := int(p.cpuTime().Seconds())
		return fmt.Sprintf("%d:%02d", s/60, s%60)
	}},
}

// Other names of the same.
var columnAliases = map[string]string{
	"command": "args", "ucmd": "comm", "ucomm": "comm", "%cpu": "pcpu", "%mem": "pmem", "rssize": "rss", "rsz": "rss", "vsize": "vsz", "tname": "tty", "tt": "tty",
	"state": "s", "euser": "user", "uname": "user", "ruser": "user", "euid": "uid", "ruid": "uid", "egid": "gid", "rgid": "gid", "nice": "ni", "thcount": "nlwp",
	"cputime": "time", "start_time": "stime", "bsdstart": "start", "pgrp": "pgid", "sess": "sid", "session": "sid", "tgid": "pid",
}

func retitled(key, title string) column { return column{title, columns[key].value} }

// psColumns chooses the table's columns by ps's arguments. What only filters or sorts has no meaning for a container's processes.
func psColumns(args string) ([]column, error) {
	fields := strings.Fields(args)
	var chosen []column
	for i := 0; i < len(fields); i++ {
		f := fields[i]
		var list string
		switch {
		case f == "-o" || f == "o" || f == "-eo" || f == "-Ao" || f == "--format" || strings.HasPrefix(f, "-") && !strings.HasPrefix(f, "--") && strings.HasSuffix(f, "o"):
			i++
			if i == len(fields) {
				return nil, dockerhttp.Invalid("ps: %s needs a list of columns", f)
			}
			list = fields[i]
		case strings.HasPrefix(f, "-o"):
			list = f[2:]
		case strings.HasPrefix(f, "--format="):
			list = strings.TrimPrefix(f, "--format=")
		default:
			continue
		}
		for spec := range strings.SplitSeq(list, ",") {
			name, title, titled := strings.Cut(spec, "=")
			key := name
			if alias, ok := columnAliases[key]; ok {
				key = alias
			}
			col, ok := columns[key]
			if !ok {
				return nil, dockerhttp.Invalid("ps: column %q is not supported; there are %s", name, strings.Join(sortedKeys(columns), " "))
			}
			if titled {
				col.title = title
			}
			chosen = append(chosen, col)
		}
	}
	if len(chosen) > 0 {
		return chosen, nil
	}
	style := strings.Join(fields, "")
	switch {
	case strings.HasPrefix(style, "-") && strings.Contains(style, "l"):
		return []column{columns["s"], columns["uid"], columns["pid"], columns["ppid"], columns["c"], columns["pri"], columns["ni"], retitled("vsz", "SZ"), retitled("tty", "TTY"), columns["time"], columns["cmd"]}, nil
	case style == "" || strings.HasPrefix(style, "-") && strings.Contains(style, "f"):
		return []column{retitled("user", "UID"), columns["pid"], columns["ppid"], columns["c"], columns["stime"], retitled("tty", "TTY"), columns["time"], columns["cmd"]}, nil
	case strings.Contains(style, "u"):
		return []column{columns["user"], columns["pid"], columns["pcpu"], columns["pmem"], columns["vsz"], columns["rss"], retitled("tty", "TTY"), columns["stat"], retitled("start", "START"), columns["bsdtime"], columns["args"]}, nil
	case strings.HasPrefix(style, "-"):
		return []column{columns["pid"], retitled("tty", "TTY"), columns["time"], retitled("comm", "CMD")}, nil
	}
	return []column{columns["pid"], retitled("tty", "TTY"), columns["stat"], columns["bsdtime"], columns["args"]}, nil
}
