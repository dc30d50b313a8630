//go:build vm && soak

package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestVMSoakSystemd boots a bare Debian and makes it a member of the stack with
// examples/bootstrap: consul and nomad from signed images under a real systemd,
// upgrades, a rollback, the loss of the image server, a reboot. What happens
// inside is testdata/vm/job.sh. Two boots take some minutes under emulation.
func TestVMSoakSystemd(t *testing.T) {
	if _, err := exec.LookPath("qemu-system-x86_64"); err != nil {
		t.Fatalf("%v: apt-get install qemu-system-x86", err)
	}
	p := newPlace(t)
	script, err := filepath.Abs("testdata/vm/base.sh")
	if err != nil {
		t.Fatal(err)
	}
	root, err := filepath.Abs("..")
	if err != nil {
		t.Fatal(err)
	}
	base := strings.TrimSpace(lastLine(p.sh(script)))

	p.sh(fmt.Sprintf(`mkdir -p job/web
cp %[1]s/bali/testdata/vm/job.sh job/run.sh
cp -r %[1]s/examples/bootstrap job/bootstrap
CGO_ENABLED=0 go build -C %[1]s -o "$PWD/job/bali" ./bali
%[1]s/examples/bootstrap/images.sh job/web
%[1]s/examples/bootstrap/keys.sh job/web/consul.tar.gz job/keys node server
bali id >job/identity
bali extract job/web/consul.tar.gz consul2
bali build job/web/consul2.tar.gz --from ./consul2 --env UPGRADED=1
bali build job/broken.tar.gz --from ./app --entrypoint /bin/sh --cmd -c --cmd 'echo broken; exit 1'
BALI_KEY=foreign bali id
BALI_KEY=foreign bali build job/foreign.tar.gz --from ./app --entrypoint /bin/sh
cat >app/hello.sh <<'END'
right=wrong; [ "$LISTEN_PID" = $$ ] && right=right
echo "fds=$LISTEN_FDS pid=$right notify=$NOTIFY_SOCKET" >/run/hello.new
mv /run/hello.new /run/hello
exec sleep 100000
END
for a in mv sleep; do ln -s busybox app/bin/$a; done
bali build job/web/hello.tar.gz --from ./app --entrypoint /bin/sh --cmd /hello.sh --env PATH=/bin
tar cf job.tar -C job .
truncate -s %%1M job.tar
cp --sparse=always %[2]s/root.img root.img`, root, base))

	for stage, want := range []string{"ok: 1 it starts from the cache when the server is gone", "ok: 2 done"} {
		out := p.boot(base)
		t.Logf("boot %d:\n%s", stage+1, out)
		if !strings.Contains(out, want) || !strings.Contains(out, "job: exit 0") {
			t.Fatalf("boot %d did not get to %q", stage+1, want)
		}
	}
}

// boot runs the machine until it powers off and gives its console.
func (p *place) boot(base string) string {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(p.t.Context(), 15*time.Minute)
	defer cancel()
	accel := "tcg,thread=multi" // right everywhere; nested KVM often isn't
	if a := os.Getenv("BALI_VM_ACCEL"); a != "" {
		accel = a
	}
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64", "-M", "q35", "-accel", accel, "-cpu", "max", "-smp", "2", "-m", "3072",
		"-nodefaults", "-vga", "none", "-no-user-config", "-nographic", "-serial", "stdio", "-no-reboot",
		"-kernel", filepath.Join(base, "vmlinuz"), "-initrd", filepath.Join(base, "initrd"),
		"-append", "root=/dev/vda rw console=ttyS0 quiet systemd.show_status=false reboot=t panic=-1",
		"-drive", "file=root.img,format=raw,if=virtio,cache=unsafe", "-drive", "file=job.tar,format=raw,if=virtio,readonly=on",
		"-netdev", "user,id=n0,restrict=on", "-device", "virtio-net-pci,netdev=n0,romfile=")
	cmd.Dir = p.dir
	console, err := os.Create(filepath.Join(p.dir, "console"))
	if err != nil {
		p.t.Fatal(err)
	}
	defer console.Close()
	cmd.Stdout, cmd.Stderr = console, console
	err = cmd.Run()
	out, rerr := os.ReadFile(console.Name())
	if err != nil || rerr != nil {
		p.t.Fatalf("the machine: %v, %v\n%s", err, rerr, out)
	}
	return string(out)
}
