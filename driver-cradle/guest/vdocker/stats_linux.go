package vdocker

import (
	"encoding/json"
	"math"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/moby/moby/api/types/container"

	"github.com/cradlestack/cradlestack/driver-cradle/guest"
	"github.com/cradlestack/cradlestack/internal/dockerhttp"
)

// podCgroup holds all containers; its limit is the pod's memory.
const podCgroup = "/sys/fs/cgroup/pod"

// sampleInterval is docker's between two samples.
const sampleInterval = time.Second

// stats answers docker stats: samples once a second while somebody looks, nothing otherwise.
func (a *api) stats(w http.ResponseWriter, r *http.Request, c *guest.Container) error {
	stream := dockerhttp.Parameter(r, "stream") == "" || dockerhttp.Truth(r, "stream")
	oneShot := dockerhttp.Truth(r, "one-shot")
	if stream && oneShot {
		return dockerhttp.Invalid("cannot have stream=true and one-shot=true")
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusOK)
	out := http.NewResponseController(w)
	enc := json.NewEncoder(w)
	ctx := r.Context()
	var before *container.StatsResponse
	for {
		s := sample(c)
		if before != nil {
			s.PreRead, s.PreCPUStats = before.Read, before.CPUStats
		}
		// A single answer has two samples behind it, unless the client wants it now, or nothing would change.
		if stream || oneShot || before != nil || !c.State().Running {
			if enc.Encode(s) != nil || out.Flush() != nil || !stream {
				return nil //nolint:nilerr // done, or the client has gone
			}
		}
		before = s
		select {
		case <-time.After(sampleInterval):
		case <-ctx.Done():
			return nil
		}
	}
}

// sample reads what the container uses; of one that is not running, docker gives name and id only.
func sample(c *guest.Container) *container.StatsResponse {
	spec := c.Spec()
	s := &container.StatsResponse{ID: spec.ID, Name: "/" + spec.Name, OSType: "linux"}
	if !c.State().Running {
		return s
	}
	dir := c.Cgroup()
	s.Read = time.Now().UTC()
	s.CPUStats = cpuStats(dir)
	s.MemoryStats = memoryStats(dir)
	s.PidsStats.Current, _ = cgroupNumber(dir, "pids.current")
	if limit, ok := cgroupNumber(dir, "pids.max"); ok {
		s.PidsStats.Limit = limit
	} else {
		s.PidsStats.Limit = math.MaxUint64
	}
	s.NumProcs = 0 // Windows only
	s.BlkioStats = blkioStats(dir)
	s.Networks = networkStats()
	return s
}

// flatKeyed reads a cgroup file of lines "key value".
func flatKeyed(path string) map[string]uint64 {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil
	}
	out := map[string]uint64{}
	for line := range strings.Lines(string(data)) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), " ")
		if n, err := strconv.ParseUint(value, 10, 64); err == nil {
			out[key] = n
		}
	}
	return out
}

func cpuStats(dir string) container.CPUStats {
	m := flatKeyed(filepath.Join(dir, "cpu.stat"))
	s := container.CPUStats{
		CPUUsage:       container.CPUUsage{TotalUsage: m["usage_usec"] * 1000, UsageInUsermode: m["user_usec"] * 1000, UsageInKernelmode: m["system_usec"] * 1000},
		ThrottlingData: container.ThrottlingData{Periods: m["nr_periods"], ThrottledPeriods: m["nr_throttled"], ThrottledTime: m["throttled_usec"] * 1000},
	}
	s.SystemUsage, s.OnlineCPUs = systemCPU()
	return s
}

// systemCPU gives the time of all processors together since boot, in nanoseconds, and their number.
func systemCPU() (nanoseconds uint64, processors uint32) {
	data, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0, 0
	}
	for line := range strings.Lines(string(data)) {
		fields := strings.Fields(line)
		if len(fields) < 8 || !strings.HasPrefix(fields[0], "cpu") {
			break
		}
		if fields[0] != "cpu" {
			processors++
			continue
		}
		for _, f := range fields[1:8] { // what follows, guest time, is in user's already
			n, _ := strconv.ParseUint(f, 10, 64)
			nanoseconds += n * (1e9 / clockTicks)
		}
	}
	return nanoseconds, processors
}

// clockTicks is USER_HZ, of which the kernel's interface is made on every architecture that we run on.
const clockTicks = 100

func memoryStats(dir string) container.MemoryStats {
	s := container.MemoryStats{Stats: flatKeyed(filepath.Join(dir, "memory.stat")), Limit: memoryLimit(dir)}
	s.Usage, _ = cgroupNumber(dir, "memory.current")
	s.Failcnt = flatKeyed(filepath.Join(dir, "memory.events"))["oom"]
	return s
}

// memoryLimit is the lowest of the container's, the pod's and the VM's.
func memoryLimit(dir string) uint64 {
	limit := uint64(math.MaxUint64)
	for _, d := range []string{dir, podCgroup} {
		if n, ok := cgroupNumber(d, "memory.max"); ok {
			limit = min(limit, n)
		}
	}
	data, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return limit
	}
	for line := range strings.Lines(string(data)) {
		if f := strings.Fields(line); len(f) > 1 && f[0] == "MemTotal:" {
			n, _ := strconv.ParseUint(f[1], 10, 64)
			return min(limit, n<<10)
		}
	}
	return limit
}

// blkioStats are io.stat's lines: "8:0 rbytes=… wbytes=… rios=… wios=… …".
func blkioStats(dir string) container.BlkioStats {
	s := container.BlkioStats{IoServiceBytesRecursive: []container.BlkioStatEntry{}, IoServicedRecursive: []container.BlkioStatEntry{}}
	data, err := os.ReadFile(filepath.Join(dir, "io.stat"))
	if err != nil {
		return s
	}
	for line := range strings.Lines(string(data)) {
		fields := strings.Fields(line)
		if len(fields) == 0 {
			continue
		}
		major, minor, _ := strings.Cut(fields[0], ":")
		e := container.BlkioStatEntry{}
		e.Major, _ = strconv.ParseUint(major, 10, 64)
		e.Minor, _ = strconv.ParseUint(minor, 10, 64)
		for _, f := range fields[1:] {
			key, value, _ := strings.Cut(f, "=")
			e.Value, _ = strconv.ParseUint(value, 10, 64)
			switch key {
			case "rbytes", "wbytes":
				e.Op = map[string]string{"rbytes": "read", "wbytes": "write"}[key]
				s.IoServiceBytesRecursive = append(s.IoServiceBytesRecursive, e)
			case "rios", "wios":
				e.Op = map[string]string{"rios": "read", "wios": "write"}[key]
				s.IoServicedRecursive = append(s.IoServicedRecursive, e)
			}
		}
	}
	return s
}

// networkStats are those of the pod's interfaces, which its containers share.
func networkStats() map[string]container.NetworkStats {
	data, err := os.ReadFile("/proc/net/dev")
	if err != nil {
		return nil
	}
	return parseNetDev(string(data))
}

func parseNetDev(text string) map[string]container.NetworkStats {
	out := map[string]container.NetworkStats{}
	for line := range strings.Lines(text) {
		name, counters, ok := strings.Cut(line, ":")
		name = strings.TrimSpace(name)
		f := strings.Fields(counters)
		if !ok || name == "lo" || len(f) < 12 {
			continue
		}
		n := func(i int) uint64 { v, _ := strconv.ParseUint(f[i], 10, 64); return v }
		out[name] = container.NetworkStats{
			RxBytes: n(0), RxPackets: n(1), RxErrors: n(2), RxDropped: n(3),
			TxBytes: n(8), TxPackets: n(9), TxErrors: n(10), TxDropped: n(11),
		}
	}
	return out
}
