package seal

import (
	"time"

	"golang.org/x/sys/unix"
)

func mknod(parent int, name string, e *Entry) error {
	mode := map[Kind]uint32{CharDev: unix.S_IFCHR, BlockDev: unix.S_IFBLK, FIFO: unix.S_IFIFO}[e.Kind]
	return unix.Mknodat(parent, name, mode|0o600, int(unix.Mkdev(e.Major, e.Minor)))
}

func futimes(fd int, mtime int64) error {
	ts, err := unix.TimeToTimespec(time.Unix(mtime, 0))
	if err != nil {
		return err
	}
	return unix.UtimesNanoAt(fd, "", []unix.Timespec{ts, ts}, unix.AT_EMPTY_PATH)
}
