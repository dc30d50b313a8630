package driver

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Nomad's client starts a process of its own for each task, `nomad logmon`, which reads the named pipes of the task's output and writes its log files. A client
// that is killed after it has started one and before it has noted that (client/allocrunner/taskrunner/logmon_hook.go, task_runner_hooks.go prestart) starts another
// when it is back, and never ends the first. Then both read the same pipes: each gets some of the lines and writes them when its turn is, so that the log is out of order.
//
// Of several, the youngest is the client's.

// A reader is a logmon process.
type reader struct {
	pid   int
	start string // see startOf
	begun uint64 // the same as a number
}

// logFlush is longer than what a logmon keeps to itself before it writes it (client/logmon/logging/rotator.go, bufferFlushDuration: 100 ms).
const logFlush = 300 * time.Millisecond

// endStrayReaders ends all processes that read a task's output but the one that the client knows. It is for the time in which nobody writes to the pipes.
func endStrayReaders(ctx context.Context, stdout string) error {
	all, err := readersOf(stdout)
	if err != nil || len(all) < 2 {
		return err
	}
	select { // for what the task's earlier run has written
	case <-time.After(logFlush):
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	var errs []error
	for _, r := range all[:len(all)-1] {
		errs = append(errs, end(r.pid, r.start))
	}
	return errors.Join(errs...)
}

// readersOf finds the logmon processes of the task whose pipe for standard output this is, the youngest last. Such a process has its log file open before the
// pipe, whose opening waits for a writer.
func readersOf(stdout string) ([]reader, error) {
	dir, pipe := filepath.Split(stdout)
	log, ok := strings.CutSuffix(pipe, "fifo") // .TASK.stdout.fifo, for the files TASK.stdout.0 and so on
	if !ok {
		return nil, nil // its output is wanted by nobody
	}
	log = dir + strings.TrimPrefix(log, ".")
	commands, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return nil, err
	}
	var all []reader
	for _, path := range commands {
		command, err := os.ReadFile(path)
		if err != nil || !strings.HasSuffix(string(command), "\x00logmon\x00") {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(path)))
		if err != nil {
			return nil, err
		}
		r := reader{pid: pid, start: startOf(pid)}
		if !hasOpen(pid, log) || r.start == "" {
			continue
		}
		if r.begun, err = strconv.ParseUint(r.start, 10, 64); err != nil {
			return nil, fmt.Errorf("start of process %d: %w", pid, err)
		}
		all = append(all, r)
	}
	slices.SortFunc(all, func(a, b reader) int {
		if a.begun != b.begun {
			return int(int64(a.begun - b.begun))
		}
		return a.pid - b.pid
	})
	return all, nil
}

// hasOpen says whether a process has a file open whose path begins so.
func hasOpen(pid int, prefix string) bool {
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	files, _ := os.ReadDir(dir) // of a process that has ended: none
	return slices.ContainsFunc(files, func(f os.DirEntry) bool {
		to, err := os.Readlink(filepath.Join(dir, f.Name()))
		return err == nil && strings.HasPrefix(to, prefix)
	})
}
