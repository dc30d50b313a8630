package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spf13/pflag"

	"github.com/cradlestack/cradlestack/internal/golden"
)

// Each case of testdata/flags.golden is a command line of summon, without the directory, and the Pod that it makes.
func TestFlags(t *testing.T) {
	t.Setenv("FROM_OUTSIDE", "yes")
	t.Chdir("/")
	cases := []string{
		"busybox",
		"busybox echo hello",
		"--name web -h host --domainname example.org -u nobody:www-data -w /opt/../srv/ --entrypoint /bin/sh --stop-signal SIGQUIT --stop-timeout 3 nginx",
		"--entrypoint= busybox /bin/true",
		"-e A=1 -e B= -e FROM_OUTSIDE -e NOT_THERE busybox",
		"-p 80 -p 8080:80 -p 127.0.0.1:53:53/udp -p 9000-9001:90-91 -p [::1]:81:81 busybox",
		"-v data:/data -v /anon -v data:/again:ro -v /etc/hostname:/h:ro -v /tmp:/tmp:virtiofs -v /srv/disk.img:/d:xfs,ro -v nfs://10.0.0.1/export/a:/n:ro,vers=4.1 busybox",
		"-v /srv/root.img:/:size=2g busybox",
		"--mount type=bind,source=/tmp,target=/t,readonly --mount type=block,src=/srv/x.img,dst=/x,fstype=xfs,options=noatime --mount type=block,src=/srv/raw.img,raw --mount type=tmpfs,target=/r,tmpfs-size=1m --mount type=nfs,source=host:2049/e,target=/n --mount source=v,target=/v,nocopy,subpath=a/b busybox",
		"--tmpfs /run:size=1m,mode=700 --tmpfs /tmp --shm-size 1g --read-only --init --privileged --cap-add NET_ADMIN --cap-drop ALL --device /dev/net/tun --group-add 7 --ulimit nofile=10:20 --sysctl net.core.somaxconn=7 --security-opt no-new-privileges --pids-limit 9 -t -i busybox",
		"-m 64m --cpus 2 --scratch-size 1g --log-max-size 10m --accel tcg --start cold busybox",
		"--cpus 0.5 busybox",
		"--restart always --restart-delay 1s busybox",
		"--restart on-failure:3 busybox",
		"--health-cmd true --health-interval 1s --health-retries 2 busybox",
		"--health-timeout 5s busybox",
		"--no-healthcheck busybox",
		"--network none --dns 192.0.2.1 --dns-search a.example --dns-option ndots:1 --add-host a:192.0.2.2 --add-host b=2001:db8::1 busybox",
		"--netns /run/netns/x --upstream 9191 --upstream 9192 busybox",
	}
	var b strings.Builder
	for _, line := range cases {
		var p podFlags
		f := pflag.NewFlagSet("summon", pflag.ContinueOnError)
		f.SetInterspersed(false)
		p.register(f)
		if err := f.Parse(strings.Fields(line)); err != nil {
			t.Fatalf("%s: %v", line, err)
		}
		pod, _, err := p.pod("dir", f.Arg(0), f.Args()[1:])
		if err != nil {
			t.Fatalf("%s: %v", line, err)
		}
		if err := pod.Validate(); err != nil {
			t.Errorf("%s: %v", line, err)
		}
		data, err := json.MarshalIndent(pod, "", "  ")
		if err != nil {
			t.Fatal(err)
		}
		b.WriteString("$ " + line + "\n" + string(data) + "\n\n")
	}
	golden.Compare(t, filepath.Join(startDir, "testdata/flags.golden"), []byte(b.String()))
}

var startDir = func() string { d, _ := os.Getwd(); return d }()
