//go:build vm && soak

package docker

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/cradlestack/cradlestack/internal/locked"
	"github.com/cradlestack/cradlestack/internal/nomadtest"
	"github.com/cradlestack/cradlestack/test/dockerd"
	"github.com/cradlestack/cradlestack/test/programs"
)

// commandCases are scripts of docker's command line about more than one container; $c begins names of their own. What dockerd says against something is compared where all of
// its versions have the same words for it: Debian's is older than the API that is served here.
var commandCases = []testCase{
	{name: "commands/create, start, wait, rm", script: `
		docker create --name $c-1 --label $c=1 compat/plain:1 sh -c 'echo hello; exit 4' | grep -cE '^[0-9a-f]{64}$'
		docker ps -a --filter label=$c --format '{{.Names}} {{.State}} {{.Status}}'; docker start $c-1; docker wait $c-1; docker logs $c-1
		docker ps -a --filter label=$c --filter exited=4 --format '{{.Names}} {{.State}}'; docker rm $c-1; docker ps -aq --filter label=$c; docker rm $c-1; echo $?`},
	{name: "commands/start attached with input", script: `docker create -i --name $c-1 compat/plain:1 sh -c 'cat; exit 3' >/dev/null; echo typed | docker start -ai $c-1; echo $?; docker rm $c-1`},
	{name: "commands/one name for two", script: `
		docker create --name $c-1 compat/plain:1 true >/dev/null; docker create --name $c-1 compat/plain:1 true 2>&1 | sed -E 's/[0-9a-f]{64}/ID/g'; docker rename $c-1 $c-2; docker rename $c-2 $c-2; echo $?
		docker create --name $c-1 compat/plain:1 true >/dev/null; docker rename $c-1 $c-2 2>&1 | sed -E 's/[0-9a-f]{64}/ID/g'; docker rm $c-1 $c-2`},
	{name: "commands/rm of one that runs", script: `
		docker run -d --name $c-1 compat/plain:1 sleep 1000 >/dev/null; docker rm $c-1 2>/dev/null; echo $?; docker rm -f $c-1; docker rm -f $c-1; echo $?; docker inspect $c-1; echo $?`},
	{name: "commands/run --rm", script: `docker run --rm --name $c-1 compat/plain:1 sh -c 'echo out; echo err >&2; exit 5'; echo $?; docker ps -aq --filter name=$c-1`},
	{name: "commands/run of what is not there", script: `docker run --rm --pull never compat/nowhere:9 true; echo $?; docker create --pull never compat/nowhere:9; echo $?; docker run --rm --name 'a b' compat/plain:1 true 2>&1 | head -n 1`},
	{name: "commands/ps filters and formats", script: `
		docker run -d --name $c-1 --label t=$c --label tier=a compat/plain:1 sleep 1000 >/dev/null; docker create --name $c-2 --label t=$c compat/plain:1 true >/dev/null; docker run --name $c-3 --label t=$c compat/plain:1 sh -c 'exit 7'
		for f in status=running status=created status=exited exited=7 label=tier label=tier=a label=tier=b name=$c-2 ancestor=compat/plain:1 before=$c-2 since=$c-1 is-task=true health=none; do
			echo $f: $(docker ps -a --filter label=t=$c --filter $f --format '{{.Names}}' | sort); done
		docker ps --filter label=t=$c --format '{{.Names}} {{.Image}} {{.Command}} {{.Ports}} {{.Label "tier"}}'; docker ps -a --filter label=t=$c --filter nonsense=1 2>/dev/null; echo $?; docker ps -a --filter label=t=$c --filter status=asleep 2>/dev/null; echo $?
		docker ps -a --filter label=t=$c -n 1 --format '{{.Names}}'; docker ps --filter label=t=$c --no-trunc --format '{{len .ID}}'; docker rm -f $c-1 $c-2 $c-3`},
	{name: "commands/stop and kill with times and signals", script: `
		docker run -d --name $c-1 compat/plain:1 sh -c 'trap "echo term; exit 9" TERM; echo ready; while :; do sleep 0.1; done' >/dev/null; until docker logs $c-1 | grep -q ready; do sleep 0.1; done
		docker stop -t 100 $c-1; docker inspect -f '{{.State.ExitCode}} {{.State.Status}}' $c-1; docker logs $c-1; docker start $c-1; docker kill -s KILL $c-1; docker wait $c-1; docker kill $c-1 2>/dev/null; echo $?; docker rm $c-1`},
	{name: "commands/stop signal and time of the container's", script: `
		for time in 1 100; do docker run -d --name $c-$time --stop-signal HUP --stop-timeout $time compat/plain:1 sh -c 'trap "sleep 6; echo late; exit 5" HUP; echo ready; while :; do sleep 0.1; done' >/dev/null; until docker logs $c-$time | grep -q ready; do sleep 0.1; done
			docker stop $c-$time; docker logs $c-$time; docker inspect -f '{{.State.ExitCode}} {{.Config.StopTimeout}}' $c-$time; docker rm $c-$time; done`},
	{name: "commands/restart policy", script: `
		docker run -d --restart on-failure:2 --name $c-1 compat/plain:1 sh -c 'echo try; exit 3' >/dev/null; until [ "$(docker inspect -f '{{.State.Status}} {{.RestartCount}}' $c-1)" = "exited 2" ]; do sleep 0.2; done
		docker logs $c-1; docker inspect -f '{{.HostConfig.RestartPolicy.Name}} {{.HostConfig.RestartPolicy.MaximumRetryCount}} {{.State.ExitCode}}' $c-1; docker update --restart no $c-1; docker inspect -f '{{.HostConfig.RestartPolicy.Name}}' $c-1; docker rm $c-1`},
	{name: "commands/update", script: `
		docker run -d --name $c-1 -m 64m compat/plain:1 sleep 1000 >/dev/null; docker update --memory 96m --memory-swap -1 --cpus 0.5 --pids-limit 50 $c-1; docker inspect -f '{{.HostConfig.Memory}} {{.HostConfig.NanoCpus}} {{.HostConfig.PidsLimit}}' $c-1
		docker update --memory 1m $c-1; echo $?; docker rm -f $c-1`},
	{name: "commands/commit without an entrypoint", script: `docker create --name $c-1 --entrypoint sh compat/everything:1 >/dev/null; docker commit -c 'ENTRYPOINT []' $c-1 $c:1 >/dev/null; docker inspect -f '{{json .Config.Entrypoint}}' $c:1; docker rm $c-1; docker rmi $c:1 >/dev/null`},
	{name: "commands/commit", script: `
		docker run --name $c-1 compat/everything:1 >/dev/null; docker run -d --name $c-2 --entrypoint sh compat/everything:1 -c 'echo mine >/file; sleep 1000' >/dev/null; until docker exec $c-2 test -s /file; do sleep 0.1; done
		docker commit -a me -m message -c 'CMD ["/file"]' -c 'ENTRYPOINT ["cat"]' -c 'ENV A=1' $c-2 $c:1 | grep -c '^sha256:'; docker run --rm $c:1; docker inspect -f '{{.Author}} {{.Comment}} {{json .Config.Cmd}} {{json .Config.Entrypoint}} {{.Config.WorkingDir}}' $c:1
		docker history -q $c:1 | wc -l; docker rm -f $c-1 $c-2 >/dev/null; docker rmi $c:1 | sed -E 's/[0-9a-f]{64}/ID/g' | sort | head -n 1`},
	{name: "commands/commit without a pause, of a stopped one", script: `docker run --name $c-1 compat/plain:1 sh -c 'echo x >/x'; docker commit -p=false $c-1 $c:1 >/dev/null; docker run --rm $c:1 cat /x; docker rm $c-1; docker rmi $c:1 >/dev/null`},
	{name: "commands/images", script: `
		docker tag compat/plain:1 $c:1; docker tag compat/plain:1 $c:latest; docker images --format '{{.Repository}}:{{.Tag}}' $c | sort; docker images -q $c | sort -u | wc -l; docker images --filter reference=$c:1 --format '{{.Tag}}'
		docker inspect -f '{{range .RepoTags}}{{.}} {{end}}' compat/plain:1 | tr ' ' '\n' | grep $c | sort; docker inspect -f '{{.Os}} {{.Architecture}} {{json .Config.Cmd}} {{len .RootFS.Layers}}' $c:1; docker rmi $c:1; docker rmi $c; docker rmi $c; echo $?
		docker image inspect $c:1 2>/dev/null; echo $?; docker tag nothing:at-all $c:2; echo $?; docker tag compat/plain:1 UPPER; echo $?`},
	{name: "commands/rmi of an image in use", script: `docker tag compat/plain:1 $c:1; docker create --name $c-1 $c:1 true >/dev/null; docker rmi $c:1; docker rm $c-1; docker images -q $c`},
	{name: "commands/save and load", script: `
		docker tag compat/plain:1 $c:1; docker save -o $TMPDIR/image.tar $c:1; tar -xOf $TMPDIR/image.tar manifest.json | grep -o '"RepoTags":\[[^]]*\]'; id=$(docker inspect -f '{{.Id}}' $c:1); docker rmi $c:1
		docker load -i $TMPDIR/image.tar; test "$id" = "$(docker inspect -f '{{.Id}}' $c:1)" && echo same; docker rmi $c:1; echo nonsense | docker load >/dev/null 2>&1 || echo refused`},
	{name: "commands/import and export", script: `
		docker create --name $c-1 compat/plain:1 true >/dev/null; docker export $c-1 | docker import -c 'CMD ["echo", "imported"]' -m message - $c:1 | grep -c sha256:; docker run --rm $c:1; docker rm $c-1; docker rmi $c:1 >/dev/null; echo $?`},
	{name: "commands/cp of one that is created", script: `
		docker create --name $c-1 compat/plain:1 cat /etc/mine >/dev/null; echo mine | sh -c 'cat >$TMPDIR/mine'; docker cp -q $TMPDIR/mine $c-1:/etc/mine; docker start -a $c-1; docker cp -q $c-1:/etc/mine - | tar -xO; docker diff $c-1 | sort -k 2; docker rm $c-1`},
	{name: "commands/volumes without a name", script: `
		docker run --name $c-1 -v /data compat/plain:1 sh -c 'echo x >/data/x; ls /data'; docker inspect -f '{{range .Mounts}}{{.Type}} {{.Destination}} {{.RW}} {{len .Name}}{{end}}' $c-1; docker start -a $c-1; docker rm -v $c-1`},
	{name: "commands/env-file and labels", script: `
		printf 'A=1\n# no\nB=two words\nCALLER_VARIABLE\n' >$TMPDIR/env; docker run --rm --env-file $TMPDIR/env -e A=2 compat/plain:1 sh -c 'echo $A $B $CALLER_VARIABLE'
		printf 'a=1\nb\n' >$TMPDIR/labels; docker create --name $c-1 --label-file $TMPDIR/labels -l a=2 compat/plain:1 true >/dev/null; docker inspect -f '{{json .Config.Labels}}' $c-1; docker rm $c-1`},
	{name: "commands/exec inspected", script: `
		docker run -d --name $c-1 compat/plain:1 sleep 1000 >/dev/null; docker exec -d $c-1 sleep 500; docker inspect -f '{{len .ExecIDs}}' $c-1; docker exec -e A=b -w /tmp $c-1 sh -c 'echo $A; pwd; exit 9'; echo $?; docker rm -f $c-1`},
	{name: "commands/events of the past", script: `
		from=$(date +%s); docker run --rm --name $c-1 -l e=$c compat/plain:1 true; docker create --name $c-2 -l e=$c compat/plain:1 true >/dev/null; docker rename $c-2 $c-3; docker rm $c-3 >/dev/null; sleep 1
		docker events --since $from --until $(date +%s) --filter label=e=$c --format '{{.Action}} {{.Actor.Attributes.name}}'; docker events --since $from --until $(date +%s) --filter container=$c-1 --filter event=die --format '{{.Actor.Attributes.exitCode}}'`},
	{name: "commands/prune", script: `docker create --name $c-1 -l p=$c compat/plain:1 true >/dev/null; docker run -d --name $c-2 -l p=$c compat/plain:1 sleep 1000 >/dev/null; docker container prune -f --filter label=p=$c | head -n 1; docker ps -a --filter label=p=$c --format '{{.Names}}'; docker rm -f $c-2`},
	{name: "commands/container:X", script: `
		docker run -d --name $c-1 -h one compat/plain:1 sh -c 'echo page >/index.html; exec httpd -f -p 127.0.0.1:8123 -h /' >/dev/null; until docker run --rm --network container:$c-1 compat/plain:1 wget -qO- http://127.0.0.1:8123/ 2>/dev/null; do sleep 0.5; done
		docker run --rm --network container:$c-1 compat/plain:1 hostname; docker run --rm --network container:$c-1 -p 80:80 compat/plain:1 true; echo $?; docker run --rm --network container:$c-1 -h x compat/plain:1 true; echo $?; docker run --rm --network container:$c-nowhere compat/plain:1 true; echo $?
		docker create --name $c-2 --network container:$c-1 compat/plain:1 true >/dev/null; docker rm -f $c-1; docker rm -f $c-2`},
	{name: "commands/what is wrong with arguments", script: `
		for flags in '-m 1k' '--cpus 1000' '--shm-size -1' '--restart sometimes' '--memory-swap 1m -m 64m' '--oom-score-adj 2000' '-v data:rel' '--ulimit odd=1' '--network container:' '--stop-signal NONSENSE' '--health-interval 1us --health-cmd true' '-w rel'; do
			docker create --name $c-1 $flags compat/plain:1 true >/dev/null 2>&1; echo "$flags: $?"; docker rm $c-1 >/dev/null 2>&1; done; true`},
	{name: "commands/version and info", script: `docker version -f '{{.Server.Os}} {{.Server.Arch}}'; docker info -f '{{.OSType}} {{.Architecture}} {{.Driver}}'`},
}

// TestVMSoakAPISameAsDockerd runs every case by docker's command line, with dockerd behind it and with cradle-dockerapi in front of a Nomad. What differs must be listed in
// docs/dockerapi-differences.md, and what is listed there must differ.
func TestVMSoakAPISameAsDockerd(t *testing.T) {
	dir := shortTempDir(t)
	t.Setenv("CALLER_VARIABLE", "from the caller")
	all := images(t)
	d, a := newDocker(t, dir, all), newAPI(t, dir, all)
	differ := differences(t, "dockerapi-differences.md", "cradle-dockerapi")
	slots := make(chan struct{}, 4)
	for i, c := range append(append([]testCase{}, cases...), commandCases...) {
		if c.image == "" {
			c.image = "plain"
		}
		container := fmt.Sprintf("case%d", i)
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			slots <- struct{}{}
			defer func() { <-slots }()
			run := func(d *dockerSide) outcome {
				if i < len(cases) {
					return d.run(t, c, container)
				}
				own, err := os.MkdirTemp(d.dir, "case")
				if err != nil {
					t.Error(err)
					return outcome{}
				}
				return script(t, d.host, container, own, c.script)
			}
			differ.compare(t, c, func() outcome { return run(d) }, func() outcome { return run(a) })
		})
	}
}

// newAPI is cradle-dockerapi on a node of its own, with the images in its registry.
func newAPI(t *testing.T, dir string, all map[string]v1.Image) *dockerSide {
	t.Helper()
	var o nomadtest.Options
	if err := o.Cradle(""); err != nil {
		t.Fatal(err)
	}
	o.Keep = append(o.Keep, "cradle", "registry", "a.sock")
	c := nomadtest.Start(t, o)
	program, err := programs.Path("cradle-dockerapi")
	if err != nil {
		t.Fatal(err)
	}
	node := c.Server()
	socket := filepath.Join(node.Dir, "a.sock")
	cmd := node.Command(context.Background(), program, "serve", "--socket", socket, "--images", filepath.Join(node.Dir, "registry"), "--registry-listen", "127.0.0.1:5000", "--pods", filepath.Join(node.Dir, "cradle"))
	cmd.Env = c.Env()
	var log locked.Buffer
	cmd.Stderr = &log
	if err := node.Launch(cmd); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Signal(os.Interrupt)
		cmd.Wait()
		if t.Failed() {
			t.Logf("the server's log:\n%s", log.String())
		}
	})
	for begin := time.Now(); ; time.Sleep(20 * time.Millisecond) {
		if conn, err := net.Dial("unix", socket); err == nil {
			conn.Close()
			break
		}
		if time.Since(begin) > nomadtest.Patience {
			t.Fatalf("the server does not listen:\n%s", log.String())
		}
	}
	home := filepath.Join(dir, "a")
	if err := os.Mkdir(home, 0o700); err != nil {
		t.Fatal(err)
	}
	host := "unix://" + socket
	for name, image := range all {
		if err := dockerd.LoadInto(t.Context(), host, home, "compat/"+name+":1", image); err != nil {
			t.Fatal(err)
		}
	}
	return &dockerSide{host, home}
}
