# lib.sh: what the machines' scripts share. Every step says "ok: …" or the script ends with the reason.
set -eu
export PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/job BALI_TRUST=/etc/bali/trust SUFFIX=tar.zst
[ -p log ] || mkfifo log # also at the second boot
cat log &
exec >log 2>&1 # a console is a terminal, where bali shows its progress
trap '[ $? = 0 ] || journalctl --no-pager -n 150' EXIT

ok() { echo "ok: $* ($(cut -d. -f1 /proc/uptime) s)"; }
fail() { echo "not ok: $*"; exit 1; }
# wait_for SECONDS WHAT COMMAND…: until the command succeeds
wait_for() {
  left=$1 what=$2; shift 2
  until "$@" >/tmp/wait 2>&1; do
    left=$((left - 2))
    [ $left -gt 0 ] || { cat /tmp/wait; fail "$what"; }
    sleep 2
  done
  ok "$what"
}
nomad() { bali run -q --cache /var/cache/bali /var/lib/bali/nomad/current -- "$@"; }
# api PATH [CURL…]: what Nomad says, for waiting; its program takes seconds of an emulated processor
api() { path=$1; shift; curl -sf "$@" "http://127.0.0.1:4646/v1/$path"; }
# ready N: so many nodes are, and can run pods
ready() {
  api nodes -G --data-urlencode 'filter=Status == "ready" and Drivers.cradle.Healthy == true' >/tmp/nodes || { api nodes; false; } || return
  [ "$(grep -o '"SchedulingEligibility"' /tmp/nodes | wc -l)" = "$1" ] || { api nodes; false; }
}
# said JOB WORDS: a task of the job has printed them; if not yet, how it is
said() {
  api "job/$1/allocations" >/tmp/allocs || return
  for id in $(grep -o '"ID":"[^"]*"' /tmp/allocs | cut -d '"' -f 4); do
    ! api "client/fs/logs/$id?task=pod&type=stdout&plain=true" | grep -F "$2" || return 0
  done
  cat /tmp/allocs
  false
}
# host ADDRESS NEIGHBOUR: the operator's part on a bare host
host() {
  install -m 755 bali /usr/local/bin/bali
  bali trust add "$(cat identity)" --comment operator
  printf '[Match]\nType=ether\n[Network]\nAddress=%s/24\n' "$1" >/etc/systemd/network/10-all.network
  # an emulated processor of a busy host unpacks nomad for minutes
  mkdir -p /etc/systemd/system/service.d
  printf '[Service]\nTimeoutStartSec=30min\n' >/etc/systemd/system/service.d/emulated.conf
  # and may not answer for longer than agents wait for each other
  sed -i 's/enabled = true/&\n  heartbeat_grace = "10m"\n  raft_multiplier = 5/' bootstrap/nomad/server.hcl
  printf 'gossip_lan {\n  probe_interval = "10s"\n  probe_timeout = "5s"\n  suspicion_mult = 10\n}\n' >>bootstrap/consul/common.hcl
  systemctl daemon-reload
  systemctl enable -q --now systemd-networkd.service
  wait_for 120 "the network is up" ip route get "$2"
}
# serve: the images' server; $httpd is its process
serve() {
  busybox httpd -f -p 127.0.0.1:8000 -h /job/web &
  httpd=$!
}
# busybox_pod JOB COMMAND [GROUP [TASK]]: run a command in a pod with an address of its own, with further HCL in the group and task
busybox_pod() {
  mkdir -p /var/lib/cradle/images
  [ -e /var/lib/cradle/images/busybox ] || cp -r busybox /var/lib/cradle/images/busybox
  cat >/tmp/pod.hcl <<HCL
job "$1" {
  type = "batch"
  group "pod" {
    network {
      mode = "bridge"
    }
    ${3:-}
    restart {
      attempts = 10
      delay    = "5s"
      interval = "30m"
      mode     = "fail"
    }
    task "pod" {
      driver = "cradle"
      config {
        image   = "oci:/var/lib/cradle/images/busybox"
        # an emulated processor converts it for minutes beside two others
        image_pull_timeout = "20m"
        command = "sh"
        args    = ["-c", "ip addr | grep 172.26. && $2"]
      }
      ${4:-}
      resources {
        cpu    = 100
        memory = 64
      }
    }
  }
}
HCL
  nomad job run -detach - </tmp/pod.hcl
}
