// Command agent is the PID 1 of this package's tests: it answers the host as cradle-init does, and does in the guest what a test asks for.
package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/driver-cradle/wire"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "agent:", err)
		os.Exit(1)
	}
}

func run() error {
	for _, m := range [][2]string{{"devtmpfs", "/dev"}, {"proc", "/proc"}, {"sysfs", "/sys"}} {
		if err := unix.Mount(m[0], m[1], m[0], 0, ""); err != nil {
			return fmt.Errorf("mount %s: %w", m[1], err)
		}
	}
	if cmdline, _ := os.ReadFile("/proc/cmdline"); bytes.Contains(cmdline, []byte("agent=hang")) {
		if console, err := os.OpenFile("/dev/console", os.O_WRONLY, 0); err == nil {
			fmt.Fprintln(console, "agent: hanging")
		}
		unix.Pause()
	}
	if err := loadModules(); err != nil {
		return err
	}
	var port *wire.Port
	var err error
	for range 6000 {
		if port, err = wire.OpenPort(); err == nil {
			break
		}
		time.Sleep(10 * time.Millisecond) // modules announce their devices when they like
	}
	if err != nil {
		return err
	}
	server := &http.Server{Handler: handler()}
	for {
		if err := port.Wait(); err != nil {
			return err
		}
		s, err := wire.Accept(port, becomeIndividual)
		if err != nil {
			continue
		}
		server.Serve(s)
	}
}

// loadModules loads what a stock boot package brings, in its order.
func loadModules() error {
	names, _ := filepath.Glob("/modules/*.ko")
	sort.Strings(names)
	for _, n := range names {
		f, err := os.Open(n)
		if err != nil {
			return err
		}
		err = unix.FinitModule(int(f.Fd()), "", 0)
		f.Close()
		if err != nil && err != unix.EEXIST {
			return fmt.Errorf("load %s: %w", n, err)
		}
	}
	return nil
}

func handler() http.Handler {
	mux := http.NewServeMux()
	for name, f := range map[string]func(r *http.Request) (any, error){
		"disks": func(*http.Request) (any, error) { return disks() },
		"read":  func(r *http.Request) (any, error) { return readDisk(r.FormValue("lun")) },
		"write": func(r *http.Request) (any, error) { return nil, writeDisk(r.FormValue("lun"), r.FormValue("text")) },
		"fill":  func(r *http.Request) (any, error) { return nil, fillDisk(r.FormValue("lun"), r.FormValue("mib")) },
		"delete": func(r *http.Request) (any, error) {
			return nil, os.WriteFile(scsi(r.FormValue("lun"))+"/delete", []byte("1"), 0)
		},
		"rescan": func(r *http.Request) (any, error) {
			return nil, os.WriteFile(scsi(r.FormValue("lun"))+"/rescan", []byte("1"), 0)
		},
		"random": func(*http.Request) (any, error) { b := make([]byte, 32); unix.Getrandom(b, 0); return b, nil },
		"uuid": func(*http.Request) (any, error) {
			b, err := os.ReadFile("/proc/sys/kernel/random/uuid")
			return strings.TrimSpace(string(b)), err
		},
		"bootid": func(*http.Request) (any, error) {
			b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
			return strings.TrimSpace(string(b)), err
		},
		"time":  func(*http.Request) (any, error) { return time.Now(), nil },
		"keep":  func(r *http.Request) (any, error) { kept = append(kept, r.FormValue("text")); return nil, nil },
		"dirty": func(r *http.Request) (any, error) { return nil, dirty(r.FormValue("mib"), r.FormValue("keep") != "") },
		"free":  func(*http.Request) (any, error) { return nil, free(dirtied) },
		"9p": func(r *http.Request) (any, error) {
			return nil, mountAll(wire.ShareTag, "9p", "trans=virtio,version=9p2000.L,msize=131072")
		},
		"fs":   func(r *http.Request) (any, error) { return nil, mountAll("cradle-fs", "virtiofs", "") },
		"file": func(r *http.Request) (any, error) { b, err := os.ReadFile(r.FormValue("path")); return string(b), err },
		"put":  func(r *http.Request) (any, error) { return nil, put(r) },
		"mknod": func(r *http.Request) (any, error) {
			return nil, unix.Mknod(r.FormValue("path"), unix.S_IFBLK|0o600, int(unix.Mkdev(8, 0)))
		},
		"memory": func(*http.Request) (any, error) { b, err := os.ReadFile("/proc/meminfo"); return string(b), err },
		"net":    func(r *http.Request) (any, error) { return nil, network() },
		"dial": func(r *http.Request) (any, error) {
			return dial(r.FormValue("network"), r.FormValue("address"), r.FormValue("text"))
		},
		"listen": func(r *http.Request) (any, error) { return nil, echo(r.FormValue("network"), r.FormValue("address")) },
		"sysrq": func(r *http.Request) (any, error) {
			return nil, os.WriteFile("/proc/sysrq-trigger", []byte(r.FormValue("key")), 0)
		},
		"restart": func(*http.Request) (any, error) { return nil, unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART) },
		"console": func(r *http.Request) (any, error) { return nil, flood(r.FormValue("kib")) },
		"panic":   func(*http.Request) (any, error) { os.Exit(3); return nil, nil },
	} {
		mux.HandleFunc("POST /test/"+name, func(w http.ResponseWriter, r *http.Request) {
			v, err := f(r)
			if err != nil {
				http.Error(w, err.Error(), http.StatusInternalServerError)
				return
			}
			json.NewEncoder(w).Encode(v)
		})
	}
	return mux
}

func becomeIndividual(b *wire.Birth) error {
	tv := unix.NsecToTimeval(b.Time.UnixNano())
	if err := unix.Settimeofday(&tv); err != nil {
		return fmt.Errorf("settimeofday: %w", err)
	}
	f, err := os.OpenFile("/dev/urandom", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	// struct rand_pool_info: bits, bytes, data (linux/random.h)
	var info bytes.Buffer
	binary.Write(&info, binary.NativeEndian, []int32{int32(8 * len(b.Entropy)), int32(len(b.Entropy))})
	info.Write(b.Entropy[:])
	for _, c := range []struct{ req, arg uintptr }{{unix.RNDADDENTROPY, uintptr(unsafe.Pointer(&info.Bytes()[0]))}, {0x5207 /* RNDRESEEDCRNG */, 0}} {
		if _, _, e := unix.Syscall(unix.SYS_IOCTL, f.Fd(), c.req, c.arg); e != 0 {
			return fmt.Errorf("reseed: %w", e)
		}
	}
	return nil
}

func scsi(lun string) string { return "/sys/bus/scsi/devices/0:0:0:" + lun }

func disks() (map[string]int64, error) {
	sizes := map[string]int64{}
	names, err := filepath.Glob("/sys/bus/scsi/devices/0:0:0:*/block/*/size")
	for _, n := range names {
		data, err := os.ReadFile(n)
		if err != nil {
			continue
		}
		sectors, _ := strconv.ParseInt(strings.TrimSpace(string(data)), 10, 64)
		lun := strings.Split(strings.TrimPrefix(n, "/sys/bus/scsi/devices/0:0:0:"), "/")[0]
		sizes[lun] = sectors * 512
	}
	return sizes, err
}

func openDisk(lun string, flags int) (f *os.File, err error) {
	for range 6000 {
		names, _ := filepath.Glob(scsi(lun) + "/block/*")
		if len(names) == 1 {
			f, err = os.OpenFile("/dev/"+filepath.Base(names[0]), flags, 0)
			if err == nil || errors.Is(err, fs.ErrPermission) || errors.Is(err, unix.EROFS) { // else it is not there yet
				return f, err
			}
		}
		time.Sleep(10 * time.Millisecond)
	}
	return nil, fmt.Errorf("disk %s does not open: %w", lun, err)
}

func readDisk(lun string) (string, error) {
	f, err := openDisk(lun, os.O_RDONLY)
	if err != nil {
		return "", err
	}
	defer f.Close()
	b := make([]byte, 512)
	_, err = io.ReadFull(f, b)
	return strings.TrimRight(string(b), "\x00"), err
}

func writeDisk(lun, text string) error {
	f, err := openDisk(lun, os.O_RDWR|os.O_SYNC)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = f.Write(append([]byte(text), make([]byte, 512-len(text))...))
	return err
}

// fillDisk writes from the disk's beginning on.
func fillDisk(lun, mib string) error {
	n, err := strconv.Atoi(mib)
	if err != nil {
		return err
	}
	f, err := openDisk(lun, os.O_RDWR)
	if err != nil {
		return err
	}
	defer f.Close()
	for range n {
		if _, err := f.Write(bytes.Repeat([]byte("full"), 1<<18)); err != nil {
			return err
		}
		if err := f.Sync(); err != nil {
			return err
		}
	}
	return nil
}

// kept stays in the agent's memory.
var kept []string

// dirtied is what dirty has kept.
var dirtied []byte

// dirty changes as much memory as it is told to, and keeps it where it is to.
func dirty(mib string, keep bool) error {
	n, err := strconv.Atoi(mib)
	if err != nil {
		return err
	}
	b, err := unix.Mmap(-1, 0, n<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		return err
	}
	for i := 0; i < len(b); i += 4096 {
		sum := sha256.Sum256(binary.NativeEndian.AppendUint64(nil, uint64(i)))
		copy(b[i:], sum[:])
	}
	if keep {
		dirtied = b
		return nil
	}
	return free(b)
}

func free(b []byte) error {
	if err := unix.Munmap(b); err != nil {
		return err
	}
	return os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0)
}

func mountAll(tag, fstype, options string) error {
	if err := os.MkdirAll("/mnt", 0o755); err != nil {
		return err
	}
	return unix.Mount(tag, "/mnt", fstype, 0, options)
}

func put(r *http.Request) error {
	path := r.FormValue("path")
	if err := os.WriteFile(path, []byte(r.FormValue("text")), 0o600); err != nil {
		return err
	}
	uid, _ := strconv.Atoi(r.FormValue("uid"))
	return os.Chown(path, uid, uid)
}

func flood(kib string) error {
	n, err := strconv.Atoi(kib)
	if err != nil {
		return err
	}
	f, err := os.OpenFile("/dev/console", os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	for i := range n {
		if _, err := fmt.Fprintf(f, "%06d %s\n", i, strings.Repeat("x", 1016)); err != nil {
			return err
		}
	}
	return nil
}

func dial(network, address, text string) (string, error) {
	c, err := net.DialTimeout(network, address, 2*time.Second)
	if err != nil {
		return "", err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(2 * time.Second))
	if _, err := io.WriteString(c, text); err != nil {
		return "", err
	}
	b := make([]byte, 512)
	n, err := c.Read(b)
	return string(b[:n]), err
}

// echo answers with what it gets, in capitals.
func echo(network, address string) error {
	if network == "udp" {
		c, err := net.ListenPacket(network, address)
		if err != nil {
			return err
		}
		go func() {
			b := make([]byte, 512)
			for {
				n, from, err := c.ReadFrom(b)
				if err != nil {
					return
				}
				c.WriteTo(bytes.ToUpper(b[:n]), from)
			}
		}()
		return nil
	}
	l, err := net.Listen(network, address)
	if err != nil {
		return err
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			b := make([]byte, 512)
			n, _ := c.Read(b)
			c.Write(bytes.ToUpper(b[:n]))
			c.Close()
		}
	}()
	return nil
}

// network sets eth0 up as QEMU's user network expects it.
func network() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	for _, name := range []string{"lo", "eth0"} {
		ifr, _ := unix.NewIfreq(name)
		if name == "eth0" {
			for _, c := range []struct {
				req  uint
				addr [4]byte
			}{{unix.SIOCSIFADDR, [4]byte{10, 0, 2, 15}}, {unix.SIOCSIFNETMASK, [4]byte{255, 255, 255, 0}}} {
				ifr.SetInet4Addr(c.addr[:])
				if err := unix.IoctlIfreq(fd, c.req, ifr); err != nil {
					return err
				}
			}
		}
		ifr.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
		if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, ifr); err != nil {
			return err
		}
	}
	// struct rtentry (linux/route.h), default by 10.0.2.2
	var rt [120]byte
	put := func(off int, ip [4]byte) {
		binary.NativeEndian.PutUint16(rt[off:], unix.AF_INET)
		copy(rt[off+4:], ip[:])
	}
	put(8, [4]byte{})
	put(24, [4]byte{10, 0, 2, 2})
	put(40, [4]byte{})
	binary.NativeEndian.PutUint16(rt[56:], unix.RTF_UP|unix.RTF_GATEWAY)
	if _, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCADDRT, uintptr(unsafe.Pointer(&rt))); e != 0 {
		return fmt.Errorf("default route: %w", e)
	}
	return nil
}
