package driver

import (
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// isSignal knows SIGHUP, HUP and 1.
func isSignal(s string) bool {
	if n, err := strconv.Atoi(s); err == nil {
		return n >= 1 && n <= 64
	}
	s = strings.ToUpper(s)
	if !strings.HasPrefix(s, "SIG") {
		s = "SIG" + s
	}
	return unix.SignalNum(s) != 0
}
