package ceph

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/csi-plugin/volume"
)

// asker has the manager do commands, one a line, by the library that the program ceph is made of (package ceph-common has both). That program takes some 50 ms of
// processor time to understand a command, which is too long for what is asked of every volume.
const asker = `
import json, rados, sys
cluster = rados.Rados(conffile=sys.argv[1], name=sys.argv[2], conf=json.loads(sys.argv[3]))
cluster.connect()
for line in sys.stdin:
    ret, out, text = cluster.mgr_command(line, b"")
    print(json.dumps([ret, out.decode(), text]), flush=True)
`

// A question is a command that changes nothing, with its arguments.
type question map[string]string

// question is one about a subvolume.
func (f *found) question(what string) question {
	return question{"prefix": "fs subvolume " + what, "vol_name": f.pool.FS, "sub_name": f.id, "group_name": f.pool.Group, "format": "json"}
}

// An answer is what the manager says.
type answer struct {
	out string
	err error
}

func (a answer) read(into any) error {
	if a.err != nil {
		return a.err
	}
	if err := json.Unmarshal([]byte(a.out), into); err != nil {
		return fmt.Errorf("the manager's answer: %w", err)
	}
	return nil
}

// ask asks the manager much, and has an answer to each question.
func (b *Backend) ask(ctx context.Context, questions []question) (answers []answer, err error) {
	if len(questions) == 0 {
		return nil, nil
	}
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	conf := map[string]string{"client_mount_timeout": connecting}
	if b.config.Keyring != "" {
		conf["keyring"] = b.config.Keyring
	}
	options, err := json.Marshal(conf)
	if err != nil {
		return nil, err
	}
	var in, errs bytes.Buffer
	for _, q := range questions {
		line, err := json.Marshal(q)
		if err != nil {
			return nil, err
		}
		in.Write(append(line, '\n'))
	}
	cmd := exec.Command("/usr/bin/python3", "-I", "-c", asker, b.config.Conf, "client."+b.config.ID, string(options))
	cmd.Env = []string{"LC_ALL=C.UTF-8", "PATH=/usr/sbin:/usr/bin:/sbin:/bin"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Pdeathsig: syscall.SIGKILL} // it may wait for a manager for long
	cmd.Stdin, cmd.Stderr = &in, &errs
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("%w: %w: apt-get install ceph-common", volume.ErrUnavailable, err)
	}
	kill := func() { _ = cmd.Process.Kill() }
	late := time.AfterFunc(answering, kill)
	defer late.Stop()
	defer context.AfterFunc(ctx, kill)()
	for lines := bufio.NewReader(out); len(answers) < len(questions); late.Reset(answering) {
		var line []byte
		if line, err = lines.ReadBytes('\n'); err != nil {
			break // what it has said tells why
		}
		var code int
		var a answer
		var text string
		if err := json.Unmarshal(line, &[]any{&code, &a.out, &text}); err != nil {
			kill()
			return nil, fmt.Errorf("the manager's answer: %w", errors.Join(err, cmd.Wait()))
		}
		if code != 0 {
			errno := syscall.Errno(max(code, -code))
			a.err = explained(fmt.Sprintf("Error %s: %s", unix.ErrnoName(errno), text))
		}
		answers = append(answers, a)
	}
	_ = cmd.Wait()
	switch {
	case len(answers) == len(questions):
		return answers, nil
	case ctx.Err() != nil:
		return nil, context.Cause(ctx)
	case strings.TrimSpace(errs.String()) != "":
		return nil, fmt.Errorf("%w: the cluster is not reachable: %s", volume.ErrUnavailable, lastLine(strings.TrimSpace(errs.String())))
	}
	return nil, fmt.Errorf("%w: the manager has not answered for %v: see \"ceph status\": %w", volume.ErrUnavailable, answering, err)
}
