# run.sh of TestVMSoakSystemd, inside of the machine: every step says "ok: …" or the job ends with the reason.
# Stage 1 makes a bare host a member of the stack; stage 2, after a reboot, finds it still is.
set -eu
export PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin BALI_TRUST=/etc/bali/trust
stage=1
[ ! -e /var/lib/stage ] || stage=2
trap '[ $? = 0 ] || journalctl --no-pager -n 80' EXIT
ok() { echo "ok: $stage $*"; }
# wait_for SECONDS WHAT COMMAND…: until the command succeeds
wait_for() {
  left=$1 what=$2; shift 2
  until "$@" >/tmp/wait 2>&1; do
    left=$((left - 1))
    [ $left -gt 0 ] || { echo "not ok: $what"; cat /tmp/wait; exit 1; }
    sleep 1
  done
  ok "$what"
}
fail() { echo "not ok: $*"; exit 1; }
nomad() { bali run -q --cache /var/cache/bali /var/lib/bali/nomad/current -- "$@"; }
ready() { nomad node status | grep -w ready; }

if [ $stage = 1 ]; then
  install -m 755 bali /usr/local/bin/bali
  bali trust add "$(cat identity)" --comment operator
  busybox httpd -f -p 127.0.0.1:8000 -h /job/web &
  httpd=$!
  # the network is the host's own business, there again after the reboot
  printf '[Match]\nType=ether\n[Network]\nAddress=10.0.2.15/24\nGateway=10.0.2.2\n' >/etc/systemd/network/10-all.network
  systemctl enable -q --now systemd-networkd.service
  wait_for 60 "the network is up" ip route get 10.0.2.2
fi

if [ $stage = 1 ]; then
  ! bali run foreign.tar.gz 2>/tmp/err || fail "a foreign image ran"
  grep -q 'untrusted identity' /tmp/err
  ok "a foreign image is refused"

  sh ./bootstrap/bootstrap.sh all http://127.0.0.1:8000 /job/keys/node 10.0.2.15
  ok "bootstrap from a URL"
  wait_for 60 "nomad node status is ready" ready
  bali run -q /var/lib/bali/consul/current -- members | grep -q alive && ok "consul has its member"

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

  # an upgrade with an image that is broken is rolled back, the other service goes on
  before=$(readlink /var/lib/bali/consul/current) other=$(systemctl show -p MainPID --value nomad)
  ! bali upgrade consul broken.tar.gz 2>/tmp/err || fail "a broken image was installed"
  cat /tmp/err
  grep -q 'rolled back to' /tmp/err || fail "no word about a rollback"
  [ "$(readlink /var/lib/bali/consul/current)" = "$before" ] || fail "the link is not back"
  [ "$(systemctl show -p MainPID --value nomad)" = "$other" ] || fail "nomad was restarted"
  systemctl is-active -q consul || fail "consul is down"
  ok "a broken image is rolled back"
  # a good one stays, and can be taken back by hand
  bali upgrade consul http://127.0.0.1:8000/consul2.tar.gz
  [ "$(readlink /var/lib/bali/consul/current)" != "$before" ] || fail "the new image is not current"
  bali rollback consul
  [ "$(readlink /var/lib/bali/consul/current)" = "$before" ] || fail "the old image is not back"
  ok "upgrade and rollback"

  # a sandboxed service straight from a URL, with a cache and a socket of systemd's; then the server goes away
  bali unit http://127.0.0.1:8000/hello.tar.gz --name hello --type exec --cache /var/cache/bali >/etc/systemd/system/hello.service
  printf '[Socket]\nListenStream=/run/hello.sock\nAccept=no\n' >/etc/systemd/system/hello.socket
  systemctl daemon-reload
  systemctl start hello.socket
  systemctl start hello.service
  wait_for 60 "a service from a URL, with its socket" grep -q '^fds=1 pid=right notify=' /run/hello
  kill $httpd
  rm /run/hello
  systemctl restart hello.service
  wait_for 60 "it starts from the cache when the server is gone" grep -q '^fds=1' /run/hello

  # the cache's files carry fs-verity digests, and can't be changed
  file=$(ls /var/cache/bali/v1/*/tree/bin/busybox | head -n 1)
  ! echo x >>"$file" 2>/dev/null || fail "a file of the cache could be changed"
  ok "the cache is held by fs-verity"
  start=$(date +%s%N)
  bali run -q --cache /var/cache/bali /var/lib/bali/nomad/current -- version >/dev/null
  echo "cached nomad version took $(( ($(date +%s%N) - start) / 1000000 )) ms"

  systemctl enable -q hello.service
  touch /var/lib/stage
  sync
else
  wait_for 180 "after a reboot nomad node status is ready" ready
  systemctl is-active -q consul && ok "consul is back"
  systemctl is-active -q hello || wait_for 60 "the service from the cache is back" systemctl is-active hello
  ok "done"
fi
