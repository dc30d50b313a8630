package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/cradlestack/cradlestack/test/programs"
)

// A bareMachine is the same QEMU with the same kernel and options as a pod that boots cold, but with an init of one line: the floor.
// Its command line is taken from such a pod's.
type bareMachine struct {
	qemu string
	args []string
	dir  string
}

// bareInit says that it runs and stays idle.
const bareInit = `#include <unistd.h>
int main(void) { write(1, "ready\n", 6); for (;;) pause(); }
`

// newBare boots a pod cold to see QEMU's command line, and makes the other initramfs.
func (b *bench) newBare(ctx context.Context) (*bareMachine, error) {
	image, err := programs.Image("busybox")
	if err != nil {
		return nil, err
	}
	dir, err := b.summon(ctx, alone, image, "cold", "sh", "-c", "echo up; exec sleep 1000")
	if err != nil {
		return nil, err
	}
	p, err := firstByte(ctx, b.kcradle, "run", dir)
	if err != nil {
		return nil, err
	}
	m, err := b.bareOf(dir, p.cmd.Process.Pid)
	return m, errors.Join(err, p.stop(dir, b.kcradle))
}

func (b *bench) bareOf(podDir string, launcher int) (*bareMachine, error) {
	pids, err := tree(launcher)
	if err != nil {
		return nil, err
	}
	for _, pid := range pids {
		if !isQEMU(pid) {
			continue
		}
		m := &bareMachine{dir: b.dir}
		if m.qemu, err = os.Readlink(fmt.Sprintf("/proc/%d/exe", pid)); err != nil {
			return nil, err
		}
		line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		if err != nil {
			return nil, err
		}
		initramfs, err := b.bareInitramfs()
		if err != nil {
			return nil, err
		}
		empty := filepath.Join(b.dir, "empty")
		if err := os.MkdirAll(empty, 0o755); err != nil {
			return nil, err
		}
		kernel := filepath.Join(podDir, "cradle", "vmlinux")
		if kernel, err = filepath.EvalSymlinks(kernel); err != nil {
			return nil, err
		}
		m.args, err = bareArguments(strings.Split(strings.TrimSuffix(string(line), "\x00"), "\x00")[1:], kernel, initramfs, empty)
		return m, err
	}
	return nil, errors.New("the pod's QEMU was not found")
}

// bareArguments replaces what a pod's QEMU inherited: file descriptors and the folder of shared directories.
func bareArguments(pod []string, kernel, initramfs, shares string) ([]string, error) {
	var args []string
	for i := 0; i < len(pod); i++ {
		arg := pod[i]
		if i+1 < len(pod) {
			switch value := pod[i+1]; arg {
			case "-kernel":
				args = append(args, arg, kernel)
				i++
				continue
			case "-initrd":
				args = append(args, arg, initramfs)
				i++
				continue
			case "-add-fd":
				i++
				continue
			case "-blockdev":
				value, err := bareDisk(value)
				if err != nil {
					return nil, err
				}
				args = append(args, arg, value)
				i++
				continue
			case "-chardev", "-object", "-fsdev":
				args = append(args, arg, bareValue(value, shares))
				i++
				continue
			}
		}
		args = append(args, arg)
	}
	for _, arg := range args {
		if strings.Contains(arg, "/proc/self/fd/") || strings.Contains(arg, "fd=") {
			return nil, fmt.Errorf("argument %s of a pod's QEMU can't be used again", arg)
		}
	}
	return args, nil
}

func bareValue(value, shares string) string {
	var id string
	for _, option := range strings.Split(value, ",") {
		if name, ok := strings.CutPrefix(option, "id="); ok {
			id = name
		}
	}
	switch kind, _, _ := strings.Cut(value, ","); {
	case kind == "socket" && id == "console":
		return "stdio,signal=off,id=" + id
	case kind == "socket":
		return "null,id=" + id
	case kind == "memory-backend-file":
		for _, option := range strings.Split(value, ",") {
			if strings.HasPrefix(option, "size=") {
				return "memory-backend-ram,id=" + id + "," + option
			}
		}
	case kind == "local":
		options := strings.Split(value, ",")
		for i, option := range options {
			if strings.HasPrefix(option, "path=") {
				options[i] = "path=" + shares
			}
		}
		return strings.Join(options, ",")
	}
	return value
}

// bareInitramfs compiles the init and packs it.
func (b *bench) bareInitramfs() (string, error) {
	dir := filepath.Join(b.dir, "bare")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	compile := exec.Command("gcc", "-static", "-Os", "-s", "-x", "c", "-", "-o", filepath.Join(dir, "init"))
	compile.Stdin = strings.NewReader(bareInit)
	if out, err := compile.CombinedOutput(); err != nil {
		return "", fmt.Errorf("gcc: %w: %s", err, out)
	}
	return pack(dir, b.dir+"/bare.cpio")
}

// pack makes an initramfs whose one file is dir/init.
func pack(dir, file string) (string, error) {
	out, err := os.Create(file)
	if err != nil {
		return "", err
	}
	defer out.Close()
	cmd := exec.Command("cpio", "--quiet", "-o", "-H", "newc")
	cmd.Dir, cmd.Stdin, cmd.Stdout = dir, strings.NewReader("init\n"), out
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("cpio: %w: %s", err, &stderr)
	}
	return file, nil
}

// boot starts the machine and waits for init's line.
func (m *bareMachine) boot(ctx context.Context) (*process, error) {
	return firstByte(ctx, m.qemu, m.args...)
}

func (m *bareMachine) echo(ctx context.Context) (time.Duration, error) {
	p, err := m.boot(ctx)
	if err != nil {
		return 0, err
	}
	p.cmd.Process.Kill()
	p.cmd.Wait()
	return p.after, nil
}

// bareDisk puts nothing in the place of a disk whose file the pod's QEMU inherited.
func bareDisk(option string) (string, error) {
	var node map[string]any
	if err := json.Unmarshal([]byte(option), &node); err != nil {
		return "", fmt.Errorf("-blockdev %s: %w", option, err)
	}
	if file, ok := node["file"].(map[string]any); ok && strings.HasPrefix(fmt.Sprint(file["filename"]), "/dev/fdset/") {
		node["file"] = map[string]any{"driver": "null-co", "size": 1 << 20, "read-zeroes": true, "node-name": file["node-name"], "read-only": file["read-only"]}
	}
	value, err := json.Marshal(node)
	return string(value), err
}
