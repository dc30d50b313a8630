//go:build vm

package docker

// A testCase is one container on both sides. Without a script it runs in the foreground, and standard output, standard error and exit code are
// compared; with one it runs detached, and the script's are: docker reaches the container there, whose name is $c.
type testCase struct {
	name  string
	image string // of images; "" is plain
	flags []string
	// dockerFlags are for docker alone.
	dockerFlags []string
	cmd         []string
	stdin       string
	script      string
	// onlyCode: the message on standard error is each program's own.
	onlyCode bool
	// onlyFailure: not even the code is the same from one version of docker to the next, only that there is one.
	onlyFailure bool
}

func sh(script string) []string { return []string{"sh", "-c", script} }

// idle is a container that does nothing until it is told to stop.
var idle = sh("trap 'exit 0' TERM; while :; do sleep 0.1; done")

var cases = []testCase{
	// What the image says.
	{name: "image/entrypoint and command", image: "everything"},
	{name: "image/arguments replace the command", image: "everything", cmd: []string{"other"}},
	{name: "image/entrypoint given drops the command", image: "everything", flags: []string{"--entrypoint", "echo"}},
	{name: "image/entrypoint and arguments given", image: "everything", flags: []string{"--entrypoint", "echo"}, cmd: []string{"-n", "x"}},
	{name: "image/entrypoint cleared", image: "everything", flags: []string{"--entrypoint", ""}, cmd: []string{"pwd"}},
	{name: "image/shell form", image: "shellform"},
	{name: "image/shell form with arguments", image: "shellform", cmd: []string{"a", "b c"}},
	{name: "image/neither entrypoint nor command", image: "noexec", onlyCode: true},
	{name: "image/arguments are not touched", cmd: []string{"printf", "[%s]", "", " ", "a\nb", `\`, `"`, "'", "$HOME", "*", "ü"}},
	{name: "image/working directory", image: "everything", flags: []string{"--entrypoint", "pwd"}, cmd: []string{"-P"}},
	{name: "image/working directory given", flags: []string{"-w", "/usr/bin"}, cmd: []string{"pwd"}},
	{name: "image/working directory is made", image: "app", cmd: sh("pwd; id -u; stat -c '%a %u %g %n' /made /made/by /made/by/the/runtime")},
	{name: "image/working directory given is made", flags: []string{"-w", "/new/place", "-u", "1000"}, cmd: sh("pwd; stat -c '%a %u %g' .")},
	{name: "image/relative working directory", flags: []string{"-w", "usr"}, cmd: []string{"pwd"}, onlyCode: true},
	{name: "image/labels, ports and stop signal are inspected", image: "everything", flags: []string{"--entrypoint", "sleep", "--label", "mine=1"}, cmd: []string{"1000"}, script: `
		docker inspect -f '{{json .Config.Labels}} {{json .Config.ExposedPorts}} {{.Config.StopSignal}} {{.Config.WorkingDir}} {{json .Config.Cmd}} {{json .Config.Entrypoint}}' $c
		docker inspect -f '{{.Path}} {{json .Args}} {{.Config.Tty}} {{.Config.OpenStdin}} {{json .Config.User}} {{.State.Status}} {{.State.Running}}' $c`},

	// Environment. Its order is nobody's promise: dockerd now and then gives what was asked for in another.
	{name: "env/from the image", image: "everything", flags: []string{"--entrypoint", "env", "-h", "host"}, cmd: []string{"sh", "-c", "env | sort"}},
	{name: "env/given", flags: []string{"-h", "host", "-e", "A=1", "-e", "B=x=y z", "-e", "EMPTY=", "-e", "PATH=/bin"}, cmd: sh("env | sort")},
	{name: "env/given over the image's", image: "everything", flags: []string{"--entrypoint", "sh", "-e", "COLOR=red", "-e", "COLOR=green"}, cmd: []string{"-c", `echo "$COLOR"`}},
	{name: "env/taken from the caller", flags: []string{"-e", "CALLER_VARIABLE"}, cmd: sh(`echo "$CALLER_VARIABLE"`)},
	{name: "env/home of root", cmd: sh(`echo "$HOME $PATH"; cd; pwd`)},
	{name: "env/home of a user", flags: []string{"-u", "app"}, cmd: sh(`echo "$HOME"`)},
	{name: "env/home of a number", flags: []string{"-u", "4711"}, cmd: sh(`echo "$HOME"`)},
	{name: "env/home given", flags: []string{"-u", "app", "-e", "HOME=/elsewhere"}, cmd: sh(`echo "$HOME"`)},
	{name: "env/with a terminal", flags: []string{"-t", "-h", "host"}, cmd: sh("env | sort")},
	{name: "env/terminal type given", flags: []string{"-t", "-e", "TERM=dumb"}, cmd: sh(`echo "$TERM"`)},

	// Users.
	{name: "user/root", cmd: []string{"id"}},
	{name: "user/of the image", image: "app", cmd: []string{"id"}},
	{name: "user/and group of the image", image: "appgroup", cmd: []string{"id"}},
	{name: "user/name", flags: []string{"-u", "lonely"}, cmd: []string{"id"}},
	{name: "user/number of a name", flags: []string{"-u", "1000"}, cmd: []string{"id"}},
	{name: "user/number without a name", flags: []string{"-u", "4711"}, cmd: []string{"id"}},
	{name: "user/numbers", flags: []string{"-u", "4711:4712"}, cmd: []string{"id"}},
	{name: "user/name and group", flags: []string{"-u", "app:unused"}, cmd: []string{"id"}},
	{name: "user/group alone", flags: []string{"-u", ":extra"}, cmd: []string{"id"}},
	{name: "user/more groups", flags: []string{"-u", "lonely", "--group-add", "extra", "--group-add", "5000"}, cmd: []string{"id"}},
	{name: "user/unknown", flags: []string{"-u", "nobody-there"}, cmd: []string{"id"}, onlyCode: true},
	{name: "user/unknown group", flags: []string{"-u", "app:nothing"}, cmd: []string{"id"}, onlyCode: true},
	{name: "user/owns what it makes", flags: []string{"-u", "app"}, cmd: sh("cd /tmp && mkdir d && touch d/f && stat -c '%a %u %g %n' d d/f; touch /etc/x; echo $?")},

	// Privileges.
	{name: "capabilities/root", cmd: sh("grep -E '^Cap' /proc/self/status")},
	{name: "capabilities/user", flags: []string{"-u", "app"}, cmd: sh("grep -E '^Cap' /proc/self/status")},
	{name: "capabilities/dropped and added", flags: []string{"--cap-drop", "ALL", "--cap-add", "NET_BIND_SERVICE", "--cap-add", "cap_sys_admin"}, cmd: sh("grep -E '^Cap' /proc/self/status")},
	{name: "capabilities/one dropped", flags: []string{"--cap-drop", "CHOWN"}, cmd: sh("grep CapEff /proc/self/status; touch /tmp/f; chown 1 /tmp/f")},
	{name: "capabilities/added for a user", flags: []string{"-u", "app", "--cap-add", "NET_ADMIN"}, cmd: sh("grep -E '^Cap' /proc/self/status")},
	{name: "capabilities/no new privileges", flags: []string{"--security-opt", "no-new-privileges"}, cmd: sh("grep NoNewPrivs /proc/self/status")},
	{name: "capabilities/set-user-id works", image: "plain", cmd: sh("cp /bin/busybox /tmp/id && chmod 4755 /tmp/id && stat -c %a /tmp/id && su app -c '/tmp/id -u; id -u'")},
	{name: "capabilities/mount is refused", cmd: sh("mount -t tmpfs none /mnt; echo $?")},
	{name: "capabilities/mknod", cmd: sh("mknod /tmp/zero c 1 5 && head -c 3 /tmp/zero | wc -c; mknod /tmp/fifo p && stat -c %F /tmp/fifo")},
	{name: "capabilities/host name can't be changed", cmd: sh("hostname other; echo $?")},
	{name: "capabilities/clock can't be set", cmd: sh("date -s 2001-01-01 >/dev/null; echo $?")},

	// Exit codes.
	{name: "exit/0", cmd: []string{"true"}},
	{name: "exit/1", cmd: []string{"false"}},
	{name: "exit/255", cmd: sh("exit 255")},
	{name: "exit/256 is 0", cmd: sh("exit 256")},
	{name: "exit/killed by itself", cmd: sh("sh -c 'kill -9 $$'; echo $?; kill -s KILL $$; echo survived")},
	{name: "exit/no such program", cmd: []string{"no-such-program"}, onlyCode: true},
	{name: "exit/no such path", cmd: []string{"/no/such/path"}, onlyCode: true},
	{name: "exit/a directory", cmd: []string{"/etc"}, onlyCode: true},
	{name: "exit/not executable", image: "noexec", cmd: []string{"/script-no-x"}, onlyCode: true},
	{name: "exit/interpreter missing", image: "noexec", cmd: []string{"/no-interpreter"}, onlyFailure: true},
	{name: "exit/no program at all", image: "noexec", cmd: []string{"/garbage"}, onlyFailure: true},
	{name: "exit/script", image: "noexec", cmd: []string{"/script", "a b"}},
	{name: "exit/empty program name", cmd: []string{""}, onlyCode: true},
	{name: "exit/children end with the first process", cmd: sh("(sleep 2; echo late) & echo early"), script: `docker wait $c; sleep 2.5; docker logs $c`},
	{name: "exit/found on the container's own path", flags: []string{"-e", "PATH=/usr/bin"}, cmd: []string{"env", "-i", "/bin/echo", "found"}},

	// Signals.
	{name: "signal/stop is TERM", cmd: sh("trap 'echo term; exit 5' TERM; echo ready; while :; do sleep 0.1; done"), script: `
		until docker logs $c 2>&1 | grep -q ready; do sleep 0.1; done
		docker stop $c >/dev/null; docker wait $c; docker logs $c; docker inspect -f '{{.State.ExitCode}} {{.State.OOMKilled}} {{.State.Status}}' $c`},
	{name: "signal/stop signal of the image, by number", image: "quit", script: `
		until docker logs $c 2>&1 | grep -q ready; do sleep 0.1; done
		docker stop $c >/dev/null; docker wait $c; docker logs $c`},
	{name: "signal/stop signal given", flags: []string{"--stop-signal", "HUP"}, cmd: sh("trap 'echo hup; exit 6' HUP; echo ready; while :; do sleep 0.1; done"), script: `
		until docker logs $c 2>&1 | grep -q ready; do sleep 0.1; done
		docker inspect -f '{{.Config.StopSignal}}' $c; docker stop $c >/dev/null; docker wait $c; docker logs $c`},
	{name: "signal/killed after the grace time", cmd: sh("trap '' TERM; echo ready; while :; do sleep 0.1; done"), script: `
		until docker logs $c 2>&1 | grep -q ready; do sleep 0.1; done
		docker stop -t 1 $c >/dev/null; docker wait $c`},
	{name: "signal/first process ignores what it does not handle", cmd: sh("echo ready; kill -TERM $$; kill -HUP $$; echo alive")},
	{name: "signal/kill", cmd: idle, script: `docker kill $c >/dev/null; docker wait $c; docker inspect -f '{{.State.ExitCode}} {{.State.OOMKilled}}' $c`},
	{name: "signal/kill with another signal", cmd: sh("trap 'echo usr2' USR2; trap 'exit 3' TERM; echo ready; while :; do sleep 0.1; done"), script: `
		until docker logs $c | grep -q ready; do sleep 0.1; done
		docker kill -s USR2 $c >/dev/null; until docker logs $c | grep -q usr2; do sleep 0.1; done
		docker inspect -f '{{.State.Running}}' $c; docker kill -s 15 $c >/dev/null; docker wait $c`},
	{name: "signal/unknown signal", cmd: idle, script: `docker kill -s NONSENSE $c >/dev/null 2>&1; echo $?; docker inspect -f '{{.State.Running}}' $c`},
	{name: "signal/init forwards", flags: []string{"--init"}, cmd: []string{"sleep", "1000"}, script: `
		until docker exec $c ps -o comm | grep -qx sleep; do sleep 0.1; done; docker stop $c >/dev/null; docker wait $c`},
	{name: "signal/init gives the exit code", flags: []string{"--init"}, cmd: sh("exit 9")},
	{name: "signal/init reaps", flags: []string{"--init"}, cmd: sh("sh -c 'sleep 0.1 & exit 0'; sleep 0.6; ps -o stat,comm | grep -c '^Z'; echo $$ | grep -vx 1 | wc -l")},

	// Terminal and standard input.
	{name: "tty/none", cmd: sh("test -t 0; echo $?; test -t 1; echo $?; readlink /proc/self/fd/0; echo out; echo err >&2")},
	{name: "tty/terminal", flags: []string{"-t"}, cmd: sh("tty; test -t 0 && test -t 1 && test -t 2 && echo three; echo err >&2; stty -a | grep -oE ' (-?echo|-?icanon|-?onlcr|-?isig)' | tr -d '\\n'")},
	{name: "tty/terminal of a user", flags: []string{"-t", "-u", "app"}, cmd: sh("tty; stat -c '%a %u %g' $(tty); echo x >/dev/tty; stat -c '%a %u' /dev/console")},
	{name: "tty/foreground", flags: []string{"-t"}, cmd: sh("ps -o pid,pgid,tty,comm | head -n 2")},
	{name: "stdin/piped", flags: []string{"-i"}, stdin: "one\ntwo\n", cmd: []string{"cat"}},
	{name: "stdin/binary, a megabyte", flags: []string{"-i"}, stdin: megabyte, cmd: []string{"md5sum"}},
	{name: "stdin/empty", flags: []string{"-i"}, cmd: sh("cat; echo end")},
	{name: "stdin/not asked for", stdin: "unseen\n", cmd: sh("cat; echo end")},
	{name: "stdin/process does not read", flags: []string{"-i"}, stdin: megabyte, cmd: []string{"true"}},
	{name: "stdin/attached later", flags: []string{"-i"}, cmd: sh("read line; echo got $line"), script: `echo hello | docker attach $c >/dev/null; docker wait $c; docker logs $c`},
	{name: "output/apart", cmd: sh("echo 1; echo 2 >&2; echo 3; printf 4 >&2; printf 5")},
	{name: "output/half a megabyte without a newline", cmd: sh("head -c 500000 /dev/zero | tr '\\0' x | md5sum; head -c 500000 /dev/zero | tr '\\0' x")},
	{name: "output/binary", cmd: sh(`i=0; while [ $i -lt 256 ]; do printf "\\$(printf %03o $i)"; i=$((i+1)); done`)},
	{name: "output/closed early", cmd: sh("exec >&- 2>&-; sleep 0.3; exit 4")},

	// Files that every container has.
	{name: "files/hosts, hostname and resolv.conf", flags: []string{"-h", "web", "--add-host", "db:192.0.2.7", "--add-host", "six:2001:db8::1"}, cmd: sh("cat /etc/hostname; hostname; grep -v ' *web$' /etc/hosts; stat -c '%a %u %n' /etc/hosts /etc/hostname /etc/resolv.conf")},
	{name: "files/domain name", flags: []string{"-h", "web", "--domainname", "example.org"}, cmd: sh("hostname; hostname -d; cat /proc/sys/kernel/domainname; cat /etc/hostname")},
	{name: "files/default host name", cmd: sh("hostname | grep -cE '^[0-9a-f]{12}$'; test \"$(hostname)\" = \"$(cat /etc/hostname)\"; echo $?")},
	{name: "files/hosts can be written", cmd: sh("echo 192.0.2.1 added >>/etc/hosts; tail -n 1 /etc/hosts; echo changed >/etc/hostname; hostname | grep -c changed")},
	{name: "files/dev", cmd: sh("cd /dev; for f in $(ls | grep -v core); do stat -c '%n %F %a %u %g %t %T' $f; done; for l in fd stdin stdout stderr ptmx; do readlink $l; done")},
	{name: "files/dev works", cmd: sh("head -c 4 /dev/zero | wc -c; head -c 4 /dev/urandom | wc -c; echo x >/dev/null; echo x >/dev/full; echo $?; echo a | cat /dev/stdin")},
	{name: "files/dev can be written", cmd: sh("touch /dev/mine && mkdir /dev/dir && ls -d /dev/mine /dev/dir")},
	{name: "files/shm", cmd: sh("stat -c %a /dev/shm; df -k /dev/shm | awk 'NR==2 {print $2}'; grep -oE ' /dev/shm tmpfs rw,[a-z,]*' /proc/mounts | sed 's/,relatime//'")},
	{name: "files/shm size given", flags: []string{"--shm-size", "96m"}, cmd: sh("df -k /dev/shm | awk 'NR==2 {print $2}'")},
	{name: "files/masked parts of proc", cmd: sh("for f in kcore keys timer_list sched_debug; do head -c 1 /proc/$f 2>/dev/null | wc -c; done; ls -d /proc/acpi/* /sys/firmware/* 2>/dev/null | wc -l; for f in sys bus fs irq; do awk -v p=/proc/$f '$2 == p {print p, substr($4, 1, 2)}' /proc/mounts; done")},
	{name: "files/proc and sys are read-only", cmd: sh("echo 1 >/proc/sys/kernel/panic; { echo h >/proc/sysrq-trigger; } 2>/dev/null || echo refused; mkdir /sys/x; echo 1 >/proc/self/oom_score_adj && cat /proc/self/oom_score_adj")},
	{name: "files/mounts", cmd: sh("awk '{print $2, $3}' /proc/mounts | sed 's/overlay$/rootfs/; s/ [a-z0-9]*$/ &/' | grep -E '^/(proc|sys|dev|dev/pts|dev/mqueue|dev/shm) ' | sort; awk '$2 ~ \"^/(dev|dev/pts|dev/mqueue|sys)$\" {print $2, substr($4,1,2), ($4 ~ /nosuid/), ($4 ~ /noexec/), ($4 ~ /nodev/)}' /proc/mounts | sort")},
	{name: "files/no interfaces but lo and eth0", cmd: sh("ls /sys/class/net | grep -vxE 'lo|eth0' || echo none")},
	{name: "files/own processes only", cmd: sh("echo /proc/[0-9]*; cat /proc/1/comm")},
	{name: "files/umask", cmd: sh("umask; touch /tmp/f; stat -c %a /tmp/f")},
	{name: "files/open descriptors", cmd: []string{"ls", "/proc/self/fd"}},
	{name: "files/root", cmd: sh("stat -c '%a %u %g %F' /; touch /x && echo written; ls -a / | grep -v dockerenv | tr '\\n' ' '")},
	{name: "files/read-only root", flags: []string{"--read-only"}, cmd: sh("touch /x; touch /tmp/x; touch /dev/x && echo dev; touch /dev/shm/x && echo shm; echo x >>/etc/hosts && echo hosts")},
	{name: "files/read-only root with tmpfs", flags: []string{"--read-only", "--tmpfs", "/tmp", "--tmpfs", "/run/made:size=1m,mode=750,uid=1000"}, cmd: sh("touch /tmp/x && echo tmp; stat -c '%a %u %n' /tmp /run/made; df -k /run/made | awk 'NR==2 {print $2}'; grep ' /tmp ' /proc/mounts | grep -oE 'noexec|nosuid|nodev' | sort | tr '\\n' ' '; head -c 2m /dev/zero >/run/made/big; stat -c %s /run/made/big")},
	{name: "files/hard links, renames and times", cmd: sh("cd /tmp; echo a >a; ln a b; mv a c; stat -c '%h %s' b c; touch -d '2001-02-03 04:05:06' b; stat -c %Y b; ln -s c l; readlink l; mkdir d; mv d e; rmdir e && echo done")},
	{name: "files/directory of a lower layer is renamed", image: "layers", cmd: sh("mv /x/opaque /x/moved && ls /x/moved; rm -r /x/becomes-directory && ls -a /x | grep becomes")},
	{name: "files/sparse", cmd: sh("cd /tmp; dd if=/dev/zero of=s bs=1 count=1 seek=1073741823 2>/dev/null; stat -c %s s; test $(stat -c %b s) -lt 1000 && echo sparse")},
	{name: "files/fallocate", cmd: sh("cd /tmp; fallocate -l 1000000 f && stat -c %s f")},

	// Layers.
	{name: "layers/whiteouts, opaque directories and kinds", image: "layers", cmd: sh("cd /x; find . | sort; for f in $(ls | grep -v ' '); do stat -c '%n %F %a %u %g %h %s %t %T %Y' $f; done; cat replaced kept becomes-file one other; readlink dangling; md5sum zeros; cat 'ümläut €'")},
	{name: "layers/one file under two names", image: "layers", cmd: sh("cd /x; test one -ef other && echo same; echo more >>one; cat other; test one -ef other; echo $?")},

	{name: "layers/one layer several times", image: "repeated", cmd: sh("cd /x; find . | sort; cat kept file")},

	// Volumes of the image.
	{name: "volumes/content is copied up", image: "volume", cmd: sh("cd /data; find . | sort; stat -c '%n %F %a %u %g %s' . * sub/*; cat hard; readlink link; test file -ef hard && echo same; stat -c '%a %u %g' /empty /missing /missing/deep")},
	{name: "volumes/can be written", image: "volume", cmd: sh("for d in /data /empty /missing/deep; do touch $d/x && grep -c \" $d \" /proc/mounts; done")},
	{name: "volumes/stay when the container starts again", image: "volume", cmd: sh("ls /data; echo $(date) >/data/new; exec sleep 1000"), script: `
		until docker exec $c test -e /data/new; do sleep 0.1; done
		docker restart -t 0 $c >/dev/null; until docker logs $c | grep -q new; do sleep 0.1; done; docker logs $c | sort | uniq -c; docker inspect -f '{{range .Mounts}}{{.Type}} {{.Destination}} {{.RW}}
{{end}}' $c | sort`},
	{name: "volumes/read-only root leaves them writable", image: "volume", flags: []string{"--read-only"}, cmd: sh("touch /data/x && echo data; touch /x")},

	// Limits.
	{name: "limits/memory", flags: []string{"-m", "48m"}, cmd: sh("cat /sys/fs/cgroup/memory.max 2>/dev/null || cat /sys/fs/cgroup/memory/memory.limit_in_bytes"), script: `
		docker wait $c; docker logs $c; docker inspect -f '{{.HostConfig.Memory}} {{.State.OOMKilled}}' $c`},
	// Dockerd may hear of the end before it hears of the reason: a second is between them.
	{name: "limits/out of memory", flags: []string{"-m", "32m"}, dockerFlags: []string{"--memory-swap", "32m"}, cmd: sh("tail /dev/zero; code=$?; sleep 1; exit $code"), script: `
		docker wait $c; docker inspect -f '{{.State.ExitCode}} {{.State.OOMKilled}} {{.State.Status}} {{.State.Running}}' $c`},
	{name: "limits/processes", flags: []string{"--pids-limit", "12"}, cmd: sh("for i in $(seq 30); do sleep 1000 & done 2>/dev/null; echo reached"), onlyCode: true},
	{name: "limits/ulimits", flags: []string{"--ulimit", "nofile=100:200", "--ulimit", "core=0", "--ulimit", "nproc=50:60", "--ulimit", "fsize=1048576"}, cmd: sh("grep -E 'open files|core file|processes|file size' /proc/self/limits | sed 's/  */ /g'; head -c 2m /dev/zero >/tmp/f; echo $?")},
	{name: "limits/open files can be raised up to the hard limit", flags: []string{"--ulimit", "nofile=64:100"}, cmd: sh("ulimit -n; ulimit -n 100 && ulimit -n; ulimit -n 101")},
	{name: "limits/processors are inspected", flags: []string{"--cpus", "0.5", "--cpu-shares", "512"}, cmd: idle, script: `docker inspect -f '{{.HostConfig.NanoCpus}} {{.HostConfig.CpuShares}}' $c`},
	{name: "limits/sysctl", flags: []string{"--sysctl", "net.core.somaxconn=77", "--sysctl", "kernel.msgmax=4096"}, cmd: sh("cat /proc/sys/net/core/somaxconn /proc/sys/kernel/msgmax")},
	{name: "limits/oom score", flags: []string{"--oom-score-adj", "300"}, cmd: []string{"cat", "/proc/self/oom_score_adj"}},
	{name: "limits/too little memory", flags: []string{"-m", "1m"}, cmd: []string{"true"}, onlyCode: true},

	// Logs.
	{name: "logs/both streams", cmd: sh("echo out; echo err >&2"), script: `docker wait $c; docker logs $c 2>/dev/null; docker logs $c 2>&1 >/dev/null`},
	{name: "logs/tail", cmd: []string{"seq", "20"}, script: `docker wait $c; docker logs --tail 3 $c; docker logs --tail 0 $c; docker logs -n all $c | wc -l`},
	{name: "logs/timestamps", cmd: sh("echo a; echo; printf b"), script: `docker wait $c; docker logs -t $c | sed -E 's/^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:]{8}\.[0-9]{9}Z /TIME /'`},
	{name: "logs/since and until", cmd: sh("echo a; sleep 2; echo b; sleep 2; echo c"), script: `
		docker wait $c; from=$(docker logs -t $c | awk '$2 == "b" {print $1}'); docker logs --since $from $c; docker logs --until $from $c; docker logs --since 1h --until 1s $c | head -n 1; docker logs --since 2100-01-01T00:00:00Z $c`},
	{name: "logs/follow to the end", cmd: sh("for i in 1 2 3; do echo $i; sleep 0.3; done"), script: `docker logs -f $c`},
	{name: "logs/follow from the tail", cmd: sh("seq 5; until test -e /tmp/go; do sleep 0.1; done; echo later"), script: `
		until docker logs $c | grep -q 5; do sleep 0.1; done
		docker logs -f -n 1 $c | { read last; echo $last; docker exec $c touch /tmp/go >/dev/null 2>&1; cat; }`},
	{name: "logs/no newline, empty lines, long lines", cmd: sh("printf 'a\n\n\nb'; sleep 0.2; printf c; head -c 40000 /dev/zero | tr '\\0' y"), script: `docker wait $c; docker logs $c | md5sum`},
	{name: "logs/tail of a long line", cmd: sh("echo a; head -c 40000 /dev/zero | tr '\\0' y; echo; echo b"), script: `docker wait $c; docker logs --tail 2 $c | wc -c; docker logs --tail 1 $c`},
	{name: "logs/terminal", flags: []string{"-t"}, cmd: sh("echo a; echo b >&2"), script: `docker wait $c; docker logs $c | od -c`},
	{name: "logs/survive a restart", cmd: sh("echo run; exec sleep 1000"), script: `
		until docker logs $c | grep -q run; do sleep 0.1; done; docker restart -t 0 $c >/dev/null
		until [ $(docker logs $c | grep -c run) = 2 ]; do sleep 0.1; done; docker logs $c`},

	// Exec.
	{name: "exec/output and code", cmd: idle, script: `docker exec $c sh -c 'echo out; echo err >&2; exit 6'; echo $?`},
	{name: "exec/user, directory and environment", image: "app", flags: []string{"-e", "A=1"}, cmd: idle, script: `
		docker exec $c id; docker exec $c pwd; docker exec $c sh -c 'echo $A $HOME'
		docker exec -u 0 -w /tmp -e A=2 -e B=3 $c sh -c 'id -u; pwd; echo $A $B $HOME'; docker exec -u lonely $c id; docker exec -u 4711:12 $c id`},
	{name: "exec/standard input", cmd: idle, script: `printf 'a\nb' | docker exec -i $c wc; echo unseen | docker exec $c cat; echo $?`},
	{name: "exec/terminal", cmd: idle, script: `docker exec -t $c sh -c 'test -t 1 && echo terminal; echo $TERM' | od -c`},
	{name: "exec/no such program", cmd: idle, script: `docker exec $c nonsense >/dev/null 2>&1 || echo ${?%[67]}; docker exec $c /etc >/dev/null 2>&1 || echo ${?%[67]}`},
	{name: "exec/unknown user", cmd: idle, script: `docker exec -u nobody-there $c true >/dev/null 2>&1 || echo refused`},
	{name: "exec/unknown group, no command", cmd: idle, script: `docker exec -u app:nothing $c true >/dev/null 2>&1; echo $?; docker exec $c '' >/dev/null 2>&1 || echo ${?%[67]}`},
	{name: "exec/working directory missing", cmd: idle, script: `docker exec -w /nowhere $c true >/dev/null 2>&1 || echo ${?%[67]}; docker exec -w tmp $c true >/dev/null 2>&1; echo $?`},
	{name: "exec/capabilities", flags: []string{"--cap-drop", "CHOWN"}, cmd: idle, script: `docker exec $c grep CapEff /proc/self/status; docker exec -u app $c grep CapEff /proc/self/status`},
	{name: "exec/killed", cmd: idle, script: `docker exec $c sh -c 'kill -9 $$'; echo $?`},
	{name: "exec/detached", cmd: idle, script: `docker exec -d $c sh -c 'echo done >/tmp/done'; until docker exec $c test -e /tmp/done; do sleep 0.1; done; docker exec $c cat /tmp/done`},
	{name: "exec/in a stopped container", cmd: []string{"true"}, script: `docker wait $c; docker exec $c true >/dev/null 2>&1; echo $?`},
	{name: "exec/sees the same files and processes", cmd: sh("echo x >/tmp/x; mkdir -p /mnt/t; exec sleep 1000"), script: `until docker exec $c test -d /mnt/t; do sleep 0.1; done; docker exec $c cat /tmp/x /proc/1/comm; docker exec $c hostname | wc -c`},

	// Files in and out.
	{name: "cp/file out and in", cmd: idle, script: `
		d=$(mktemp -d); docker exec $c sh -c 'echo content >/tmp/f; chmod 640 /tmp/f; chown 1000:2000 /tmp/f'
		docker cp $c:/tmp/f $d/f 2>/dev/null; cat $d/f; stat -c %a $d/f; echo new >$d/g; chmod 604 $d/g; docker cp $d/g $c:/tmp/ 2>/dev/null; docker exec $c stat -c '%a %u %g %s' /tmp/g; rm -r $d`},
	{name: "cp/directory", cmd: idle, script: `
		d=$(mktemp -d); mkdir -p $d/in/sub; echo 1 >$d/in/one; ln -s one $d/in/link; chmod 700 $d/in/sub
		docker cp $d/in $c:/tmp 2>/dev/null; docker cp $d/in/. $c:/mnt 2>/dev/null; docker exec $c sh -c 'find /tmp/in /mnt | sort; readlink /tmp/in/link; stat -c %a /tmp/in/sub'
		docker cp $c:/tmp/in $d/out 2>/dev/null; (cd $d/out; find . | sort); rm -r $d`},
	{name: "cp/ownership in a stream", cmd: idle, script: `docker exec $c sh -c 'mkdir /tmp/d; echo x >/tmp/d/f; chown -R 1000:2000 /tmp/d; chmod 4750 /tmp/d/f; ln -s f /tmp/d/l'; docker cp $c:/tmp/d - | tar --numeric-owner -tv | awk '{print $1, $2, $3, $6, $7, $8}'`},
	{name: "cp/stream in", cmd: idle, script: `d=$(mktemp -d); echo x >$d/f; tar -C $d --owner=1000 --group=2000 --numeric-owner -c f | docker cp -a - $c:/tmp; docker exec $c stat -c '%u %g %s' /tmp/f; rm -r $d`},
	{name: "cp/missing", cmd: idle, script: `docker cp $c:/nowhere - >/dev/null 2>&1; echo $?; docker cp /etc/hostname $c:/nowhere/x >/dev/null 2>&1; echo $?; docker cp /etc/hostname $c:/etc/hostname/x >/dev/null 2>&1; echo $?`},
	{name: "cp/symbolic links stay inside", cmd: idle, script: `docker exec $c sh -c 'mkdir /tmp/t; ln -s /tmp/t /tmp/in; ln -s ../../../../../etc/passwd /tmp/out; echo root >/root/r'; docker cp /etc/debian_version $c:/tmp/in/v 2>/dev/null; docker exec $c ls /tmp/t; docker cp -L $c:/tmp/out - | tar -xO | head -n 1`},
	{name: "cp/from a stopped container", cmd: sh("echo kept >/kept"), script: `docker wait $c; docker cp $c:/kept - | tar -xO; echo 1 | tar -c -C /etc hostname | docker cp - $c:/tmp; echo $?`},
	{name: "cp/into a volume", image: "volume", cmd: idle, script: `docker cp /etc/debian_version $c:/data/v 2>/dev/null; docker exec $c sh -c 'ls /data; wc -l </data/v'; docker cp $c:/data/file - | tar -xO`},
	{name: "diff", image: "layers", cmd: idle, script: `docker exec $c sh -c 'echo x >/new; rm /x/kept; echo y >>/x/replaced; mkdir /x/d; rm -r /x/opaque; chmod 600 /x/one'; docker diff $c | grep -E '/x|/new' | sort -k 2`},
	{name: "export", image: "layers", cmd: idle, script: `docker exec $c touch /x/mine; docker export $c | tar --numeric-owner -tv x etc/passwd 2>/dev/null | awk '{print $1, $2, $3, $6, $7, $8, $9}' | sort -k 4 | grep -v '^-.*zeros'`},

	// The container's life.
	{name: "life/start again keeps the files", cmd: sh("echo $(ls /tmp | wc -l); touch /tmp/$$x; touch /tmp/more"), script: `
		docker wait $c; docker start $c >/dev/null; docker wait $c; docker logs $c; docker inspect -f '{{.State.ExitCode}} {{.RestartCount}}' $c`},
	{name: "life/start again attached", cmd: sh("echo hello; exit 3"), script: `docker wait $c; docker start -a $c; echo $?`},
	{name: "life/pause", cmd: sh("i=0; while :; do i=$((i+1)); echo $i >/tmp/i; sleep 0.05; done"), script: `
		docker pause $c >/dev/null; docker inspect -f '{{.State.Status}} {{.State.Paused}} {{.State.Running}}' $c; docker exec $c true >/dev/null 2>&1; echo $?
		docker pause $c >/dev/null 2>&1; echo $?; docker unpause $c >/dev/null; docker inspect -f '{{.State.Status}}' $c; docker unpause $c >/dev/null 2>&1; echo $?; docker exec $c true; echo $?`},
	{name: "life/stop a stopped one", cmd: []string{"true"}, script: `docker wait $c; docker stop $c >/dev/null; echo $?; docker kill $c >/dev/null 2>&1; echo $?; docker start $c >/dev/null; echo $?`},
	{name: "life/restart", cmd: idle, script: `docker restart $c >/dev/null; echo $?; docker inspect -f '{{.State.Running}} {{.RestartCount}} {{.State.ExitCode}}' $c`},
	{name: "life/wait gives the code", cmd: sh("sleep 0.5; exit 11"), script: `docker wait $c; docker wait $c`},
	{name: "life/state after the end", cmd: sh("exit 2"), script: `docker wait $c; docker inspect -f '{{.State.Status}} {{.State.Running}} {{.State.Paused}} {{.State.Restarting}} {{.State.OOMKilled}} {{.State.Dead}} {{.State.Pid}} {{.State.ExitCode}} {{json .State.Error}}' $c; docker inspect -f '{{.State.StartedAt}} {{.State.FinishedAt}}' $c | grep -cE '^20[0-9T:.-]+Z 20[0-9T:.-]+Z$'`},
	{name: "life/ps", image: "everything", flags: []string{"--entrypoint", "sleep"}, cmd: []string{"1000"}, script: `docker ps --filter name=$c --format '{{.Names}} {{.Command}} {{.State}}' --no-trunc; docker ps -q --filter name=$c | grep -cE '^[0-9a-f]{12}$'; docker ps -q --filter name=$c --filter status=exited`},
	{name: "life/found by the start of its id", cmd: idle, script: `id=$(docker inspect -f '{{.Id}}' $c); echo ${#id}; docker exec $(echo $id | cut -c1-8) echo found; docker inspect nonsense-name 2>&1 | grep -c 'No such object'`},
	{name: "life/top", cmd: sh("sleep 1000 & exec sleep 2000"), script: `
		until docker top $c -o pid,args | grep -v 'sh -c' | grep -c sleep | grep -qx 2; do sleep 0.1; done; docker top $c -o pid,args | sed 's/^ *[0-9PID]* *//' | sort; docker top $c | head -n 1`},
	{name: "life/stats", cmd: idle, script: `docker stats --no-stream --format '{{.Name}} {{.PIDs}}' $c | sed -E 's/ [0-9]+$/ N/'`},
	{name: "life/attach gives the exit code", cmd: sh("until test -e /tmp/go; do echo waits; sleep 0.1; done; echo end; exit 8"), script: `
		{ docker attach $c; echo $?; } | { read waits; docker exec $c touch /tmp/go >/dev/null 2>&1; grep -v waits; }`},
	{name: "life/inspect of a missing one", cmd: idle, script: `for verb in logs stop kill start restart pause wait top; do docker $verb no-such-container >/dev/null 2>&1; echo $verb $?; done`},

	// Health.
	{name: "health/becomes healthy, then not", image: "healthy", cmd: idle, script: `
		docker inspect -f '{{json .Config.Healthcheck.Test}} {{.Config.Healthcheck.Retries}}' $c
		docker exec $c touch /tmp/well; until [ $(docker inspect -f '{{.State.Health.Status}}' $c) = healthy ]; do sleep 0.2; done
		docker exec $c rm /tmp/well; until [ $(docker inspect -f '{{.State.Health.Status}}' $c) = unhealthy ]; do sleep 0.2; done
		docker inspect -f '{{.State.Health.Status}} {{(index .State.Health.Log 0).Output}}' $c; docker ps --filter name=$c --filter health=unhealthy --format '{{.Names}}'`},
	{name: "health/given", flags: []string{"--health-cmd", "false", "--health-interval", "200ms", "--health-retries", "1"}, cmd: idle, script: `until [ $(docker inspect -f '{{.State.Health.Status}}' $c) = unhealthy ]; do sleep 0.2; done; docker inspect -f '{{json .Config.Healthcheck.Test}} {{(index .State.Health.Log 0).ExitCode}}' $c`},
	{name: "health/switched off", image: "healthy", flags: []string{"--no-healthcheck"}, cmd: idle, script: `docker inspect -f '{{json .Config.Healthcheck.Test}} {{json .State.Health}}' $c`},
	{name: "health/none", cmd: idle, script: `docker inspect -f '{{json .State.Health}}' $c`},
}
