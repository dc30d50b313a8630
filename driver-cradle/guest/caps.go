package guest

import (
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
)

// capabilities by number, linux/capability.h.
var capabilities = [...]string{
	"CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID", "SETPCAP", "LINUX_IMMUTABLE",
	"NET_BIND_SERVICE", "NET_BROADCAST", "NET_ADMIN", "NET_RAW", "IPC_LOCK", "IPC_OWNER", "SYS_MODULE", "SYS_RAWIO", "SYS_CHROOT",
	"SYS_PTRACE", "SYS_PACCT", "SYS_ADMIN", "SYS_BOOT", "SYS_NICE", "SYS_RESOURCE", "SYS_TIME", "SYS_TTY_CONFIG", "MKNOD", "LEASE",
	"AUDIT_WRITE", "AUDIT_CONTROL", "SETFCAP", "MAC_OVERRIDE", "MAC_ADMIN", "SYSLOG", "WAKE_ALARM", "BLOCK_SUSPEND", "AUDIT_READ",
	"PERFMON", "BPF", "CHECKPOINT_RESTORE",
}

// A capSet has bit n set for capability n.
type capSet uint64

const (
	allCaps = capSet(1)<<len(capabilities) - 1
	// defaultCaps are docker's, moby daemon/pkg/oci/caps DefaultCapabilities.
	defaultCaps = capSet(1)<<unix.CAP_CHOWN | 1<<unix.CAP_DAC_OVERRIDE | 1<<unix.CAP_FSETID | 1<<unix.CAP_FOWNER | 1<<unix.CAP_MKNOD |
		1<<unix.CAP_NET_RAW | 1<<unix.CAP_SETGID | 1<<unix.CAP_SETUID | 1<<unix.CAP_SETFCAP | 1<<unix.CAP_SETPCAP |
		1<<unix.CAP_NET_BIND_SERVICE | 1<<unix.CAP_SYS_CHROOT | 1<<unix.CAP_KILL | 1<<unix.CAP_AUDIT_WRITE
)

// resolveCaps applies docker's --cap-add and --cap-drop: ALL in one list makes the other an exception to it, ALL in both drops.
func resolveCaps(privileged bool, add, drop []string) (capSet, error) {
	if privileged {
		return allCaps, nil
	}
	adds, addAll, err := capList(add)
	if err != nil {
		return 0, err
	}
	drops, dropAll, err := capList(drop)
	switch {
	case err != nil:
		return 0, err
	case dropAll:
		return adds, nil
	case addAll:
		return allCaps &^ drops, nil
	}
	return defaultCaps&^drops | adds, nil
}

func capList(names []string) (set capSet, all bool, err error) {
	for _, name := range names {
		bare := strings.TrimPrefix(strings.ToUpper(strings.TrimSpace(name)), "CAP_")
		if bare == "ALL" {
			all = true
			continue
		}
		n := -1
		for i, c := range capabilities {
			if c == bare {
				n = i
			}
		}
		if n < 0 {
			return 0, false, &stateError{ErrInvalid, fmt.Sprintf("unknown capability: %q", "CAP_"+bare)}
		}
		set |= 1 << n
	}
	return set, all, nil
}
