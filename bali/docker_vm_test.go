//go:build vm

package main

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestRootDocker builds from a Dockerfile with a docker daemon of its own.
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
	dockerd.WaitDelay = 30 * time.Second
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
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
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
USER 7:8
WORKDIR /srv
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

	// what docker refuses is bali's failure, and leaves no image
	p.refused("docker build: exit status", "build", "none.tar.gz", "-f", "Nofile", ".")
	if left := p.sh("ls -A | grep -e none -e partial || true; ls -A tmp"); left != "" {
		t.Errorf("left behind: %s", left)
	}
}
