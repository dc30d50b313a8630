package vmm

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/cradlestack/cradlestack/driver-cradle/hostfile"
	"github.com/cradlestack/cradlestack/driver-cradle/wire"
	"github.com/cradlestack/cradlestack/spec"
)

const qemuName = "qemu-system-x86_64"

// ErrNoQEMU is part of the error of a start on a host without QEMU.
var ErrNoQEMU = errors.New(qemuName + " is missing: apt-get install qemu-system-x86")

// A qemu is the program.
type qemu struct {
	path    string // symbolic links resolved
	version string // 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)
	ioUring bool   // it can use it
}

// findQEMU looks for $CRADLE_QEMU, then in $PATH. Asking QEMU for its version takes longer than starting a pod should: the answer is
// kept in the cache directory, by the file's identity.
func findQEMU(ctx context.Context, cacheDir string) (*qemu, error) {
	name := os.Getenv("CRADLE_QEMU")
	if name == "" {
		name = qemuName
	}
	path, err := exec.LookPath(name)
	if err != nil {
		return nil, fmt.Errorf("start machine: %w", ErrNoQEMU)
	}
	if path, err = filepath.EvalSymlinks(path); err != nil {
		return nil, fmt.Errorf("start machine: %w", err)
	}
	fi, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("start machine: %w", err)
	}
	type known struct {
		File, Version string
		IOUring       *bool // nil: an earlier release did not ask
	}
	file := fmt.Sprintf("%s %d %d", path, fi.Size(), fi.ModTime().UnixNano())
	sum := sha256.Sum256([]byte(file))
	cache := filepath.Join(cacheDir, "qemu-"+hex.EncodeToString(sum[:8])+".json")
	var k known
	if data, err := os.ReadFile(cache); err == nil && json.Unmarshal(data, &k) == nil && k.File == file && k.Version != "" && k.IOUring != nil {
		return &qemu{path, k.Version, *k.IOUring}, nil
	}
	out, err := exec.CommandContext(ctx, path, "--version").Output()
	if err != nil {
		return nil, fmt.Errorf("start machine: %s --version: %w", path, err)
	}
	if k.Version, err = parseVersion(out); err != nil {
		return nil, fmt.Errorf("start machine: %s: %w", path, err)
	}
	ioUring := linksIOUring(path)
	k.File, k.IOUring = file, &ioUring
	if data, err := json.Marshal(k); err == nil {
		_ = hostfile.Replace(cache, data) // only a cache: without it the next start asks again
	}
	return &qemu{path, k.Version, ioUring}, nil
}

var versionLine = regexp.MustCompile(`^QEMU emulator version (([0-9]+)\.([0-9]+)\S*(?: \([^)\n]*\))?)`)

func parseVersion(out []byte) (string, error) {
	m := versionLine.FindSubmatch(bytes.TrimSpace(out))
	if m == nil {
		return "", fmt.Errorf("version not understood: %q", out)
	}
	major, _ := strconv.Atoi(string(m[2]))
	minor, _ := strconv.Atoi(string(m[3]))
	if major < 7 || major == 7 && minor < 2 {
		return "", fmt.Errorf("version %s is too old, 7.2 is needed: apt-get install qemu-system-x86", m[1])
	}
	return string(m[1]), nil
}

// A hardware is everything that QEMU's command line depends on. Numbers are file descriptors in the QEMU process.
type hardware struct {
	machine []string // -M and -global values, of the boot package
	globals []string
	accel   string
	memory  spec.Bytes
	cpus    int

	kernel, initramfs     int
	args                  string // of the kernel
	control, qmp, console int
	places                []place
	ram                   int  // a file to map, 0: anonymous memory
	ramShared             bool // the guest's writes go into that file
	incoming              bool // wait for a template's state
	tap                   int  // 0: a hub, which user networking is plugged into later
	mac                   string
	shares                string // directory of the 9p device
	virtiofs              int    // connected socket of the daemon, 0: none
	pageReporting         bool
}

// templateMAC is what the guest of a template sees until it is told its own.
const templateMAC = "52:54:00:c7:ad:1e"

// VirtiofsTag is the mount tag of a machine's one virtiofs device.
const VirtiofsTag = "cradle-fs"

// arguments is QEMU's command line.
func (h *hardware) arguments() []string {
	a := []string{
		"-name", "cradle", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		// Of a page that the host's kernel has merged with another machine's, writing tells by the time it takes what is in that one.
		"-M", strings.Join(append(slices.Clone(h.machine), "memory-backend=mem", "mem-merge=off"), ","),
	}
	for _, g := range h.globals {
		a = append(a, "-global", g)
	}
	a = append(a, "-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
		"-accel", h.accelerator(), "-cpu", cpuModel(h.accel), "-smp", strconv.Itoa(h.cpus), "-m", fmt.Sprintf("%dM", h.memory>>20))
	memory := fmt.Sprintf("memory-backend-ram,id=mem,size=%d", h.memory)
	switch {
	case h.virtiofs != 0: // the daemon maps it as well
		memory = fmt.Sprintf("memory-backend-memfd,id=mem,size=%d,share=on", h.memory)
	case h.ram != 0:
		memory = fmt.Sprintf("memory-backend-file,id=mem,size=%d,mem-path=/proc/self/fd/%d,share=%s", h.memory, h.ram, onOff(h.ramShared))
	}
	a = append(a, "-object", memory)
	if !h.incoming { // a template's memory has the kernel already
		a = append(a, "-kernel", fmt.Sprintf("/proc/self/fd/%d", h.kernel), "-initrd", fmt.Sprintf("/proc/self/fd/%d", h.initramfs),
			"-append", h.args)
	}
	a = append(a,
		"-chardev", fmt.Sprintf("socket,id=console,fd=%d,server=on,wait=off", h.console), "-serial", "chardev:console",
		"-chardev", fmt.Sprintf("socket,id=qmp,fd=%d,server=on,wait=off", h.qmp), "-mon", "chardev=qmp,mode=control",
		"-device", "virtio-serial-device",
		"-chardev", fmt.Sprintf("socket,id=control,fd=%d,server=on,wait=off", h.control),
		"-device", "virtserialport,id=control,chardev=control,name="+wire.PortName,
		"-device", "virtio-scsi-device,id=scsi")
	for lun, p := range h.places {
		a = append(a, p.arguments(lun)...)
	}
	a = append(a,
		"-device", "virtio-rng-device",
		"-device", "virtio-balloon-device,free-page-reporting="+onOff(h.pageReporting))
	if h.tap != 0 {
		a = append(a, "-netdev", fmt.Sprintf("tap,id=net,fd=%d,vhost=off", h.tap))
	} else {
		a = append(a, "-netdev", "hubport,id=net,hubid=0")
	}
	a = append(a, "-device", "virtio-net-device,netdev=net,guest_announce=off,mac="+h.mac)
	a = append(a, "-fsdev", "local,id=shares,path="+h.shares+",security_model=passthrough,multidevs=remap",
		"-device", "virtio-9p-device,fsdev=shares,mount_tag="+wire.ShareTag)
	if h.virtiofs != 0 {
		a = append(a, "-chardev", fmt.Sprintf("socket,id=virtiofs,fd=%d", h.virtiofs),
			"-device", "vhost-user-fs-device,chardev=virtiofs,tag="+VirtiofsTag)
	}
	if h.incoming {
		a = append(a, "-S", "-incoming", "defer")
	}
	return a
}

// accelerator bounds the memory that an emulated machine takes for translated code, which by default is 1 GiB whatever the machine's own is. With 32 MiB
// for a processor, setting up a MariaDB server takes as long as with 1 GiB; with 16 it takes half as long again. What a pod has executed when it has
// booted and started its container takes 52 MiB: with less, all of it is thrown away on the way, and much is translated again.
func (h *hardware) accelerator() string {
	if h.accel != TCG {
		return h.accel
	}
	least := 32
	if !h.incoming {
		least = 64
	}
	return fmt.Sprintf("%s,tb-size=%d", h.accel, min(max(int(h.memory>>23), least*h.cpus), 1024))
}

// cpuModel is all that the accelerator can do. Emulated, string instructions cost per element: without the promise of fast ones, kernel
// and Go copy by words instead of bytes, which makes moving data through the guest two to six times as fast.
func cpuModel(accel string) string {
	if accel == KVM {
		return "host"
	}
	return "max,-erms,-fsrm"
}

func onOff(b bool) string {
	if b {
		return "on"
	}
	return "off"
}

// kernelArgs adds what depends on the host to the boot package's arguments.
func kernelArgs(args []string, accel string, tscKHz int64) string {
	args = append(slices.Clone(args), fmt.Sprintf("tsc_early_khz=%d", tscKHz))
	if accel == TCG {
		args = append(args, "mitigations=off") // there is nothing to leak from
	}
	return strings.Join(args, " ")
}
