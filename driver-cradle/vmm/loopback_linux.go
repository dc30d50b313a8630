package vmm

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// QEMU's user network connects to the host's loopback interface for a guest that asks for the gateway's address, or simply for
// 127.0.0.1, and has no option against it. Services that listen there trust whoever can reach them. So QEMU is put into a cgroup whose
// programs refuse connections and datagrams to it, except replies to who has sent a datagram to a published port.
//
// One such cgroup serves all machines that have the same parent: a cgroup of each machine's own would be left behind by each process
// that is killed. Whoever sees a machine end removes it if that was the last one. A lock on it keeps it from being removed before the
// machine that it was opened for is in it.

// loopbackGroup is its name; another number for other programs.
const loopbackGroup = "cradle-user-network.1"

// Offsets in struct bpf_sock_addr (linux/bpf.h).
const (
	addrIP4  = 4
	addrIP6  = 8
	addrPort = 24
)

// noLoopback opens the cgroup below parent ("" is this process's own cgroup) that has no way to the host's loopback interface. It is
// there until the file is closed, and as long as a process is in it.
func noLoopback(parent string) (*os.File, error) {
	g, err := openNoLoopback(parent)
	if err != nil {
		return nil, fmt.Errorf("user network: keep the guest from the host's loopback interface: %w: it takes cgroup v2 and BPF; use network mode netns or none without them", err)
	}
	return g, nil
}

func openNoLoopback(parent string) (_ *os.File, err error) {
	if parent == "" {
		if parent, err = ownCgroup(); err != nil {
			return nil, err
		}
	}
	path := filepath.Join(parent, loopbackGroup)
	for {
		if err := os.Mkdir(path, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return nil, err
		}
		g, err := lockGroup(path, unix.LOCK_EX)
		if errors.Is(err, fs.ErrNotExist) {
			continue // the last machine of another process has ended just now
		}
		if err != nil {
			return nil, err
		}
		if err := guard(g); err != nil {
			g.Close()
			return nil, err
		}
		return g, nil
	}
}

// lockGroup opens the cgroup at path and locks it until the file is closed.
func lockGroup(path string, how int) (*os.File, error) {
	g, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	err = flock(g, how)
	if err == nil { // it may have been removed, and made again, before it was locked
		var there, locked os.FileInfo
		if locked, err = g.Stat(); err == nil {
			if there, err = os.Stat(path); err == nil && !os.SameFile(there, locked) {
				err = fs.ErrNotExist
			}
		}
	}
	if err != nil {
		g.Close()
		return nil, err
	}
	return g, nil
}

func flock(f *os.File, how int) error {
	for {
		if err := unix.Flock(int(f.Fd()), how); !errors.Is(err, unix.EINTR) {
			return os.NewSyscallError("flock", err)
		}
	}
}

// removeGroup removes the cgroup at path unless somebody uses it or is about to.
func removeGroup(path string) {
	g, err := lockGroup(path, unix.LOCK_EX|unix.LOCK_NB)
	if err != nil {
		return // who has it locked puts a machine into it, whose end is the next occasion
	}
	defer g.Close()
	_ = os.Remove(path) // busy as long as a process is in it
}

// ownCgroup is the directory of this process's cgroup, version 2.
func ownCgroup() (string, error) {
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return "", err
	}
	groups, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(mounts)) {
		// id parent major:minor root mountpoint options… - type source options (proc(5))
		before, after, _ := strings.Cut(line, " - ")
		fields := strings.Fields(before)
		if len(fields) < 5 || !strings.HasPrefix(after, "cgroup2 ") {
			continue
		}
		for group := range strings.Lines(string(groups)) {
			if name, ok := strings.CutPrefix(strings.TrimSpace(group), "0::"); ok {
				rel, err := filepath.Rel(fields[3], name)
				if err != nil || strings.HasPrefix(rel, "..") {
					return "", fmt.Errorf("cgroup %s is outside of what is mounted", name)
				}
				return filepath.Join(fields[4], rel), nil
			}
		}
	}
	return "", errors.New("cgroup v2 is not mounted")
}

// guard attaches the programs to a cgroup that is locked, unless they are attached.
func guard(g *os.File) error {
	var missing []guardProgram
	for _, p := range guardPrograms {
		got, err := link.QueryPrograms(link.QueryOptions{Target: int(g.Fd()), Attach: p.attach})
		if err != nil {
			return err
		}
		if len(got.Programs) == 0 {
			missing = append(missing, p)
		}
	}
	if len(missing) == 0 {
		return nil
	}
	// Peers on the loopback interface that have sent a datagram: cookie of the socket, address, port.
	peers, err := ebpf.NewMap(&ebpf.MapSpec{Name: "cradle_peers", Type: ebpf.LRUHash, KeySize: 16, ValueSize: 1, MaxEntries: 4096})
	if err != nil {
		return err
	}
	defer peers.Close()
	for _, p := range missing {
		prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
			Name: p.name, Type: ebpf.CGroupSockAddr, AttachType: p.attach, Instructions: p.code(peers.FD()), License: "Apache-2.0",
		})
		if err != nil {
			return fmt.Errorf("program %s: %w", p.name, err)
		}
		err = link.RawAttachProgram(link.RawAttachProgramOptions{
			Target: int(g.Fd()), Program: prog, Attach: p.attach, Flags: unix.BPF_F_ALLOW_MULTI,
		})
		if err = errors.Join(err, prog.Close()); err != nil {
			return fmt.Errorf("attach %s: %w", p.name, err)
		}
	}
	return nil
}

type guardProgram struct {
	name   string
	attach ebpf.AttachType
	code   func(peers int) asm.Instructions
}

// Receiving comes first: whoever finds a part missing adds all that is missing, with one map for both.
var guardPrograms = []guardProgram{
	{"cradle_recv4", ebpf.AttachCGroupUDP4Recvmsg, rememberPeer},
	{"cradle_send4", ebpf.AttachCGroupUDP4Sendmsg, func(peers int) asm.Instructions { return refuse4(replyTo(peers)) }},
	{"cradle_conn4", ebpf.AttachCGroupInet4Connect, func(int) asm.Instructions { return refuse4(verdict("refuse", 0)) }},
	{"cradle_conn6", ebpf.AttachCGroupInet6Connect, func(int) asm.Instructions { return refuse6() }},
	{"cradle_send6", ebpf.AttachCGroupUDP6Sendmsg, func(int) asm.Instructions { return refuse6() }},
}

func verdict(symbol string, v int32) asm.Instructions {
	return asm.Instructions{asm.Mov.Imm(asm.R0, v).WithSymbol(symbol), asm.Return()}
}

// refuse4 allows what is neither in 127.0.0.0/8 nor in 0.0.0.0/8, which the kernel takes for the host itself, and leaves the rest to the
// instructions at "refuse". Addresses are in network byte order, so the first octet of a word on a little-endian machine is the lowest.
func refuse4(rest asm.Instructions) asm.Instructions {
	code := asm.Instructions{
		asm.Mov.Reg(asm.R6, asm.R1),
		asm.LoadMem(asm.R2, asm.R6, addrIP4, asm.Word),
		asm.And.Imm(asm.R2, 0xff),
		asm.JEq.Imm(asm.R2, 127, "refuse"),
		asm.JEq.Imm(asm.R2, 0, "refuse"),
	}
	code = append(code, verdict("allow", 1)...)
	return append(code, rest...)
}

// refuse6 refuses ::1, ::, and IPv4 addresses in IPv6's clothes as refuse4 does.
func refuse6() asm.Instructions {
	mapped := int32(binary.LittleEndian.Uint32([]byte{0, 0, 0xff, 0xff}))
	code := asm.Instructions{
		asm.LoadMem(asm.R2, asm.R1, addrIP6, asm.Word),
		asm.JNE.Imm(asm.R2, 0, "allow"),
		asm.LoadMem(asm.R2, asm.R1, addrIP6+4, asm.Word),
		asm.JNE.Imm(asm.R2, 0, "allow"),
		asm.LoadMem(asm.R2, asm.R1, addrIP6+8, asm.Word),
		asm.JEq.Imm(asm.R2, 0, "refuse"), // ::1, :: and the long forgotten ::a.b.c.d
		asm.JNE.Imm32(asm.R2, mapped, "allow"),
		asm.LoadMem(asm.R2, asm.R1, addrIP6+12, asm.Word),
		asm.And.Imm(asm.R2, 0xff),
		asm.JEq.Imm(asm.R2, 127, "refuse"),
		asm.JEq.Imm(asm.R2, 0, "refuse"),
	}
	code = append(code, verdict("allow", 1)...)
	return append(code, verdict("refuse", 0)...)
}

// peerKey puts cookie, address and port of the context in R6 into the 16 bytes below the frame pointer.
func peerKey() asm.Instructions {
	return asm.Instructions{
		asm.Mov.Reg(asm.R1, asm.R6).WithSymbol("refuse"),
		asm.FnGetSocketCookie.Call(),
		asm.StoreMem(asm.RFP, -16, asm.R0, asm.DWord),
		asm.LoadMem(asm.R2, asm.R6, addrIP4, asm.Word),
		asm.StoreMem(asm.RFP, -8, asm.R2, asm.Word),
		asm.LoadMem(asm.R2, asm.R6, addrPort, asm.Word),
		asm.StoreMem(asm.RFP, -4, asm.R2, asm.Word),
		asm.Mov.Reg(asm.R2, asm.RFP),
		asm.Add.Imm(asm.R2, -16),
	}
}

// replyTo allows peers that are in the map.
func replyTo(peers int) asm.Instructions {
	return append(peerKey(),
		asm.LoadMapPtr(asm.R1, peers),
		asm.FnMapLookupElem.Call(),
		asm.JNE.Imm(asm.R0, 0, "known"),
		asm.Mov.Imm(asm.R0, 0),
		asm.Return(),
		asm.Mov.Imm(asm.R0, 1).WithSymbol("known"),
		asm.Return(),
	)
}

// rememberPeer puts the sender of a datagram into the map if it is on the loopback interface. Receiving is always allowed.
func rememberPeer(peers int) asm.Instructions {
	return refuse4(append(peerKey(),
		asm.StoreImm(asm.RFP, -24, 1, asm.Byte),
		asm.Mov.Reg(asm.R3, asm.RFP),
		asm.Add.Imm(asm.R3, -24),
		asm.Mov.Imm(asm.R4, 0), // BPF_ANY
		asm.LoadMapPtr(asm.R1, peers),
		asm.FnMapUpdateElem.Call(),
		asm.Mov.Imm(asm.R0, 1),
		asm.Return(),
	))
}
