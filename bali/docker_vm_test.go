//go:build vm

package main

import (
	"context"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestRootDocker builds from a Dockerfile with a docker daemon of its own: with
// docker's first builder, with buildx and docker's own BuildKit, and with buildx
// and a BuildKit that stands alone, out of which the image streams.
func TestRootDocker(t *testing.T) {
	for _, need := range []string{"docker", "dockerd"} {
		if _, err := exec.LookPath(need); err != nil {
			t.Fatalf("%v: apt-get install docker.io", err)
		}
	}
	p := newPlace(t)
	state := t.TempDir()
	sock := filepath.Join(state, "docker.sock")
	dockerd := exec.CommandContext(t.Context(), "dockerd", "-H", "unix://"+sock, "--data-root", filepath.Join(state, "data"),
		"--exec-root", filepath.Join(state, "exec"), "--pidfile", filepath.Join(state, "pid"), "--iptables=false", "--ip6tables=false",
		"--bridge=none", "--storage-driver=vfs")
	dockerd.Cancel = func() error { return dockerd.Process.Signal(os.Interrupt) }
	dockerd.WaitDelay = 5 * time.Minute // killed, it would leave its containerd
	log, err := os.Create(filepath.Join(state, "dockerd.log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	dockerd.Stdout, dockerd.Stderr = log, log
	if err := dockerd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		dockerd.Process.Signal(os.Interrupt)
		dockerd.Wait()
	})
	t.Setenv("DOCKER_HOST", "unix://"+sock)
	config := filepath.Join(state, "config")
	t.Setenv("DOCKER_CONFIG", config)
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	for exec.CommandContext(ctx, "docker", "info").Run() != nil {
		if ctx.Err() != nil {
			b, _ := os.ReadFile(log.Name())
			t.Fatalf("dockerd did not start:\n%s", b)
		}
		time.Sleep(100 * time.Millisecond)
	}

	p.sh(`cat >Dockerfile <<'END'
FROM scratch
ARG WORD=none
COPY app /
ENV PATH=/bin WORD=$WORD
WORKDIR /srv
USER 7:8
STOPSIGNAL SIGINT
LABEL bali.type=notify
ENTRYPOINT ["sh", "-c"]
CMD ["echo $WORD; id -u; pwd"]
END
ln -s busybox app/bin/id`)
	if out := p.ok("build", "docker.tar.gz", "--timestamp", "0", "--build-arg", "WORD=built", "."); !strings.Contains(out, "built image=") {
		t.Errorf("build says %s", out)
	}
	if out := p.ok("run", "docker.tar.gz"); out != "built\n7\n/srv\n" {
		t.Errorf("the image says %q", out)
	}
	if out := p.ok("inspect", "docker.tar.gz"); !strings.Contains(out, `"bali.type"="notify"`) || !strings.Contains(out, `"SIGINT"`) {
		t.Errorf("inspect: %s", out)
	}
	// a second build gives the same bytes, and so does the archive of docker save
	p.ok("build", "again.tar.gz", "--timestamp", "0", "--build-arg", "WORD=built", "-f", "Dockerfile", ".")
	p.sh("cmp docker.tar.gz again.tar.gz")
	p.sh(`docker build -q -t app --build-arg WORD=built . && docker save app >app.tar`)
	p.ok("build", "saved.tar.gz", "--timestamp", "0", "--from", "docker-archive:app.tar")
	p.sh("cmp docker.tar.gz saved.tar.gz")
	p.sh("docker save app | bali build saved.tar.gz --timestamp 0 --from docker-archive:/dev/stdin && cmp docker.tar.gz saved.tar.gz")

	tool := func(name string) string {
		build, err := filepath.Abs("../tools/build.sh")
		if err != nil {
			t.Fatal(err)
		}
		return lastLine(p.sh(build + " " + name))
	}
	plugins := filepath.Join(config, "cli-plugins")
	if err := os.MkdirAll(plugins, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(tool("buildx"), filepath.Join(plugins, "docker-buildx")); err != nil {
		t.Fatal(err)
	}
	p.ok("build", "buildx.tar.gz", "--timestamp", "0", "--build-arg", "WORD=built", ".")
	p.sh("cmp docker.tar.gz buildx.tar.gz")

	kit := filepath.Join(state, "buildkit.sock")
	buildkitd := exec.CommandContext(t.Context(), tool("buildkitd"), "--addr", "unix://"+kit, "--root", filepath.Join(state, "buildkit"), "--oci-worker-snapshotter", "native")
	buildkitd.Cancel = func() error { return buildkitd.Process.Signal(os.Interrupt) }
	buildkitd.WaitDelay = 5 * time.Minute
	buildkitd.Stdout, buildkitd.Stderr = log, log
	if err := buildkitd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		buildkitd.Process.Signal(os.Interrupt)
		buildkitd.Wait()
		if b, err := os.ReadFile(log.Name()); err == nil && t.Failed() {
			t.Logf("%s", b)
		}
	})
	ctx, cancel = context.WithTimeout(t.Context(), 5*time.Minute) // compiling it may have taken as long
	defer cancel()
	for {
		if c, err := net.Dial("unix", kit); err == nil {
			c.Close()
			break
		}
		if ctx.Err() != nil {
			t.Fatal("buildkitd did not start")
		}
		time.Sleep(100 * time.Millisecond)
	}
	p.sh("docker buildx create --name own --driver remote unix://" + kit)
	images := p.sh("docker images -aq | sort")
	p.ok("build", "own.tar.gz", "--builder", "own", "--timestamp", "0", "--build-arg", "WORD=built", ".")
	p.sh("cmp docker.tar.gz own.tar.gz")
	p.sh("docker buildx use own && cat Dockerfile | bali build - -f - --timestamp 0 --build-arg WORD=built . >piped.tar.gz && cmp docker.tar.gz piped.tar.gz")
	if after := p.sh("docker images -aq | sort"); after != images {
		t.Errorf("docker's store holds %q, before it held %q", after, images)
	}
	p.refused("docker buildx: exit status", "build", "none.tar.gz", "-f", "Nofile", ".")
	p.sh("docker buildx use default")

	// what docker refuses is bali's failure, and leaves no image
	p.refused("docker build: exit status", "build", "none.tar.gz", "-f", "Nofile", ".")
	if left := p.sh("ls -A | grep -e none -e partial -e iid || true; ls -A tmp"); left != "" {
		t.Errorf("left behind: %s", left)
	}
}
