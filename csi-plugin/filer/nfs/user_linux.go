package nfs

import (
	"fmt"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// as calls f with the client's user for all that the kernel decides about files: permissions, ownership of what is made, set-user-id bits.
// That is the thread's alone (setfsuid(2)); without user 0 it has none of the capabilities over files.
func (u user) as(f func() error) error {
	if u.uid == 0 && u.gid == 0 {
		return f() // its groups change nothing
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := setGroups(u.groups); err != nil {
		return err
	}
	setID(unix.SetfsgidRetGid, u.gid)
	setID(unix.SetfsuidRetUid, u.uid)
	defer func() {
		setID(unix.SetfsuidRetUid, 0)
		setID(unix.SetfsgidRetGid, 0)
		if err := setGroups(nil); err != nil {
			panic(err) // this thread must not serve anybody else
		}
	}()
	return f()
}

// setID sets a thread's id for files. The calls have no errors, so the id is read back: nobody's call is to be done as somebody else.
func setID(set func(int) (int, error), id uint32) {
	_, _ = set(int(id))
	if now, _ := set(-1); uint32(now) != id {
		panic(fmt.Sprintf("user or group %d can't be taken, it is %d: this process needs root", id, now))
	}
}

// setGroups is setgroups(2) of this thread alone, unlike package syscall's.
func setGroups(groups []uint32) error {
	var p unsafe.Pointer
	if len(groups) > 0 {
		p = unsafe.Pointer(&groups[0])
	}
	if _, _, errno := unix.RawSyscall(unix.SYS_SETGROUPS, uintptr(len(groups)), uintptr(p), 0); errno != 0 {
		return errno
	}
	return nil
}
