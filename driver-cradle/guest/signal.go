package guest

import (
	"fmt"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Real-time signals as glibc numbers them: the kernel's 32 and 33 are the C library's own.
const (
	sigRTMin = 34
	sigRTMax = 64
)

// ParseSignal reads a signal as docker's API takes it: 9, KILL, SIGKILL, RTMIN+3.
func ParseSignal(s string) (unix.Signal, error) {
	if n, err := strconv.Atoi(s); err == nil {
		if n < 1 || n > sigRTMax {
			return 0, &stateError{ErrInvalid, fmt.Sprintf("invalid signal: %s", s)}
		}
		return unix.Signal(n), nil
	}
	name := strings.TrimPrefix(strings.ToUpper(s), "SIG")
	if sig := unix.SignalNum("SIG" + name); sig != 0 {
		return sig, nil
	}
	if rest, ok := strings.CutPrefix(name, "RTMIN"); ok {
		if n, ok := offset(rest, "+"); ok {
			return unix.Signal(sigRTMin + n), nil
		}
	}
	if rest, ok := strings.CutPrefix(name, "RTMAX"); ok {
		if n, ok := offset(rest, "-"); ok {
			return unix.Signal(sigRTMax - n), nil
		}
	}
	return 0, &stateError{ErrInvalid, fmt.Sprintf("invalid signal: %s", s)}
}

// offset reads "" or sign and a number that stays within the real-time signals.
func offset(s, sign string) (int, bool) {
	if s == "" {
		return 0, true
	}
	digits, ok := strings.CutPrefix(s, sign)
	n, err := strconv.ParseUint(digits, 10, 8)
	return int(n), ok && err == nil && n <= sigRTMax-sigRTMin
}
