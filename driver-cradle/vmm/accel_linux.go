package vmm

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/driver-cradle/hostfile"
)

// ErrNoKVM is part of the error of a start that insists on KVM where that is of no use.
var ErrNoKVM = errors.New("kvm is not usable")

const kvmDevice = "/dev/kvm"

// accelerator decides between KVM and TCG. A /dev/kvm says little: where KVM itself is emulated it opens, answers, runs a few
// instructions, and no kernel ever boots. So its speed is measured.
func (c *Config) accelerator() (accel, why string, err error) {
	if c.Accel == TCG {
		return TCG, "asked for", nil
	}
	err = usableKVM(c.CacheDir)
	switch {
	case err == nil:
		return KVM, "", nil
	case c.Accel == KVM:
		return "", "", fmt.Errorf("start machine: %w: %w: let the accelerator be auto or tcg", ErrNoKVM, err)
	default:
		return TCG, err.Error(), nil
	}
}

// Requests of Linux's include/uapi/linux/kvm.h, on amd64.
const (
	kvmGetAPIVersion       = 0xae00
	kvmCreateVM            = 0xae01
	kvmGetVCPUMmapSize     = 0xae04
	kvmCreateVCPU          = 0xae41
	kvmSetUserMemoryRegion = 0x4020ae46
	kvmRun                 = 0xae80
	kvmSetRegs             = 0x4090ae82
	kvmGetSregs            = 0x8138ae83
	kvmSetSregs            = 0x4138ae84

	kvmAPIVersion = 12
	kvmExitHLT    = 5
)

// usableKVM is nil where KVM is worth using. What takes time is measured once in a boot of the host.
func usableKVM(cacheDir string) error {
	fd, err := unix.Open(kvmDevice, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open %s: %w", kvmDevice, err)
	}
	defer unix.Close(fd)
	if v, err := unix.IoctlRetInt(fd, kvmGetAPIVersion); err != nil || v != kvmAPIVersion {
		return fmt.Errorf("%s has API version %d, not %d", kvmDevice, v, kvmAPIVersion)
	}
	flags, err := cpuInfo("flags")
	if err != nil {
		return err
	}
	if f := strings.Fields(flags); !slices.Contains(f, "vmx") && !slices.Contains(f, "svm") {
		return errors.New("the processor has neither vmx nor svm: this kvm is emulated")
	}
	boot, err := bootID()
	if err != nil {
		return err
	}
	type measured struct{ BootID, Failure string }
	var m measured
	cache := filepath.Join(cacheDir, "kvm.json")
	data, err := os.ReadFile(cache)
	if err != nil || json.Unmarshal(data, &m) != nil || m.BootID != boot {
		m = measured{BootID: boot}
		if err := measureKVM(); err != nil {
			m.Failure = err.Error()
		}
		if data, err := json.Marshal(m); err == nil {
			_ = hostfile.Replace(cache, data) // only a cache
		}
	}
	if m.Failure != "" {
		return errors.New(m.Failure)
	}
	return nil
}

// cpuInfo is a field of the first processor in /proc/cpuinfo.
func cpuInfo(field string) (string, error) {
	data, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(data)) {
		if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == field {
			return strings.TrimSpace(value), nil
		}
	}
	return "", nil
}

// hostCPU names what -cpu host means here.
func hostCPU() (string, error) {
	s := "host"
	for _, field := range []string{"model name", "stepping", "microcode", "flags"} {
		v, err := cpuInfo(field)
		if err != nil {
			return "", err
		}
		s += "\x00" + v
	}
	return s, nil
}

// A usable KVM takes some 20 µs for kvmLoops; one that is emulated was seen to take 10 ms.
const (
	kvmLoops = 2000
	kvmLimit = time.Millisecond
	kvmBound = 5 * time.Second
)

// measureName is the name under which Confine recognises that this program was executed to measure KVM. It is a process of its own
// because nothing but a kill ends a guest that an emulated KVM loses its way in.
const measureName = "cradle-measure-kvm"

func measureKVM() error {
	ctx, cancel := context.WithTimeout(context.Background(), kvmBound)
	defer cancel()
	cmd := exec.CommandContext(ctx, "/proc/self/exe")
	cmd.Args = []string{measureName}
	var out bytes.Buffer
	cmd.Stderr = &out
	err := cmd.Run()
	if ctx.Err() != nil {
		return fmt.Errorf("kvm does not finish %d loops within %v", kvmLoops, kvmBound)
	}
	if err != nil {
		return errors.New(strings.TrimPrefix(lastLines(out.String(), 1), measureName+": "))
	}
	return nil
}

// timeKVM fails where the guest loop takes too long, at the best of three.
func timeKVM() error {
	runtime.LockOSThread()
	g, err := newLoopGuest()
	if err != nil {
		return err
	}
	best := time.Duration(1 << 62)
	for range 3 {
		took, err := g.run(kvmLoops)
		if err != nil {
			return err
		}
		best = min(best, took)
	}
	if best > kvmLimit {
		return fmt.Errorf("%d loops take %v, more than %v: this kvm is emulated", kvmLoops, best.Round(time.Microsecond), kvmLimit)
	}
	return nil
}

type kvmSegment struct {
	Base                                                uint64
	Limit                                               uint32
	Selector                                            uint16
	Type, Present, DPL, DB, S, L, G, AVL, Unusable, Pad uint8
}

type kvmTable struct {
	Base  uint64
	Limit uint16
	_     [3]uint16
}

type kvmSregs struct {
	CS, DS, ES, FS, GS, SS, TR, LDT kvmSegment
	GDT, IDT                        kvmTable
	CR0, CR2, CR3, CR4, CR8         uint64
	EFER, APICBase                  uint64
	Interrupts                      [4]uint64
}

type kvmRegs struct {
	RAX, RBX, RCX, RDX, RSI, RDI, RSP, RBP, R8, R9, R10, R11, R12, R13, R14, R15, RIP, RFLAGS uint64
}

type kvmMemoryRegion struct {
	Slot, Flags                     uint32
	GuestAddress, Size, UserAddress uint64
}

// loopCode counts ECX down in real mode and halts.
var loopCode = []byte{
	0x66, 0x49, // dec ecx
	0x75, 0xfc, // jnz -4
	0xf4, // hlt
}

const loopAddress = 0x1000

// A loopGuest is a virtual machine of five instructions. The process that makes one ends soon.
type loopGuest struct {
	vcpu int
	page []byte // struct kvm_run
}

func newLoopGuest() (*loopGuest, error) {
	kvm, err := unix.Open(kvmDevice, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", kvmDevice, err)
	}
	vm, err := unix.IoctlRetInt(kvm, kvmCreateVM)
	if err != nil {
		return nil, fmt.Errorf("create a virtual machine: %w", err)
	}
	mem, err := unix.Mmap(-1, 0, 2*loopAddress, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_ANON)
	if err != nil {
		return nil, fmt.Errorf("map memory: %w", err)
	}
	copy(mem[loopAddress:], loopCode)
	region := kvmMemoryRegion{Size: uint64(len(mem)), UserAddress: uint64(uintptr(unsafe.Pointer(&mem[0])))}
	if err := ioctl(vm, kvmSetUserMemoryRegion, unsafe.Pointer(&region)); err != nil {
		return nil, fmt.Errorf("set memory: %w", err)
	}
	vcpu, err := unix.IoctlRetInt(vm, kvmCreateVCPU)
	if err != nil {
		return nil, fmt.Errorf("create a processor: %w", err)
	}
	size, err := unix.IoctlRetInt(kvm, kvmGetVCPUMmapSize)
	if err != nil {
		return nil, fmt.Errorf("size of a processor: %w", err)
	}
	page, err := unix.Mmap(vcpu, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map processor: %w", err)
	}
	var s kvmSregs
	if err := ioctl(vcpu, kvmGetSregs, unsafe.Pointer(&s)); err != nil {
		return nil, fmt.Errorf("get segments: %w", err)
	}
	s.CS.Base, s.CS.Selector = 0, 0
	if err := ioctl(vcpu, kvmSetSregs, unsafe.Pointer(&s)); err != nil {
		return nil, fmt.Errorf("set segments: %w", err)
	}
	return &loopGuest{vcpu, page}, nil
}

func (g *loopGuest) run(loops uint64) (time.Duration, error) {
	r := kvmRegs{RIP: loopAddress, RCX: loops, RFLAGS: 2}
	if err := ioctl(g.vcpu, kvmSetRegs, unsafe.Pointer(&r)); err != nil {
		return 0, fmt.Errorf("set registers: %w", err)
	}
	began := time.Now()
	for {
		err := ioctl(g.vcpu, kvmRun, nil)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return 0, fmt.Errorf("run: %w", err)
		}
		break
	}
	took := time.Since(began)
	if reason := binary.NativeEndian.Uint32(g.page[8:]); reason != kvmExitHLT {
		return 0, fmt.Errorf("the loop ended for reason %d, not by its halt", reason)
	}
	return took, nil
}

func ioctl(fd int, request uintptr, arg unsafe.Pointer) error {
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, uintptr(arg)); errno != 0 {
		return errno
	}
	return nil
}
