package main

import (
	"bufio"
	"os"
	"runtime/debug"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// slimLater makes this process small once the pod has come to rest.
func slimLater() (stop func() bool) { return time.AfterFunc(2*time.Second, slim).Stop }

// slim gives back the memory that starting the pod has taken: garbage, and the pages of the program itself, most of which the attendant of a
// pod that runs never looks at again. The file's pages come back from the host's cache where they are needed.
func slim() {
	debug.FreeOSMemory()
	maps, err := os.Open("/proc/self/maps")
	if err != nil {
		return
	}
	defer maps.Close()
	exe, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return
	}
	for s := bufio.NewScanner(maps); s.Scan(); {
		// 00400000-01a3c000 r-xp 00000000 fe:00 1234  /usr/bin/kcradle
		f := strings.Fields(s.Text())
		if len(f) != 6 || f[5] != exe || strings.Contains(f[1], "w") {
			continue
		}
		from, to, _ := strings.Cut(f[0], "-")
		start, serr := strconv.ParseUint(from, 16, 64)
		end, eerr := strconv.ParseUint(to, 16, 64)
		if serr == nil && eerr == nil {
			// unix.Madvise takes slices, which these bytes are none of. A failure leaves things as they are.
			_, _, _ = unix.Syscall(unix.SYS_MADVISE, uintptr(start), uintptr(end-start), unix.MADV_DONTNEED)
		}
	}
}
