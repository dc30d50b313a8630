package vmm

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/spec"
)

// bootID names this boot of the host: process ids and start times mean something only together with it.
var bootID = sync.OnceValues(func() (string, error) {
	data, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(data)), err
})

// hostMemory is the host's memory, 0 where it can't be told.
func hostMemory() spec.Bytes {
	var si unix.Sysinfo_t
	if unix.Sysinfo(&si) != nil {
		return 0
	}
	return spec.Bytes(si.Totalram * uint64(si.Unit))
}

// procStat gives the fields of /proc/PID/stat from the third on (proc(5)), so field n is at n-3.
func procStat(pid int) ([]string, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return nil, err
	}
	// The name in parentheses may hold anything, also parentheses.
	i := bytes.LastIndexByte(data, ')')
	fields := strings.Fields(string(data[i+1:]))
	if i < 0 || len(fields) < 22 {
		return nil, fmt.Errorf("/proc/%d/stat has %d fields", pid, len(fields))
	}
	return fields, nil
}

// startTime is when a process started, in clock ticks since boot (field 22): with the pid it names one process.
func startTime(pid int) (uint64, error) {
	fields, err := procStat(pid)
	if err != nil {
		return 0, err
	}
	return strconv.ParseUint(fields[22-3], 10, 64)
}

// clockTick is the unit of times in /proc/PID/stat: USER_HZ is 100 on all machines that Linux runs on with KVM.
const clockTick = 10 * time.Millisecond

// cpuTime is the processor time that a process has used (fields 14 and 15).
func cpuTime(pid int) (time.Duration, error) {
	fields, err := procStat(pid)
	if err != nil {
		return 0, err
	}
	var sum time.Duration
	for _, f := range fields[14-3 : 16-3] {
		n, err := strconv.ParseInt(f, 10, 64)
		if err != nil {
			return 0, fmt.Errorf("/proc/%d/stat: %w", pid, err)
		}
		sum += time.Duration(n) * clockTick
	}
	return sum, nil
}

// tscKHz is the frequency of the processor's time stamp counter. A microvm has no other clock to measure it with, so an error here
// is an error of the guest's clock. The kernel's own calibration is in the page of a perf event (perf_event_open(2), time_mult and
// time_shift); the frequency in /proc/cpuinfo is the core's present one and is used only where there is no such page.
var tscKHz = sync.OnceValues(func() (int64, error) {
	khz, err := perfKHz()
	if err == nil {
		return khz, nil
	}
	data, rerr := os.ReadFile("/proc/cpuinfo")
	if rerr != nil {
		return 0, fmt.Errorf("time stamp counter's frequency: %w", errors.Join(err, rerr))
	}
	for line := range strings.Lines(string(data)) {
		if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "cpu MHz" {
			mhz, perr := strconv.ParseFloat(strings.TrimSpace(value), 64)
			if perr == nil && mhz > 0 {
				return int64(mhz * 1000), nil
			}
		}
	}
	return 0, fmt.Errorf("time stamp counter's frequency: %w", err)
})

func perfKHz() (int64, error) {
	attr := unix.PerfEventAttr{
		Type:   unix.PERF_TYPE_SOFTWARE,
		Config: unix.PERF_COUNT_SW_DUMMY,
		Size:   uint32(unsafe.Sizeof(unix.PerfEventAttr{})),
		Bits:   unix.PerfBitDisabled | unix.PerfBitExcludeKernel,
	}
	fd, err := unix.PerfEventOpen(&attr, 0, -1, -1, unix.PERF_FLAG_FD_CLOEXEC)
	if err != nil {
		return 0, fmt.Errorf("perf_event_open: %w", err)
	}
	defer unix.Close(fd)
	page, err := unix.Mmap(fd, 0, os.Getpagesize(), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return 0, fmt.Errorf("map perf event: %w", err)
	}
	defer unix.Munmap(page)
	var p unix.PerfEventMmapPage
	if _, err := binary.Decode(page[:binary.Size(p)], binary.NativeEndian, &p); err != nil {
		return 0, fmt.Errorf("perf event page: %w", err)
	}
	const userTime = 1 << 3 // cap_user_time
	if p.Capabilities&userTime == 0 || p.Time_mult == 0 || p.Time_shift > 63 {
		return 0, errors.New("perf event page: no clock")
	}
	return int64(uint64(1e6) << p.Time_shift / uint64(p.Time_mult)), nil
}
