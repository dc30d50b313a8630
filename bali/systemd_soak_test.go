//go:build vm && soak

package main

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
)

// TestVMSoakSystemd does TestVMSystemd's and goes on: volumes and docker's
// client, upgrades, a rollback, the loss of the image server, a reboot. What
// happens inside is testdata/vm/drills.sh.
func TestVMSoakSystemd(t *testing.T) {
	p := newPlace(t)
	base := p.machines()
	p.keys("node", "10.0.2.15")
	p.busybox()
	p.sh(`for image in consul.tar.gz nomad.tar.zst; do
  name=${image%%.*}
  bali extract job/web/$name.tar.zst ${name}2
  bali build job/web/${name}2.${image#*.} --from ./${name}2 --env UPGRADED=1
done
bali build job/broken.tar.gz --from ./app --entrypoint /bin/sh --cmd -c --cmd 'echo broken; exit 1'
BALI_KEY=foreign bali id
BALI_KEY=foreign bali build job/foreign.tar.gz --from ./app --entrypoint /bin/sh
cp "$(command -v docker)" job/docker || { echo apt-get install docker.io; exit 1; }
tar cf job/app.tar -C app .
cat >app/hello.sh <<'END'
right=wrong; [ "$LISTEN_PID" = $$ ] && right=right
echo "fds=$LISTEN_FDS pid=$right notify=$NOTIFY_SOCKET" >/run/hello.new
mv /run/hello.new /run/hello
exec sleep 100000
END
for a in mv sleep; do ln -s busybox app/bin/$a; done
bali build job/web/hello.tar.gz --from ./app --entrypoint /bin/sh --cmd /hello.sh --env PATH=/bin`)
	if err := os.WriteFile(filepath.Join(p.dir, "job/volume.hcl"), []byte(volume), 0o644); err != nil {
		t.Fatal(err)
	}
	m := p.machine(base, "node", "drills.sh")
	m.boot(userNet, "ok: it starts from the cache when the server is gone")
	if !t.Failed() {
		m.boot(userNet, "ok: after the reboot all is there")
	}
}

// TestVMSoakCluster makes three machines the servers and clients of one
// cluster, from images on a stick, and runs a pod in it. What happens inside is
// testdata/vm/cluster.sh.
func TestVMSoakCluster(t *testing.T) {
	p := newPlace(t)
	base := p.machines()
	p.busybox()
	var all []*machine
	for n := 1; n <= 3; n++ {
		name := fmt.Sprint("node", n)
		p.keys(name, fmt.Sprint("10.1.0.", n))
		all = append(all, p.machine(base, name, "cluster.sh", fmt.Sprint("number=", n)))
	}
	l, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	network := fmt.Sprintf("socket,id=n0,mcast=230.0.0.1:%d,localaddr=127.0.0.1", l.LocalAddr().(*net.UDPAddr).Port)
	l.Close()
	var wg sync.WaitGroup
	for _, m := range all {
		wg.Go(func() { m.boot(network, "ok: done") })
	}
	wg.Wait()
}

// busybox gives the machines the example image, to run in a pod.
func (p *place) busybox() {
	p.t.Helper()
	cache := os.Getenv("XDG_CACHE_HOME")
	if cache == "" {
		cache = filepath.Join(os.Getenv("HOME"), ".cache")
	}
	image := filepath.Join(cache, "cradlestack/images/busybox")
	if _, err := os.Stat(image); err != nil {
		p.t.Fatalf("%v: make images", err)
	}
	p.sh("cp -r " + image + " job/")
}
