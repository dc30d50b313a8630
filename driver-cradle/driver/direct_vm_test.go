//go:build vm

package driver

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hashicorp/nomad/plugins/drivers"
	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/internal/nfstest"
	"github.com/cradlestack/cradlestack/spec"
)

// A left volume is one that a CSI plugin has left to the guest.
type leftVolume struct {
	*testing.T
	image, target, control string
}

// leave makes an image and the record of a volume that is published at a path.
func leave(t *testing.T, edit func(*spec.DirectAttachment)) *leftVolume {
	t.Helper()
	dir := t.TempDir()
	v := &leftVolume{t, filepath.Join(dir, "image"), filepath.Join(dir, "target"), ""}
	if err := os.WriteFile(v.image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	v.size(64 << 20)
	v.control = filepath.Join(directDir, spec.DirectSocket(v.target))
	d := spec.DirectAttachment{
		Version: spec.DirectVersion, Target: v.target, Control: v.control,
		Volume: spec.Volume{Name: "volume-of-" + filepath.Base(dir), Block: &spec.BlockVolume{Path: v.image}},
	}
	edit(&d)
	data, err := json.Marshal(d)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(directDir, spec.DirectFile(v.target)), data, 0o600); err != nil {
		t.Fatal(err)
	}
	return v
}

func (v *leftVolume) size(n int64) {
	v.Helper()
	if err := os.Truncate(v.image, n); err != nil {
		v.Fatal(err)
	}
}

// call calls the control socket and returns the answer's code, 0 where nobody answers, and its body.
func (v *leftVolume) call(method, path, body string) (int, string) {
	v.Helper()
	transport := &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", v.control)
	}}
	req, err := http.NewRequestWithContext(v.Context(), method, "http://pod"+path, strings.NewReader(body))
	if err != nil {
		v.Fatal(err)
	}
	resp, err := transport.RoundTrip(req)
	if errors.Is(err, unix.ECONNREFUSED) {
		return 0, ""
	}
	if err != nil {
		v.Fatalf("%s: %v", path, err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		v.Fatal(err)
	}
	return resp.StatusCode, string(bytes.TrimSpace(text))
}

// want makes a call that is to be answered so.
func (v *leftVolume) want(code int, method, path, body string) string {
	v.Helper()
	got, text := v.call(method, path, body)
	if got != code {
		v.Errorf("%s %s %s: %d %s, want %d", method, path, body, got, text, code)
	}
	return text
}

func (v *leftVolume) total() spec.Bytes {
	v.Helper()
	var s spec.VolumeStats
	if text := v.want(200, "GET", "/stats", ""); json.Unmarshal([]byte(text), &s) != nil || s.Used == 0 || s.Inodes == 0 {
		v.Errorf("stats: %s", text)
	}
	return s.Total
}

// A pod attaches what the CSI plugin has left to it, and what holds it answers for the volume, also after another plugin process has taken it up.
func TestVMDirect(t *testing.T) {
	c := newClient(t, nil)
	directDir = t.TempDir()
	t.Cleanup(func() { directDir = spec.DirectDir })
	files := leave(t, func(d *spec.DirectAttachment) { d.Limits = spec.IOLimits{IOPS: 500, Bandwidth: 8 << 20} })
	raw := leave(t, func(d *spec.DirectAttachment) { d.Raw = true })
	named := leave(t, func(d *spec.DirectAttachment) { d.Raw, d.Volume.Block.ReadOnly = true, true })
	xfs := xfsDevice(t)
	task := c.task(`
		echo kept >/v/file; sync
		grep -o ' /x xfs' /proc/mounts
		grep -o ' /v ext4' /proc/mounts
		ls /dev/volumes /dev/disk
		dd if=/dev/urandom of=/dev/volumes/raw bs=4096 count=16 2>/dev/null && echo wrote
		dd if=/dev/zero of=/dev/disk bs=4096 count=1 2>/dev/null || echo read-only
		while :; do date >/v/now; sleep 0.1; done`, func(t *drivers.TaskConfig, _ *taskConfig) {
		t.Mounts = []*drivers.MountConfig{
			{TaskPath: "/v", HostPath: files.target}, {TaskPath: "raw", HostPath: raw.target}, {TaskPath: "/dev/disk", HostPath: named.target}, {TaskPath: "/x", HostPath: xfs},
		}
	})
	h := c.start(task)
	c.logs(task, "stdout", " /x xfs\n /v ext4\n/dev/disk\n\n/dev/volumes:\nraw\nwrote\nread-only\n")
	throttled(t, c, task, files, 500, 8<<20)

	first := files.total()
	files.want(204, "POST", "/freeze", `{"timeout": "10m"}`)
	files.want(204, "POST", "/freeze", `{"timeout": "5m"}`)
	files.want(409, "POST", "/resize", `{"size": "64MiB"}`) // frozen
	files.want(204, "POST", "/thaw", "")
	files.want(409, "POST", "/thaw", "")
	files.want(204, "POST", "/freeze", `{"timeout": "500ms"}`)
	eventually(t, func() string { // what is frozen is not resized
		code, _ := files.call("POST", "/resize", `{"size": "64MiB"}`)
		return fmt.Sprint(code)
	}, func(s string) bool { return s == "204" })
	files.want(409, "POST", "/thaw", "")
	files.size(128 << 20)
	for range 2 {
		files.want(204, "POST", "/resize", `{"size": "128MiB"}`)
	}
	if now := files.total(); now < first+50<<20 {
		t.Errorf("the file system had %v, and after growth it has %v", first, now)
	}
	files.want(204, "POST", "/throttle", `{"iops": 90}`)
	throttled(t, c, task, files, 90, 0)
	files.want(204, "POST", "/throttle", `{}`)
	throttled(t, c, task, files, 0, 0)
	for path, body := range map[string]string{
		"/resize": `{"size": "1MiB"}`, "/throttle": `{"iops": -1}`, "/freeze": `{}`,
	} {
		files.want(400, "POST", path, body)
	}
	files.want(400, "POST", "/throttle", `{"iop": 1}`)
	files.want(404, "POST", "/other", "")
	for _, call := range []string{"POST /freeze", "POST /thaw", "GET /stats"} {
		method, path, _ := strings.Cut(call, " ")
		raw.want(404, method, path, `{"timeout": "1s"}`)
	}
	raw.size(128 << 20)
	raw.want(204, "POST", "/resize", `{"size": "128MiB"}`)

	// Without a plugin process nobody answers; what has grown meanwhile is made up for, once a freeze is over that nobody has ended.
	files.want(204, "POST", "/freeze", `{"timeout": "5s"}`)
	c.close()
	files.want(0, "GET", "/stats", "")
	files.size(192 << 20)
	c.open(t)
	files.want(0, "GET", "/stats", "")
	if err := c.harness.RecoverTask(h); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() string { return fmt.Sprint(files.total() > 160<<20) }, func(s string) bool { return s == "true" })
	files.want(204, "POST", "/freeze", `{"timeout": "5m"}`)
	files.want(204, "POST", "/thaw", "")

	if err := c.harness.DestroyTask(task.ID, true); err != nil {
		t.Fatal(err)
	}
	if left, err := filepath.Glob(filepath.Join(directDir, "*.sock*")); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
	// The next pod has what the last one has written, which was killed: before anything else the file system has to be repaired.
	pod := func(script string, readOnly bool) *drivers.TaskConfig {
		return c.task(script, func(t *drivers.TaskConfig, _ *taskConfig) {
			t.Mounts = []*drivers.MountConfig{{TaskPath: "/v", HostPath: files.target, Readonly: readOnly}}
		})
	}
	if _, _, err := c.harness.StartTask(pod("", true)); err == nil || !strings.Contains(err.Error(), "repaired by mounting it writable once") {
		t.Errorf("a file system that was not put away, read-only: %v", err)
	}
	for _, readOnly := range []bool{false, true} {
		next := pod("cat /v/file; echo x 2>/dev/null >/v/other && echo wrote", readOnly)
		c.start(next)
		c.wait(next)
		if want := "kept\n"; readOnly {
			c.logs(next, "stdout", want)
		} else {
			c.logs(next, "stdout", want+"wrote\n")
		}
	}
}

// An NFS export that is left to guests is mounted by each of them, and by no kernel of the host.
func TestVMDirectNFS(t *testing.T) {
	c := newClient(t, nil)
	directDir = t.TempDir()
	t.Cleanup(func() { directDir = spec.DirectDir })
	files := t.TempDir()
	server, err := nfstest.Serve(t.Context(), files)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the NFS server:\n%s", server.Log())
		}
		if err := server.Close(); err != nil {
			t.Error(err)
		}
	})
	left := func() *leftVolume {
		return leave(t, func(d *spec.DirectAttachment) {
			d.Volume = spec.Volume{Name: "files", Class: "nfs", NFS: &spec.NFSVolume{Address: server.Host, Export: nfstest.Export, Options: "vers=4.1"}}
		})
	}
	pod := func(v *leftVolume, readOnly bool, script string) (*drivers.TaskConfig, *drivers.TaskHandle) {
		task := c.task(script, func(t *drivers.TaskConfig, _ *taskConfig) {
			t.Mounts = []*drivers.MountConfig{{TaskPath: "/v", HostPath: v.target, Readonly: readOnly}}
		})
		return task, c.start(task)
	}
	writes, reads := left(), left()
	writer, h := pod(writes, false, "grep -o ' /v nfs4' /proc/mounts; echo kept >/v/file; sleep 1000")
	c.logs(writer, "stdout", " /v nfs4\n")
	reader, _ := pod(reads, true, "until cat /v/file 2>/dev/null; do sleep 0.1; done; echo x 2>/dev/null >/v/other || echo only reads; sleep 1000")
	c.logs(reader, "stdout", "kept\nonly reads\n")
	if data, err := os.ReadFile(filepath.Join(files, "file")); err != nil || string(data) != "kept\n" {
		t.Errorf("the server has %q, %v", data, err)
	}
	for path, body := range map[string]string{"/freeze": `{"timeout": "1s"}`, "/resize": `{"size": "1GiB"}`, "/throttle": `{"iops": 1}`} {
		if text := writes.want(400, "POST", path, body); !strings.Contains(text, "no block volume") {
			t.Errorf("%s: %s", path, text)
		}
	}
	c.close()
	c.open(t)
	if err := c.harness.RecoverTask(h); err != nil {
		t.Fatal(err)
	}
	if reads.want(0, "GET", "/stats", ""); writes.total() == 0 {
		t.Error("the file system has no size")
	}
}

// throttled asks QEMU.
func throttled(t *testing.T, c *client, task *drivers.TaskConfig, v *leftVolume, iops, bandwidth int64) {
	t.Helper()
	held, err := c.driver.task(task.ID)
	if err != nil {
		t.Fatal(err)
	}
	lun, ok := held.running.Machine().LUN("volume:" + held.record.Attached[0].Volume)
	if !ok {
		t.Fatal("the machine has no disk of the volume")
	}
	var all []struct {
		Device   string `json:"qdev"`
		Inserted struct{ IOPS, BPS int64 }
	}
	if err := held.running.Machine().QMP(t.Context(), "query-block", nil, &all); err != nil {
		t.Fatal(err)
	}
	for _, b := range all {
		if strings.HasSuffix(b.Device, fmt.Sprintf("lun%d", lun)) {
			if b.Inserted.IOPS != iops || b.Inserted.BPS != bandwidth {
				t.Errorf("the disk is bound to %d operations and %d bytes a second, want %d and %d", b.Inserted.IOPS, b.Inserted.BPS, iops, bandwidth)
			}
			return
		}
	}
	t.Errorf("QEMU does not know %s: %+v", v.image, all)
}

// xfsDevice is a block device with xfs.
func xfsDevice(t *testing.T) string {
	t.Helper()
	image := filepath.Join(t.TempDir(), "xfs")
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(image, 320<<20); err != nil {
		t.Fatal(err)
	}
	if _, err := command("mkfs.xfs", "-q", image); err != nil {
		t.Fatalf("apt-get install xfsprogs: %v", err)
	}
	device, err := command("losetup", "--find", "--show", image)
	if err != nil {
		t.Fatal(err)
	}
	device = strings.TrimSpace(device)
	t.Cleanup(func() {
		if _, err := command("losetup", "--detach", device); err != nil {
			t.Error(err)
		}
	})
	return device
}
