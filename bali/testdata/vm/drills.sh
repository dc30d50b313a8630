# drills.sh, TestVMSoakSystemd's: the first boot makes a bare host a member of the stack and goes through what can happen to it;
# the second finds that it still is.
. ./lib.sh

healthy_plugin() { api plugin/csi/cradle | grep '"NodesHealthy":1'; }
# machine: the process of the only pod's; others of QEMU come and go, as it is asked for its version
machine() { pgrep -of 'qemu-system-x86_64 -name'; }

if [ ! -e /var/lib/second ]; then
  host 10.0.2.15 10.0.2.2
  serve
  ! bali run foreign.tar.gz 2>/tmp/err || fail "a foreign image ran"
  grep -q 'untrusted identity' /tmp/err
  ok "a foreign image is refused"

  sh ./bootstrap/bootstrap.sh all http://127.0.0.1:8000 /job/keys/node 10.0.2.15
  ok "bootstrap from a URL"
  wait_for 300 "the node is ready, with a healthy driver" ready 1
  bali run -q --cache /var/cache/bali /var/lib/bali/consul/current -- members | grep alive
  ok "consul has its member"

  # the service is the unit's main process, in the unit's cgroup, with its limits
  pid=$(systemctl show -p MainPID --value nomad)
  [ "$(cat /proc/$pid/comm)" = nomad ] || fail "the main process is $(cat /proc/$pid/comm)"
  grep -q 'nomad.service' /proc/$pid/cgroup || fail "its cgroup is $(cat /proc/$pid/cgroup)"
  [ "$(cat /proc/$pid/oom_score_adj)" = -900 ] || fail "its OOM score is $(cat /proc/$pid/oom_score_adj)"
  grep -q '^Max open files *65536' /proc/$pid/limits || fail "its limits are $(cat /proc/$pid/limits)"
  ok "the process is the service"
  # what Nomad lowers for itself is not its tasks', unless they ask
  score() { env "$1" choom -n -500 -- bali run -q ${2:-} web/hello.tar.gz -- -c 'busybox cat /proc/self/oom_score_adj'; }
  got="$(score NOMAD_ALLOC_ID=1) $(score NOMAD_ALLOC_ID=1 '--oom-score-adj -100') $(score A=1)"
  [ "$got" = '0 -100 -500' ] || fail "OOM scores: $got"
  ok "a task's OOM score is not Nomad's"
  # keys are nowhere on the disk but encrypted
  key=$(sed -n 2p /job/keys/node/key.pem)
  ! grep -rqF "$key" /etc /var/lib /var/cache || fail "a key lies on the disk"
  ok "keys are on the disk only encrypted"

  # volumes: the plugin runs as a task, from its image; what it mounts is there for the driver and for the host
  nomad job run -detach -var image=http://127.0.0.1:8000/cradle-csi.tar.zst - <bootstrap/cradle-csi.nomad.hcl
  wait_for 300 "cradle-csi is healthy" healthy_plugin
  nomad volume create - <volume.hcl
  ok "a volume"
  busybox_pod keeper 'echo kept >/data/file && sync && echo written && sleep 100000' 'volume "data" {
      type            = "csi"
      source          = "data"
      access_mode     = "single-node-writer"
      attachment_mode = "file-system"
    }' 'volume_mount {
        volume      = "data"
        destination = "/data"
      }'
  wait_for 900 "a pod has written to the volume" said keeper written
  wait_for 120 "the host sees what the pod has written" sh -c "grep -h kept /var/lib/nomad/client/csi/monolith/cradle/per-alloc/*/data/*/file"

  # the filer serves what the plugin keeps
  filer() { bali run -q --cache /var/cache/bali -v /run/cradle:/run/cradle /var/lib/bali/cradle-filer/current -- "$@"; }
  filer status
  ss -ltn | grep -q ':2049 ' || fail "nothing listens for NFS"
  ok "the filer serves"

  # docker's client, with the registry of the server that the driver pulls from
  export DOCKER_HOST=unix:///run/cradle/docker.sock
  docker import - app <app.tar
  docker run --rm app /bin/busybox echo hello from docker >/tmp/docker || fail "docker run"
  grep 'hello from docker' /tmp/docker
  ok "docker run"

  # an upgrade with an image that is broken is rolled back, the other service goes on
  before=$(readlink /var/lib/bali/consul/current) other=$(systemctl show -p MainPID --value nomad)
  ! bali upgrade consul broken.tar.gz 2>/tmp/err || fail "a broken image was installed"
  cat /tmp/err
  grep -q 'rolled back to' /tmp/err || fail "no word about a rollback"
  [ "$(readlink /var/lib/bali/consul/current)" = "$before" ] || fail "the link is not back"
  [ "$(systemctl show -p MainPID --value nomad)" = "$other" ] || fail "nomad was restarted"
  systemctl is-active -q consul || fail "consul is down"
  pod=$(machine) || {
    ps -ef
    api job/keeper/allocations
    journalctl --no-pager -u nomad | grep -v docker | grep -E 'Task event|cradle' | tail -n 100
    fail "the pod has no machine"
  }
  ok "a broken image is rolled back"
  # a good one stays, and can be taken back by hand
  bali upgrade consul http://127.0.0.1:8000/consul2.tar.gz
  [ "$(readlink /var/lib/bali/consul/current)" != "$before" ] || fail "the new image is not current"
  bali rollback consul
  [ "$(readlink /var/lib/bali/consul/current)" = "$before" ] || fail "the old image is not back"
  ok "upgrade and rollback"
  # one during which bali dies is undone by the next start
  bali upgrade consul http://127.0.0.1:8000/consul2.tar.gz &
  upgrade=$!
  wait_for 300 "an upgrade is under way" test -L /var/lib/bali/consul/pending
  kill -9 $upgrade
  systemctl restart consul || true # this start undoes it and asks for another
  is_back() { [ "$(readlink /var/lib/bali/consul/current)" = "$before" ] && [ ! -e /var/lib/bali/consul/pending ] && systemctl is-active -q consul; }
  wait_for 300 "it is undone by the next start" is_back
  # nomad itself: its pods go on
  bali upgrade nomad web/nomad2.tar.zst
  wait_for 300 "the node is ready again" ready 1
  [ "$(machine)" = "$pod" ] || fail "the pod's machine was $pod and is $(machine)"
  ok "a pod outlives the upgrade of nomad"

  # a sandboxed service straight from a URL, with a cache and a socket of systemd's; then the server goes away
  bali unit http://127.0.0.1:8000/hello.tar.gz --name hello --type exec --cache /var/cache/bali >/etc/systemd/system/hello.service
  printf '[Socket]\nListenStream=/run/hello.sock\nAccept=no\n' >/etc/systemd/system/hello.socket
  systemctl daemon-reload
  systemctl start hello.socket
  systemctl start hello.service
  wait_for 120 "a service from a URL, with its socket" grep -q '^fds=1 pid=right notify=' /run/hello
  kill $httpd
  rm /run/hello
  systemctl restart hello.service
  wait_for 120 "it starts from the cache when the server is gone" grep -q '^fds=1' /run/hello

  # the cache's files carry fs-verity digests, and can't be changed
  file=$(ls /var/cache/bali/v1/*/tree/bin/busybox | head -n 1)
  ! echo x >>"$file" 2>/dev/null || fail "a file of the cache could be changed"
  ok "the cache is held by fs-verity"
  # so a start does not read them: beside it, what hashing them takes
  tree=$(dirname "$(ls -d /var/cache/bali/v1/*/tree/usr/lib/nomad | head -n 1)")/../..
  hashing() { find "$tree" -type f -print0 | xargs -0 sha256sum; }
  starting() { bali run -q --cache /var/cache/bali --entrypoint /bin/df /var/lib/bali/nomad/current -- --version; }
  # best COMMAND: of five runs, in ms
  best() {
    for _ in 1 2 3 4 5; do
      start=$(date +%s%N)
      "$1" >/dev/null
      echo $((($(date +%s%N) - start) / 1000000))
    done | sort -n | head -n 1
  }
  echo "figure: $(best starting) ms from the cache, $(best hashing) ms for sha256sum of its $(du -sm "$tree" | cut -f1) MB"

  systemctl enable -q hello.service
  touch /var/lib/second
  sync
else
  wait_for 300 "after a reboot the node is ready, with a healthy driver" ready 1
  wait_for 120 "consul is back" systemctl is-active consul
  wait_for 120 "the service from the cache is back" systemctl is-active hello
  wait_for 300 "cradle-filer is back" systemctl is-active cradle-filer
  wait_for 300 "cradle-dockerapi is back" systemctl is-active cradle-dockerapi
  wait_for 300 "cradle-csi is back, from the cache" healthy_plugin
  ok "after the reboot all is there"
fi
