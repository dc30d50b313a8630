package boot

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"

	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
)

const (
	maxKernel = 512 << 20 // unpacked
	maxModule = 64 << 20
)

// readKernel reads an ELF kernel, or takes the one out of a bzImage (Documentation/arch/x86/boot.rst, protocol 2.08).
func readKernel(name string) ([]byte, error) {
	data, err := os.ReadFile(name)
	if err != nil {
		return nil, err
	}
	if bytes.HasPrefix(data, []byte("\x7fELF")) {
		return data, nil
	}
	if len(data) < 0x250 || string(data[0x202:0x206]) != "HdrS" || binary.LittleEndian.Uint16(data[0x206:]) < 0x208 {
		return nil, fmt.Errorf("kernel %s is neither an ELF image nor a bzImage", name)
	}
	setup := (int64(data[0x1f1]) + 1) * 512
	start := setup + int64(binary.LittleEndian.Uint32(data[0x248:]))
	end := start + int64(binary.LittleEndian.Uint32(data[0x24c:]))
	if start >= end || end > int64(len(data)) || end-start < 8 {
		return nil, fmt.Errorf("kernel %s: its header points outside of the file", name)
	}
	// The build appends the unpacked size, four bytes that are no part of the compressed stream.
	elf, err := decompress(data[start:end-4], maxKernel)
	if err != nil {
		return nil, fmt.Errorf("kernel %s: %w", name, err)
	}
	if !bytes.HasPrefix(elf, []byte("\x7fELF")) {
		return nil, fmt.Errorf("kernel %s does not hold an ELF image", name)
	}
	return elf, nil
}

// decompress unpacks what begins with the magic of a format that kernels and modules come in; anything else is returned as it is.
func decompress(data []byte, limit int64) ([]byte, error) {
	var r io.Reader
	switch {
	case bytes.HasPrefix(data, []byte("\x1f\x8b")):
		z, err := gzip.NewReader(bytes.NewReader(data))
		if err != nil {
			return nil, err
		}
		z.Multistream(false)
		r = z
	case bytes.HasPrefix(data, []byte("\x28\xb5\x2f\xfd")):
		z, err := zstd.NewReader(bytes.NewReader(data), zstd.WithDecoderMaxWindow(1<<28))
		if err != nil {
			return nil, err
		}
		defer z.Close()
		r = z
	case bytes.HasPrefix(data, []byte("\x02\x21\x4c\x18")):
		r = lz4.NewReader(bytes.NewReader(data))
	case bytes.HasPrefix(data, []byte("\xfd7zXZ\x00")):
		// The kernel's xz streams use the x86 filter, which no Go library has.
		xz, err := exec.LookPath("xz")
		if err != nil {
			return nil, errors.New("xz is missing: apt-get install xz-utils")
		}
		cmd := exec.Command(xz, "--decompress", "--stdout", "--memlimit=1GiB")
		cmd.Stdin = bytes.NewReader(data)
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		out, err := cmd.Output()
		if err != nil {
			return nil, fmt.Errorf("xz: %w: %s", err, bytes.TrimSpace(stderr.Bytes()))
		}
		return out, nil
	default:
		return data, nil
	}
	out, err := io.ReadAll(io.LimitReader(r, limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(out)) > limit {
		return nil, fmt.Errorf("unpacks to more than %d bytes", limit)
	}
	return out, nil
}

// A moduleFile lies in the initramfs as modules/NAME; names begin with a number, in the order in which they load.
type moduleFile struct {
	name string
	data []byte
}

// What a distribution's kernel has as modules and a guest needs, in no special order. The second list is taken where it exists:
// a cloud kernel has no 9p, so shared directories need virtiofs there.
var (
	neededModules   = []string{"virtio_mmio", "virtio_console", "virtio_scsi", "sd_mod", "virtio_net", "ext4", "overlay"}
	optionalModules = []string{
		"virtio_balloon", "virtio_rng", "9p", "9pnet_virtio", "fuse", "virtiofs", "xfs", "nfs", "nfsv3", "nfsv4", "ceph", "erofs",
		"tun", "veth", "bridge", "dummy", "nf_tables", "nft_compat", "nft_chain_nat", "nft_masq", "ip_tables", "iptable_nat", "iptable_filter",
		"xt_conntrack", "xt_comment", "xt_addrtype", "xt_MASQUERADE", "af_packet", "unix_diag", "tcp_diag", "algif_hash",
	}
)

// stockModules collects the modules with what they depend on from /lib/modules/VERSION.
func stockModules(dir string) ([]moduleFile, error) {
	if dir == "" {
		return nil, errors.New("no module directory: apt-get install linux-image-cloud-amd64, then give /lib/modules/VERSION")
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, fmt.Errorf("modules: %w: apt-get install linux-image-cloud-amd64", err)
	}
	defer root.Close()
	deps, err := readDeps(root)
	if err != nil {
		return nil, err
	}
	builtin, err := readBuiltin(root)
	if err != nil {
		return nil, err
	}
	byName := map[string]string{}
	for p := range deps {
		byName[moduleName(p)] = p
	}
	var files []moduleFile
	done := map[string]bool{}
	var add func(p string) error
	add = func(p string) error {
		if done[p] {
			return nil
		}
		done[p] = true
		// modules.dep names all dependencies, nearest first.
		for i := len(deps[p]) - 1; i >= 0; i-- {
			if err := add(deps[p][i]); err != nil {
				return err
			}
		}
		f, err := root.Open(p)
		if err != nil {
			return err
		}
		defer f.Close()
		data, err := io.ReadAll(io.LimitReader(f, maxModule))
		if err != nil {
			return err
		}
		if data, err = decompress(data, maxModule); err != nil {
			return fmt.Errorf("module %s: %w", p, err)
		}
		files = append(files, moduleFile{fmt.Sprintf("%03d-%s.ko", len(files), moduleName(p)), data})
		return nil
	}
	for i, names := range [][]string{neededModules, optionalModules} {
		for _, n := range names {
			n = strings.ReplaceAll(n, "-", "_")
			p, ok := byName[n]
			if !ok {
				if i == 0 && !builtin[n] {
					return nil, fmt.Errorf("the kernel of %s has no module %s", dir, n)
				}
				continue
			}
			if err := add(p); err != nil {
				return nil, err
			}
		}
	}
	return files, nil
}

func moduleName(p string) string {
	name, _, _ := strings.Cut(path.Base(p), ".")
	return strings.ReplaceAll(name, "-", "_")
}

func readDeps(root *os.Root) (map[string][]string, error) {
	deps := map[string][]string{}
	err := eachLine(root, "modules.dep", func(line string) error {
		p, rest, ok := strings.Cut(line, ":")
		if !ok {
			return fmt.Errorf("modules.dep: no colon in %q", line)
		}
		deps[p] = strings.Fields(rest)
		return nil
	})
	return deps, err
}

func readBuiltin(root *os.Root) (map[string]bool, error) {
	names := map[string]bool{}
	err := eachLine(root, "modules.builtin", func(line string) error {
		names[moduleName(line)] = true
		return nil
	})
	return names, err
}

func eachLine(root *os.Root, name string, f func(string) error) error {
	file, err := root.Open(name)
	if err != nil {
		return fmt.Errorf("modules: %w (is %s complete? run depmod)", err, filepath.Clean(root.Name()))
	}
	defer file.Close()
	s := bufio.NewScanner(io.LimitReader(file, 64<<20))
	s.Buffer(nil, 1<<20)
	for s.Scan() {
		if s.Text() == "" {
			continue
		}
		if err := f(s.Text()); err != nil {
			return err
		}
	}
	return s.Err()
}
