package lease

import (
	"time"

	"golang.org/x/sys/unix"
)

// Now is the time since the machine has started, that in which it was suspended included (clock_gettime(2), CLOCK_BOOTTIME): it is set by nobody, and goes on
// where processes or the machine stand still.
func Now() time.Duration {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &t); err != nil {
		return Forever // without a clock, nothing holds
	}
	return time.Duration(t.Nano())
}
