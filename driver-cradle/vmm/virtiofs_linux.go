package vmm

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// virtiofsd is a program of its own from Debian 13 on. The one that came with QEMU before takes other options.
const (
	virtiofsdPath    = "/usr/libexec/virtiofsd"
	oldVirtiofsdPath = "/usr/lib/qemu/virtiofsd"
)

// ErrNoVirtiofsd is part of the error of a start that needs it and does not find it.
var ErrNoVirtiofsd = errors.New("virtiofsd is missing: apt-get install virtiofsd (Debian 12: qemu-system-common)")

// findVirtiofsd looks for $CRADLE_VIRTIOFSD (of the newer kind), then where Debian has it.
func findVirtiofsd() string {
	for _, p := range []string{os.Getenv("CRADLE_VIRTIOFSD"), virtiofsdPath, oldVirtiofsdPath} {
		if fi, err := os.Stat(p); err == nil && fi.Mode().IsRegular() {
			return p
		}
	}
	return ""
}

// virtiofsCaps are what virtiofsd keeps of root's: to act as the guest's users, and to confine itself further. It makes no device nodes.
var virtiofsCaps = append(shareCaps[:len(shareCaps):len(shareCaps)],
	unix.CAP_SETUID, unix.CAP_SETGID, unix.CAP_SETFCAP, unix.CAP_SETPCAP, unix.CAP_SYS_CHROOT)

const virtiofsSock = "virtiofs.sock"

const virtiofsFiles = 64 << 10

// spawnVirtiofs starts the daemon, which waits for its go-ahead, and gives QEMU's end of the connection. The daemon ends with it.
func (m *Machine) spawnVirtiofs(c *Config, cgroup *os.File) (d *child, conn *os.File, err error) {
	path := findVirtiofsd()
	if path == "" {
		return nil, nil, ErrNoVirtiofsd
	}
	l, err := listenUnix(m.root, virtiofsSock)
	if err != nil {
		return nil, nil, err
	}
	defer l.Close()
	uc, err := dialUnix(m.root, virtiofsSock)
	if err != nil {
		return nil, nil, err
	}
	defer uc.Close()
	if conn, err = uc.File(); err != nil {
		return nil, nil, fmt.Errorf("virtiofs: %w", err)
	}
	conf := confinement{
		Path: path, Caps: virtiofsCaps, Mount: m.dir, Leashed: !c.Detached, NoFile: virtiofsFiles,
		Args: []string{"--fd=3", "--rlimit-nofile=0"},
	}
	if path == oldVirtiofsdPath {
		conf.AllProc = true // it asks for fs.file-max, whatever it is told of limits
		conf.Args = append(conf.Args, "-f", "-o", "source="+sharesDir+",sandbox=chroot,announce_submounts,xattr,log_level=warn", "-o", "modcaps=-mknod")
	} else {
		conf.Args = append(conf.Args, "--shared-dir="+sharesDir, "--sandbox=chroot", "--announce-submounts", "--xattr", "--modcaps=-mknod")
	}
	for _, s := range c.Virtiofs {
		conf.Shares = append(conf.Shares, bind(s))
	}
	if d, err = spawn(&conf, []*os.File{l}, cgroup, m.stderr); err != nil {
		conn.Close()
		return nil, nil, err
	}
	return d, conn, nil
}
