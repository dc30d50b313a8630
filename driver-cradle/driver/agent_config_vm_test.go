//go:build vm

package driver

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
)

// shows is what the task of TestVMAgentConfig sees of its configuration.
const shows = `
name    named cradle.test
made    /made/here
who     1000 1001 1001 1002
process /sbin/docker-init
caps    bounded
newpriv 1
nofile  100 200
somaxconn 77
fuse    229
oom     500
pids    40
cpu     50000
shm     8192
scratch 1024 1700
memory  2048
disk    small
shared  from the container beside
hosts   192.0.2.7 db
dns     nameserver 192.0.2.53 search cradle.test options ndots:3
entry   point
vcpus   2
`

// Every key of the configuration that a container can see does what it says.
func TestVMAgentConfig(t *testing.T) {
	c := openAgents(t)
	show := func(name, command string) string { return fmt.Sprintf("echo %s $(%s)\n", name, command) }
	script := show("name", "cat /proc/sys/kernel/hostname /proc/sys/kernel/domainname") +
		show("made", "pwd") + show("who", "id -u; id -g; id -G") + show("process", "head -c 17 /proc/1/cmdline") +
		// CAP_CHOWN is bit 0, CAP_SYS_TIME bit 25 (capabilities(7)).
		show("caps", `b=$((0x$(awk '/^CapBnd/ {print $2}' /proc/self/status))); [ $((b & 1)) = 0 ] && [ $((b >> 25 & 1)) = 1 ] && echo bounded`) +
		show("newpriv", `awk '/^NoNewPrivs/ {print $2}' /proc/self/status`) + show("nofile", "ulimit -Sn; ulimit -Hn") +
		show("somaxconn", "cat /proc/sys/net/core/somaxconn") + show("fuse", "stat -c %T /dev/fuse | while read n; do echo $((0x$n)); done") +
		show("oom", "cat /proc/self/oom_score_adj") + show("pids", "cat /sys/fs/cgroup/pids.max") + show("cpu", "cut -d' ' -f1 /sys/fs/cgroup/cpu.max") +
		show("shm", "df -k /dev/shm | awk 'END {print $2}'") + show("scratch", "df -k /scratch | awk 'END {print $2}'; stat -c %a /scratch") +
		show("memory", "df -k /memory | awk 'END {print $2}'") + show("disk", "df -m /shared | awk 'END {if ($2 < 64) print \"small\"}'") +
		show("shared", "cat /shared/file") + show("hosts", "awk '/ *db$/ {print $1, $2}' /etc/hosts") + show("dns", "cat /etc/resolv.conf") +
		show("entry", "echo $ENTRY") + show("vcpus", "nproc") + "exec sleep 1000\n"
	job := c.Run(t, strings.Replace(jobOf("config", script, fmt.Sprintf(`
        entrypoint         = ["env", "ENTRY=point"]
        user               = "1000:1001"
        group_add          = ["1002"]
        work_dir           = "/made/here"
        hostname           = "named"
        domainname         = "cradle.test"
        init               = true
        cap_add            = ["sys_time"]
        cap_drop           = ["chown"]
        no_new_privileges  = true
        tmpfs              = ["/scratch:size=1m,mode=1700"]
        shm_size           = "8MiB"
        devices            = ["/dev/fuse"]
        oom_score_adj      = 500
        pids_limit         = 40
        cpus               = 0.5
        disk               = "64MiB"
        vcpus              = 2
        extra_hosts        = ["db:192.0.2.7"]
        dns_servers        = ["192.0.2.53"]
        dns_search_domains = ["cradle.test"]
        dns_options        = ["ndots:3"]
        labels = {
          "test.kind" = "shown"
        }
        ulimit {
          nofile = "100:200"
        }
        sysctl = {
          "net.core.somaxconn" = "77"
        }
        mount {
          type    = "tmpfs"
          target  = "/memory"
          options = "size=2m"
        }
        mount {
          source = "common"
          target = "/shared"
        }
        healthcheck {
          test     = ["CMD-SHELL", "test -d /shared"]
          interval = "1s"
        }
        lifecycle {
          after {
            container = "beside"
            until     = "healthy"
          }
        }
        container "beside" {
          image   = "oci:%[1]s/busybox"
          command = "sh"
          args    = ["-c", "test -t 1 && echo on a terminal; echo from the container beside >/there/file; exec sleep 1000"]
          tty     = true
          mount {
            source = "common"
            target = "/there"
          }
          healthcheck {
            test     = ["CMD", "test", "-s", "/there/file"]
            interval = "1s"
          }
        }
        container "failing" {
          image   = "oci:%[1]s/busybox"
          command = "sh"
          args    = ["-c", "echo try; exit 1"]
          lifecycle {
            restart_on_failure = true
            restart_delay      = "10ms"
            max_starts         = 3
          }
        }
        container "reads" {
          image   = "oci:%[1]s/busybox"
          command = "sh"
          args    = ["-c", "ls /alloc /local /secrets >/dev/null && echo $WHICH; echo x 2>/dev/null >/again/file || echo only reads"]
          env {
            WHICH = "its own"
          }
          mount {
            type     = "task"
            source   = "/shared"
            target   = "/again"
            readonly = true
          }
        }`, shared.images)), "command = \"sh\"", "command = \"sh\"", 1))
	a := c.UntilRunning(t, job)
	out := c.UntilLogs(t, a.ID, "main", "stdout", func(s string) bool {
		return strings.Contains(s, "vcpus ") && strings.Count(s, "failing: try\n") >= 3 && strings.Contains(s, "reads: only reads\n") && strings.Contains(s, "beside: ")
	})
	for line := range strings.Lines(strings.TrimSpace(shows) + "\nbeside: on a terminal\r\nreads: its own\nreads: only reads\n") {
		name, value, _ := strings.Cut(line, " ")
		if want := name + " " + strings.TrimLeft(value, " "); !strings.Contains("\n"+out, "\n"+want) {
			t.Errorf("the line %q is missing", want)
		}
	}
	if n := strings.Count(out, "failing: try\n"); n != 3 {
		t.Errorf("the container that fails has been started %d times", n)
	}
	// What only docker's API of the pod shows.
	answer, stderr, code := c.TryCLI(t, "GET /containers/main/json HTTP/1.0\r\n\r\n", "alloc", "exec", "-i", "-t=false", a.ID, "cradle:vdocker")
	_, body, _ := strings.Cut(answer, "\r\n\r\n")
	var inspected struct {
		Config struct{ Labels map[string]string }
		State  struct{ Health struct{ Status string } }
	}
	if err := json.Unmarshal([]byte(body), &inspected); err != nil || inspected.Config.Labels["test.kind"] != "shown" || inspected.State.Health.Status == "" {
		t.Errorf("docker's API says %d, %q, %v: %s", code, answer, err, stderr)
	}
	c.Stop(t, job)
	if t.Failed() {
		t.Log(out)
	}
}

// A task has the memory that it asks for, whatever its machine and the files that it reads take beside; it has no more; and it has the processors.
func TestVMAgentResources(t *testing.T) {
	c := openAgents(t)
	former, _, err := c.API.Operator().SchedulerGetConfiguration(nil)
	if err != nil {
		t.Fatal(err)
	}
	changed := *former.SchedulerConfig
	changed.MemoryOversubscriptionEnabled = true // memory_max
	if _, _, err := c.API.Operator().SchedulerSetConfiguration(&changed, nil); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if _, _, err := c.API.Operator().SchedulerSetConfiguration(former.SchedulerConfig, nil); err != nil {
			t.Error(err)
		}
	})
	node, _, err := c.API.Nodes().Info(nodeID(t, c), nil)
	if err != nil {
		t.Fatal(err)
	}
	cpu := node.NodeResources.Cpu
	core := cpu.CpuShares / int64(cpu.TotalCpuCores)
	t.Run("all", func(t *testing.T) { // ends before the configuration is as it was
		for name, test := range map[string]struct{ resources, script, want string }{
			"within": {"cpu = 100\nmemory = 64", "head -c 52000000 /dev/zero >/memory/x; dd if=/dev/zero of=/root/f bs=1M count=80 2>/dev/null; wc -c </root/f", "83886080\n"},
			"max":    {"cpu = 100\nmemory = 32\nmemory_max = 64", "head -c 50000000 /dev/zero >/memory/x; stat -c %s /memory/x", "50000000\n"},
			"beyond": {"cpu = 100\nmemory = 64", "exec tail /dev/zero", ""},
			"cores":  {"cores = 1\nmemory = 64", "nproc", "1\n"},
			"part":   {fmt.Sprintf("cpu = %d\nmemory = 64", core/2), "nproc", "1\n"},
			"more":   {fmt.Sprintf("cpu = %d\nmemory = 64", core*5/4), "nproc", fmt.Sprintf("%d\n", min(2, cpu.TotalCpuCores))},
		} {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				job := jobOf(name, test.script, "mount {\n  type = \"tmpfs\"\n  target = \"/memory\"\n  options = \"size=1g\"\n}", "", once)
				a := c.UntilEnded(t, c.Run(t, batch(strings.Replace(job, "cpu    = 100\n        memory = 64", test.resources, 1))))
				if out := c.Logs(t, a.ID, "main", "stdout"); out != test.want {
					t.Errorf("it says %q, want %q", out, test.want)
				}
				eventually(t, func() string { return events(t, c, a.ID) }, func(s string) bool { return strings.Contains(s, "oom_killed:true") == (test.want == "") })
			})
		}
	})
}
