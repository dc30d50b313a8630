package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/cradlestack/cradlestack/test/programs"
)

// stepTimeout bounds every single start.
const stepTimeout = 2 * time.Minute

// A process is a program whose first output has been seen.
type process struct {
	cmd    *exec.Cmd
	stderr *bytes.Buffer
	after  time.Duration // from its start to the first byte
}

// firstByte starts a program and waits for its first byte of output. The caller ends it.
func firstByte(ctx context.Context, program string, args ...string) (*process, error) {
	p := &process{cmd: exec.CommandContext(ctx, program, args...), stderr: new(bytes.Buffer)}
	p.cmd.Stderr = p.stderr
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	p.cmd.WaitDelay = 5 * time.Second
	// A pipe of ours: the one of StdoutPipe closes under a reader when Wait is called.
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer r.Close()
	p.cmd.Stdout = w
	begin := time.Now()
	err = p.cmd.Start()
	w.Close()
	if err != nil {
		return nil, err
	}
	watchdog := time.AfterFunc(stepTimeout, func() { r.SetReadDeadline(time.Now()) })
	defer watchdog.Stop()
	var one [1]byte
	if _, err := io.ReadFull(r, one[:]); err != nil {
		p.cmd.Process.Kill()
		p.cmd.Wait()
		return nil, fmt.Errorf("%s %s: no output: %w\n%s", program, strings.Join(args, " "), err, p.stderr)
	}
	p.after = time.Since(begin)
	// What follows must not block the program.
	rest, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", r.Fd()))
	if err != nil {
		return nil, err
	}
	go func() {
		defer rest.Close()
		_, _ = io.Copy(io.Discard, rest) // it ends with the program, however that ends
	}()
	return p, nil
}

// finish waits for a program that ends by itself.
func (p *process) finish() error {
	if err := p.cmd.Wait(); err != nil {
		return fmt.Errorf("%s: %w\n%s", strings.Join(p.cmd.Args, " "), err, p.stderr)
	}
	return nil
}

// stop ends a pod as a terminal's Ctrl-C twice would: its containers may ignore the signal.
func (p *process) stop(dir string, kcradle string) error {
	if out, err := exec.Command(kcradle, "kill", dir).CombinedOutput(); err != nil {
		p.cmd.Process.Kill()
		p.cmd.Wait()
		return fmt.Errorf("kcradle kill: %w: %s", err, out)
	}
	p.cmd.Wait() // 137, the container's code
	return nil
}

// Pods are compared with what is like them: without a network, as docker's and the bare machine are, or as Nomad's driver makes one of a small task.
var (
	alone    = []string{"--network", "none"}
	asNomads = []string{"--network", "user", "--memory", "64m"}
)

// summon makes a pod directory.
func (b *bench) summon(ctx context.Context, flags []string, image, start string, cmd ...string) (dir string, err error) {
	b.pods++
	dir = filepath.Join(b.dir, fmt.Sprintf("p%d", b.pods))
	args := slices.Concat([]string{"summon", "--name", "bench"}, flags, []string{dir, "oci:" + image, "--"}, cmd)
	if out, err := exec.CommandContext(ctx, b.kcradle, args...).CombinedOutput(); err != nil {
		return "", fmt.Errorf("kcradle summon: %w: %s", err, bytes.TrimSpace(out))
	}
	return dir, editLaunch(dir, func(launch map[string]any) { launch["boot"] = map[string]any{"start": start} })
}

func editLaunch(dir string, edit func(map[string]any)) error {
	path := filepath.Join(dir, "launch.json")
	data, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	var launch map[string]any
	if err := json.Unmarshal(data, &launch); err != nil {
		return err
	}
	edit(launch)
	if data, err = json.MarshalIndent(launch, "", "  "); err != nil {
		return err
	}
	return os.WriteFile(path, data, 0o600)
}

// echo times kcradle run of echo, to the first byte. image "" is busybox.
func (b *bench) echo(ctx context.Context, start, image string) (time.Duration, error) {
	return b.echoAs(ctx, alone, start, image)
}

func (b *bench) echoAs(ctx context.Context, flags []string, start, image string) (time.Duration, error) {
	if image == "" {
		var err error
		if image, err = programs.Image("busybox"); err != nil {
			return 0, err
		}
	}
	dir, err := b.summon(ctx, flags, image, start, "echo", "hello")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	p, err := firstByte(ctx, b.kcradle, "run", dir)
	if err != nil {
		return 0, err
	}
	return p.after, p.finish()
}

const dockerBusybox = "bench/busybox:1"

func (b *bench) dockerEcho(ctx context.Context) (time.Duration, error) {
	p, err := firstByte(ctx, "docker", "-H", b.daemon.Host, "run", "--rm", "--network", "none", dockerBusybox, "echo", "hello")
	if err != nil {
		return 0, err
	}
	return p.after, p.finish()
}

// docker times a command of the docker CLI.
func docker(ctx context.Context, host string, args ...string) (time.Duration, error) {
	begin := time.Now()
	out, err := exec.CommandContext(ctx, "docker", append([]string{"-H", host}, args...)...).CombinedOutput()
	if err != nil {
		return 0, fmt.Errorf("docker %s: %w: %s", strings.Join(args, " "), err, bytes.TrimSpace(out))
	}
	return time.Since(begin), nil
}

// tree is a process with all of its descendants.
func tree(root int) ([]int, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	children := map[int][]int{}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		if fields, err := stat(pid); err == nil { // it may have ended
			parent, _ := strconv.Atoi(fields[1])
			children[parent] = append(children[parent], pid)
		}
	}
	all := []int{root}
	for i := 0; i < len(all); i++ {
		all = append(all, children[all[i]]...)
	}
	return all, nil
}

// stat are the fields of /proc/PID/stat after the name: state, ppid, …
func stat(pid int) ([]string, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return nil, err
	}
	fields := strings.Fields(string(data[bytes.LastIndexByte(data, ')')+1:]))
	if len(fields) < 15 {
		return nil, fmt.Errorf("/proc/%d/stat has %d fields", pid, len(fields))
	}
	return fields, nil
}

// clockTick is USER_HZ, which is 100 on every Linux for amd64.
const clockTick = 10 * time.Millisecond

// cpu is the time that processes have used.
func cpu(pids []int) (time.Duration, error) {
	var ticks int64
	for _, pid := range pids {
		fields, err := stat(pid)
		if err != nil {
			return 0, err
		}
		for _, f := range fields[11:13] { // utime, stime
			n, err := strconv.ParseInt(f, 10, 64)
			if err != nil {
				return 0, err
			}
			ticks += n
		}
	}
	return time.Duration(ticks) * clockTick, nil
}

// pss is the proportional memory of processes in bytes: shared pages count once, divided by those who share them.
func pss(pids []int) (int64, error) {
	var sum int64
	for _, pid := range pids {
		data, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
		if err != nil {
			return 0, err
		}
		for line := range strings.Lines(string(data)) {
			if rest, ok := strings.CutPrefix(line, "Pss:"); ok {
				n, err := strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
				if err != nil {
					return 0, err
				}
				sum += n << 10
			}
		}
	}
	return sum, nil
}

// isQEMU says whether a process is the machine itself.
func isQEMU(pid int) bool {
	exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
	return err == nil && strings.HasPrefix(filepath.Base(exe), "qemu-system")
}

func mib(n int64) string { return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20)) }
