//go:build vm

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

// TestVMSystemd boots a bare Debian and makes it a node of the stack with
// examples/bootstrap: consul and nomad from signed images under a real systemd,
// until Nomad says that the node is ready and can run pods.
func TestVMSystemd(t *testing.T) {
	p := newPlace(t)
	base := p.machines()
	p.keys("node", "10.0.2.15")
	m := p.machine(base, "node", "node.sh")
	m.boot(userNet, "ok: nomad node status is ready")
}

// processor leaves out what takes longer than doing without it where it is
// emulated: hashing with AVX2 takes four times as long.
const processor = "max,-avx2,-erms,-fsrm"

// emulated are for the kernel: on a busy host a check of its timer fails, and
// what guards a processor against guessing wrong costs time where none guesses.
const emulated = "no_timer_check mitigations=off"

// userNet is a network with nobody else in it.
const userNet = "user,id=n0,restrict=on"

// debian makes the folder job, which every machine gets, and returns where their
// Debian is.
func (p *place) debian() string {
	p.t.Helper()
	if _, err := exec.LookPath("qemu-system-x86_64"); err != nil {
		p.t.Fatalf("%v: apt-get install qemu-system-x86", err)
	}
	base := lastLine(p.sh("cd " + p.root() + " && bali/testdata/vm/base.sh"))
	p.sh(fmt.Sprintf(`mkdir -p job/web
cp -r %[1]s/bali/testdata/vm/*.sh job/
CGO_ENABLED=0 go build -C %[1]s -o "$PWD/job/bali" ./bali
bali id >job/identity`, p.root()))
	return base
}

// root is the folder of the repository.
func (p *place) root() string {
	p.t.Helper()
	root, err := filepath.Abs("..")
	if err != nil {
		p.t.Fatal(err)
	}
	return root
}

// machines is debian with what makes nodes of them. The images are compressed
// with zstd, as most of a machine's time goes into unpacking; TestVMSoakSystemd
// has some with gzip, too.
func (p *place) machines() string {
	p.t.Helper()
	base := p.debian()
	p.sh(fmt.Sprintf(`cp -r %[1]s/examples/bootstrap job/
SUFFIX=tar.zst %[1]s/examples/bootstrap/images.sh job/web`, p.root()))
	return base
}

// keys makes those of a server.
func (p *place) keys(node, address string) {
	p.t.Helper()
	p.sh(fmt.Sprintf("job/bootstrap/keys.sh job/web/consul.tar.zst keys %s server %s", node, address))
}

// A machine has a Debian and runs a script of testdata/vm when it boots.
type machine struct {
	*place
	base, name string
}

// machine makes one of what is in job now, and its keys. files are more for it
// alone, as NAME=CONTENT.
func (p *place) machine(base, name, script string, files ...string) *machine {
	p.t.Helper()
	p.sh(fmt.Sprintf("mkdir -p %[1]s/keys keys/%[1]s && cp -r keys/%[1]s %[1]s/keys/ && ln -s %[2]s %[1]s/run.sh", name, script))
	for _, f := range files {
		file, content, _ := strings.Cut(f, "=")
		if err := os.WriteFile(filepath.Join(p.dir, name, file), []byte(content+"\n"), 0o644); err != nil {
			p.t.Fatal(err)
		}
	}
	p.sh(fmt.Sprintf(`tar cf %[1]s.tar -C job . -C "$PWD/%[1]s" .
truncate -s %%1M %[1]s.tar
cp --sparse=always %[2]s/root.img %[1]s.img`, name, base))
	return &machine{p, base, name}
}

// boot runs the machine until it powers off. What its script said must contain
// want.
func (m *machine) boot(network, want string) {
	m.t.Helper()
	ctx, cancel := context.WithTimeout(m.t.Context(), time.Hour) // a script gives up before
	defer cancel()
	accel := "tcg,thread=multi" // right everywhere; nested KVM often isn't
	if a := os.Getenv("BALI_VM_ACCEL"); a != "" {
		accel = a
	}
	// one processor: of two that are emulated, one now and then misses an interrupt, and the kernel waits for it for ever
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64", "-M", "q35", "-accel", accel, "-cpu", processor, "-smp", "1", "-m", "3072",
		"-nodefaults", "-vga", "none", "-no-user-config", "-nographic", "-serial", "stdio", "-no-reboot",
		"-kernel", filepath.Join(m.base, "vmlinuz"), "-initrd", filepath.Join(m.base, "initrd"),
		"-append", "root=/dev/vda rw console=ttyS0 quiet "+emulated+" systemd.show_status=false reboot=t panic=-1",
		"-drive", "file="+m.name+".img,format=raw,if=virtio,cache=unsafe", "-drive", "file="+m.name+".tar,format=raw,if=virtio,readonly=on",
		"-netdev", network, "-device", "virtio-net-pci,netdev=n0,romfile=,mac=52:54:00:00:00:0"+string(m.name[len(m.name)-1]))
	cmd.Dir = m.dir
	console, err := os.Create(filepath.Join(m.dir, m.name+".console"))
	if err != nil {
		m.t.Error(err)
		return
	}
	defer console.Close()
	cmd.Stdout, cmd.Stderr = console, console
	err = cmd.Run()
	out, rerr := os.ReadFile(console.Name())
	m.t.Logf("%s:\n%s", m.name, out)
	if err != nil || rerr != nil {
		m.t.Errorf("%s: %v, %v", m.name, err, rerr)
	} else if !strings.Contains(string(out), want) || !strings.Contains(string(out), "job: exit 0") {
		m.t.Errorf("%s did not get to %q", m.name, want)
	}
}
