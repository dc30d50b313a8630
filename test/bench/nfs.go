package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/cradlestack/cradlestack/internal/locked"
	"github.com/cradlestack/cradlestack/internal/netnstest"
	"github.com/cradlestack/cradlestack/test/programs"
)

const (
	nfsFile    = 64 << 20
	nfsPiece   = 256 << 10 // of sequential reads and writes, of which 8 are on the way
	nfsRandom  = 2000      // requests of 4 KiB one after the other, and four times as many by 32
	nfsSynced  = 200       // writes of 4 KiB that are each on stable storage
	nfsEntries = 300       // that are made, looked at and removed
)

// nfs: what one client has of the embedded engine and of NFS-Ganesha: by version 3, which both speak, over one connection, past all caches but the servers'. Each has a
// volume of its own, as the file system of NFS-Ganesha's is mounted another way: with dirsync.
func (b *bench) nfs(ctx context.Context) (err error) {
	dir := filepath.Join(b.dir, "nfs")
	space, err := netnstest.New("bench")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, space.Close()) }()
	csi, err := programs.Path("cradle-csi")
	if err != nil {
		return err
	}
	volume := func(operation, id string) error {
		cmd := exec.CommandContext(context.WithoutCancel(ctx), csi, "host-volume", operation, "--pool", filepath.Join(dir, "pool"))
		cmd.Env = append(os.Environ(), "DHV_VOLUME_ID="+id, "DHV_VOLUMES_DIR="+filepath.Join(dir, "mounts"), fmt.Sprint("DHV_CAPACITY_MIN_BYTES=", 4*nfsFile), "DHV_PARAMETERS={}")
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("cradle-csi host-volume %s: %w: %s", operation, err, out)
		}
		return nil
	}
	engines := []string{"embedded", "ganesha"}
	for _, id := range engines {
		if err := volume("create", id); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, volume("delete", id)) }()
		// As long as the host has it mounted without, the filer's mount has no dirsync either.
		if err := syscall.Unmount(filepath.Join(dir, "mounts", id), 0); err != nil {
			return fmt.Errorf("unmount volume %s from the host: %w", id, err)
		}
	}
	var clients []*nfsClient
	defer func() {
		for _, c := range clients {
			err = errors.Join(err, c.close())
		}
	}()
	for i, engine := range engines {
		c, err := startFiler(ctx, space, dir, engine, fmt.Sprint(2049+i))
		if err != nil {
			return err
		}
		clients = append(clients, c)
	}
	for _, row := range []struct {
		what    string
		unit    string
		amount  float64
		do      func(c *nfsClient) (time.Duration, error)
		atLeast float64
	}{
		{"64 MiB written one after the other, with COMMIT", "MB/s", nfsFile / 1e6, timed((*nfsClient).writeAll), 0},
		{"64 MiB read one after the other", "MB/s", nfsFile / 1e6, timed((*nfsClient).readAll), 0.5},
		{"4 KiB read at random, one at a time", "/s", nfsRandom, timed(func(c *nfsClient) error { return c.random(procRead, nfsRandom, 1) }), 1},
		{"4 KiB read at random, 32 at a time", "/s", 4 * nfsRandom, timed(func(c *nfsClient) error { return c.random(procRead, 4*nfsRandom, 32) }), 1},
		{"4 KiB written at random, one at a time, COMMIT at the end", "/s", nfsRandom, timed(func(c *nfsClient) error { return c.random(procWrite, nfsRandom, 1) }), 0},
		{"4 KiB written at random, 32 at a time, COMMIT at the end", "/s", 4 * nfsRandom, timed(func(c *nfsClient) error { return c.random(procWrite, 4*nfsRandom, 32) }), 0},
		{"4 KiB written, each on stable storage", "/s", nfsSynced, timed((*nfsClient).synced), 0.5},
		{"files made", "/s", nfsEntries, func(c *nfsClient) (time.Duration, error) { return c.entries(procCreate) }, 0},
		{"files looked up", "/s", nfsEntries, func(c *nfsClient) (time.Duration, error) { return c.entries(procLookup) }, 0},
		{"files removed", "/s", nfsEntries, func(c *nfsClient) (time.Duration, error) { return c.entries(procRemove) }, 0},
	} {
		var turns []func(context.Context) (time.Duration, error)
		for _, c := range clients {
			turns = append(turns, func(context.Context) (time.Duration, error) { return row.do(c) })
		}
		all, err := b.interleave(ctx, turns...)
		if err != nil {
			return fmt.Errorf("%s: %w", row.what, err)
		}
		rate := func(d time.Duration) string { return fmt.Sprintf("%.0f %s", row.amount/d.Seconds(), row.unit) }
		b.table.compare("NFS: "+row.what, rate(all[0]), "NFS-Ganesha "+rate(all[1]), ratio(all[1], all[0]), 0, row.atLeast)
	}
	return b.directPath(ctx)
}

// directScript measures two directories in turns, by requests past the guest's page cache.
const directScript = `cd / && clock() { read -r up idle </proc/uptime; echo "$up"; }
for round in $(seq ROUNDS); do if [ $((round % 2)) = 0 ]; then set direct raw; else set raw direct; fi; for d; do
  a=$(clock); dd if=/dev/zero of=/$d/large-$d bs=1M count=64 conv=fsync 2>/dev/null || exit 1; b=$(clock); echo "written $d $a $b"
  a=$(clock); for i in 1 2 3 4 5 6 7 8; do dd if=/$d/large-$d of=/dev/null bs=1M 2>/dev/null || exit 1; done; b=$(clock); echo "read $d $a $b"
  a=$(clock); dd if=/$d/large-$d of=/dev/null bs=4k count=12000 2>/dev/null || exit 1; b=$(clock); echo "small $d $a $b"
  a=$(clock); for i in $(seq 200); do : >/$d/entry-$i; done; rm /$d/entry-*; b=$(clock); echo "entries $d $a $b"
done; done; echo end`

// directPath: what a pod has of a file volume that cradle-csi publishes as a directory of the node, beside the same directory that the pod is given by hand, both by 9p.
func (b *bench) directPath(ctx context.Context) (err error) {
	p, err := b.startPlugin(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.close()) }()
	const name = "direct"
	staging, target := filepath.Join(p.dir, "staging"), filepath.Join(p.dir, "target")
	if err := p.create(ctx, name, 0, map[string]string{"class": "nfs"}); err != nil {
		return err
	}
	late := context.WithoutCancel(ctx)
	defer func() {
		_, e1 := p.node.NodeUnpublishVolume(late, &csi.NodeUnpublishVolumeRequest{VolumeId: name, TargetPath: target})
		_, e2 := p.node.NodeUnstageVolume(late, &csi.NodeUnstageVolumeRequest{VolumeId: name, StagingTargetPath: staging})
		_, e3 := p.controller.DeleteVolume(late, &csi.DeleteVolumeRequest{VolumeId: name})
		err = errors.Join(err, e1, e2, e3)
	}()
	if _, err := p.node.NodeStageVolume(ctx, &csi.NodeStageVolumeRequest{VolumeId: name, StagingTargetPath: staging, VolumeCapability: singleWriter()}); err != nil {
		return err
	}
	if _, err := p.node.NodePublishVolume(ctx, &csi.NodePublishVolumeRequest{VolumeId: name, StagingTargetPath: staging, TargetPath: target, VolumeCapability: singleWriter()}); err != nil {
		return err
	}
	busybox, err := programs.Image("busybox")
	if err != nil {
		return err
	}
	flags := append([]string{"--volume", target + ":/direct", "--volume", filepath.Join(p.pool, name, "data") + ":/raw"}, alone...)
	at, err := b.summon(ctx, flags, busybox, "template", "sh", "-c", strings.Replace(directScript, "ROUNDS", fmt.Sprint(min(b.rounds, diskRounds)), 1))
	if err != nil {
		return err
	}
	defer os.RemoveAll(at)
	ctx, cancel := context.WithTimeout(ctx, diskTimeout)
	defer cancel()
	out, err := exec.CommandContext(ctx, b.kcradle, "run", at).CombinedOutput()
	if err != nil || !bytes.Contains(out, []byte("\nend")) {
		return fmt.Errorf("the pod that measures: %w: %s", errors.Join(err, ctx.Err()), out)
	}
	took := map[string][]time.Duration{}
	for line := range strings.Lines(string(out)) {
		var what, where string
		var from, to float64
		if n, _ := fmt.Sscan(line, &what, &where, &from, &to); n == 4 {
			took[what+" "+where] = append(took[what+" "+where], time.Duration((to-from)*float64(time.Second)))
		}
	}
	for _, row := range []struct {
		name, what, unit string
		amount           float64
	}{
		{"written", "64 MiB written, with fsync", "MB/s", nfsFile / 1e6},
		{"read", "64 MiB read, 8 times", "MB/s", 8 * nfsFile / 1e6},
		{"small", "4 KiB read one after the other", "/s", 12000},
		{"entries", "files made and removed", "/s", 200},
	} {
		// What else the machine does only adds.
		direct, raw := slices.Min(took[row.name+" direct"]), slices.Min(took[row.name+" raw"])
		rate := func(d time.Duration) string { return fmt.Sprintf("%.0f %s", row.amount/d.Seconds(), row.unit) }
		b.table.compare("a file volume of the node's in a pod: "+row.what, rate(direct), "9p of the same directory "+rate(raw), ratio(raw, direct), 0, 0.8)
	}
	return nil
}

// An nfsClient speaks version 3 to a filer, as root.
type nfsClient struct {
	cmd  *exec.Cmd
	log  locked.Buffer
	id   string // of the publication
	call func(args ...string) ([]byte, error)

	conn net.Conn
	r    *bufio.Reader
	xid  uint32
	root []byte
	file []byte
}

// Procedures (RFC 1813 §3.3, §5.2; RFC 1833 §3).
const (
	procLookup, procRead, procWrite, procCreate, procRemove, procCommit = 3, 6, 7, 8, 12, 21
	procMount, procPort                                                 = 1, 3

	programPortmapper, programNFS, programMount = 100000, 100003, 100005
)

// startFiler starts a filer in a namespace, with a portmapper where there is none yet, and publishes the volume.
func startFiler(ctx context.Context, space *netnstest.Namespace, dir, engine, port string) (c *nfsClient, err error) {
	filer, err := programs.Path("cradle-filer")
	if err != nil {
		return nil, err
	}
	home := filepath.Join(dir, engine)
	if err := os.MkdirAll(home, 0o700); err != nil {
		return nil, err
	}
	socket := filepath.Join(home, "s")
	c = &nfsClient{}
	c.call = func(args ...string) ([]byte, error) {
		out, err := exec.CommandContext(ctx, filer, append(args, "--socket", socket)...).Output()
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			err = fmt.Errorf("cradle-filer %s: %w: %s", args[0], err, exit.Stderr)
		}
		return out, err
	}
	// The portmapper's socket is this namespace's own, as its command has a mount namespace as well.
	const script = `mount -t tmpfs tmpfs /run && trust=; if [ "$4" = ganesha ]; then trust=--trust-clients; rpcbind -f & until [ -S /run/rpcbind.sock ]; do sleep 0.05; done; fi; "$0" serve --socket "$1" --pool "$2" --state "$3" --engine "$4" $trust --listen "$5"; status=$?; kill %1 2>/dev/null; exit $status`
	c.cmd = space.Command(ctx, "bash", "-c", script, filer, socket, filepath.Join(dir, "pool"), filepath.Join(home, "state"), engine, net.JoinHostPort(space.Host, port))
	c.cmd.Stdout, c.cmd.Stderr = &c.log, &c.log
	c.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	c.cmd.Cancel = func() error { return syscall.Kill(-c.cmd.Process.Pid, syscall.SIGTERM) }
	if err := c.cmd.Start(); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("%s: %w\n%s", engine, err, c.log.String()), c.close())
		}
	}()
	for end := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
		if _, err = c.call("status"); err == nil {
			break
		}
		if time.Now().After(end) {
			return nil, err
		}
	}
	out, err := c.call("publish", engine, "--client", "0.0.0.0/0", "-o", "json")
	if err != nil {
		return nil, err
	}
	var p struct{ ID, Address, Export string }
	if err := json.Unmarshal(out, &p); err != nil {
		return nil, err
	}
	c.id = p.ID
	at := p.Address
	if engine == "ganesha" {
		if err := c.dial(ctx, net.JoinHostPort(space.Host, "111")); err != nil {
			return nil, err
		}
		reply, err := c.ask(programPortmapper, 2, procPort, words(programMount, 3, syscall.IPPROTO_TCP, 0))
		if err != nil {
			return nil, err
		}
		at = net.JoinHostPort(space.Host, fmt.Sprint(binary.BigEndian.Uint32(reply)))
	}
	if err := c.dial(ctx, at); err != nil {
		return nil, err
	}
	reply, err := c.ask(programMount, 3, procMount, opaque([]byte(p.Export)))
	if err == nil && binary.BigEndian.Uint32(reply) != 0 {
		err = fmt.Errorf("mount: %d", binary.BigEndian.Uint32(reply))
	}
	if err != nil {
		return nil, err
	}
	c.root = reply[8 : 8+binary.BigEndian.Uint32(reply[4:])]
	if err := c.dial(ctx, p.Address); err != nil {
		return nil, err
	}
	c.file, err = c.create("file-" + engine)
	return c, err
}

func (c *nfsClient) close() error {
	if c.conn != nil {
		c.conn.Close()
	}
	if c.cmd == nil || c.cmd.Process == nil {
		return nil
	}
	var err error
	if c.id != "" {
		_, err = c.call("unpublish", c.id)
	}
	_ = syscall.Kill(-c.cmd.Process.Pid, syscall.SIGTERM)
	_ = c.cmd.Wait() // by that signal
	return err
}

func (c *nfsClient) dial(ctx context.Context, address string) (err error) {
	if c.conn != nil {
		c.conn.Close()
	}
	if c.conn, err = new(net.Dialer).DialContext(ctx, "tcp", address); err == nil {
		c.r = bufio.NewReaderSize(c.conn, 1<<20)
	}
	return err
}

func words(all ...uint32) (b []byte) {
	for _, n := range all {
		b = binary.BigEndian.AppendUint32(b, n)
	}
	return b
}

func opaque(data []byte) []byte {
	return append(append(words(uint32(len(data))), data...), make([]byte, -len(data)&3)...)
}

// send sends a call (RFC 5531).
func (c *nfsClient) send(program, version, proc uint32, args ...[]byte) error {
	c.xid++
	b := words(0, c.xid, 0, 2, program, version, proc, 1, 20, 0, 0, 0, 0, 0, 0, 0)
	n := len(b) - 4
	for _, a := range args {
		n += len(a)
	}
	binary.BigEndian.PutUint32(b, uint32(n)|1<<31)
	all := append(net.Buffers{b}, args...)
	_, err := all.WriteTo(c.conn)
	return err
}

// receive takes the next reply, without its head.
func (c *nfsClient) receive() ([]byte, error) {
	c.conn.SetReadDeadline(time.Now().Add(time.Minute))
	var reply []byte
	for last := false; !last; {
		head := make([]byte, 4)
		if _, err := io.ReadFull(c.r, head); err != nil {
			return nil, err
		}
		n := binary.BigEndian.Uint32(head)
		last = n>>31 == 1
		at := len(reply)
		reply = append(reply, make([]byte, n&^(1<<31))...)
		if _, err := io.ReadFull(c.r, reply[at:]); err != nil {
			return nil, err
		}
	}
	if len(reply) < 28 || binary.BigEndian.Uint32(reply[8:]) != 0 || binary.BigEndian.Uint32(reply[20:]) != 0 {
		return nil, fmt.Errorf("a call is not accepted: %x", reply)
	}
	return reply[24:], nil
}

func (c *nfsClient) ask(program, version, proc uint32, args ...[]byte) ([]byte, error) {
	if err := c.send(program, version, proc, args...); err != nil {
		return nil, err
	}
	return c.receive()
}

// many makes n calls of which some are on the way at a time. Each has to succeed.
func (c *nfsClient) many(n, depth int, proc uint32, args func(i int) [][]byte) error {
	for sent, done := 0, 0; done < n; {
		for ; sent < n && sent-done < depth; sent++ {
			if err := c.send(programNFS, 3, proc, args(sent)...); err != nil {
				return err
			}
		}
		reply, err := c.receive()
		if err != nil {
			return err
		}
		if s := binary.BigEndian.Uint32(reply); s != 0 {
			return fmt.Errorf("procedure %d: status %d", proc, s)
		}
		done++
	}
	return nil
}

func (c *nfsClient) create(name string) ([]byte, error) {
	reply, err := c.ask(programNFS, 3, procCreate, opaque(c.root), opaque([]byte(name)), words(0, 0, 0, 0, 0, 0, 0))
	if err == nil && (binary.BigEndian.Uint32(reply) != 0 || binary.BigEndian.Uint32(reply[4:]) == 0) {
		err = fmt.Errorf("create: %x", reply[:8])
	}
	if err != nil {
		return nil, err
	}
	return reply[12 : 12+binary.BigEndian.Uint32(reply[8:])], nil
}

var nfsData = bytes.Repeat([]byte("cradlestack, 32 bytes of content"), nfsPiece/32)

func (c *nfsClient) write(at int, data []byte, stable uint32) [][]byte {
	return [][]byte{opaque(c.file), words(0, uint32(at), uint32(len(data)), stable, uint32(len(data))), data}
}

func (c *nfsClient) read(at, n int) [][]byte {
	return [][]byte{opaque(c.file), words(0, uint32(at), uint32(n))}
}

func (c *nfsClient) commit() error {
	return c.many(1, 1, procCommit, func(int) [][]byte { return [][]byte{opaque(c.file), words(0, 0, 0)} })
}

func (c *nfsClient) writeAll() error {
	return errors.Join(c.many(nfsFile/nfsPiece, 8, procWrite, func(i int) [][]byte { return c.write(i*nfsPiece, nfsData, 0) }), c.commit())
}

func (c *nfsClient) readAll() error {
	return c.many(nfsFile/nfsPiece, 8, procRead, func(i int) [][]byte { return c.read(i*nfsPiece, nfsPiece) })
}

func (c *nfsClient) random(proc uint32, n, depth int) error {
	err := c.many(n, depth, proc, func(int) [][]byte {
		at := rand.IntN(nfsFile/4096) * 4096
		if proc == procRead {
			return c.read(at, 4096)
		}
		return c.write(at, nfsData[:4096], 0)
	})
	if err == nil && proc == procWrite {
		err = c.commit()
	}
	return err
}

func (c *nfsClient) synced() error {
	return c.many(nfsSynced, 1, procWrite, func(int) [][]byte { return c.write(rand.IntN(nfsFile/4096)*4096, nfsData[:4096], 2) })
}

// timed measures what a client does.
func timed(do func(c *nfsClient) error) func(c *nfsClient) (time.Duration, error) {
	return func(c *nfsClient) (time.Duration, error) {
		begun := time.Now()
		err := do(c)
		return time.Since(begun), err
	}
}

// entries makes files, looks them up and removes them, and measures one of that.
func (c *nfsClient) entries(measured uint32) (took time.Duration, err error) {
	for _, proc := range []uint32{procCreate, procLookup, procRemove} {
		begun := time.Now()
		err := c.many(nfsEntries, 1, proc, func(i int) [][]byte {
			args := [][]byte{opaque(c.root), opaque(fmt.Appendf(nil, "%s-%d", c.id, i))}
			if proc == procCreate {
				args = append(args, words(0, 0, 0, 0, 0, 0, 0))
			}
			return args
		})
		if err != nil {
			return 0, err
		}
		if proc == measured {
			took = time.Since(begun)
		}
	}
	return took, nil
}
