#!/usr/bin/env bash
# setup.sh [--demo] [--check]: install what building and testing need from the distribution's packages; --demo: only what the
# demo needs.
#
# Debian 12 or newer and Ubuntu 24.04 or newer. Does nothing (in a few milliseconds) where everything is there; --check
# only says what is missing. One plain message and exit code 1 where something can't be had.
set -euo pipefail
die() { echo "setup: $*" >&2; exit 1; }
command -v go >/dev/null || die "go is missing: install Go 1.26 or newer from https://go.dev/dl"
command -v dpkg-query >/dev/null || die "this is neither Debian nor Ubuntu; install by hand what tools/setup.sh lists"
[ "$(dpkg --print-architecture)" = amd64 ] || die "the guest kernel and the tests are for amd64, this is $(dpkg --print-architecture)"

# newest_source is the newest linux-source-VERSION that is installed, else the newest that apt offers, 6.1 (which is what
# the kernel's configuration was written for) before all others.
newest_source() {
  local all
  all=$(dpkg-query -W -f '${Package} ${db:Status-Status}\n' 'linux-source-*' 2>/dev/null | awk '$2 == "installed" { print $1 }')
  [ -n "$all" ] || all=$(apt-cache pkgnames linux-source- | grep -E '^linux-source-[0-9.]+$' || true)
  if grep -qx linux-source-6.1 <<<"$all"; then echo linux-source-6.1; else sort -V <<<"$all" | tail -n 1; fi
}

demo= check=
for option in "$@"; do
  case $option in
    --demo) demo=1 ;;
    --check) check=1 ;;
    *) die "usage: setup.sh [--demo] [--check]" ;;
  esac
done
packages=(
  # running pods
  qemu-system-x86 e2fsprogs xfsprogs iproute2 util-linux
  # the distribution's kernel as it is
  kmod xz-utils
  # images made from packages
  mmdebstrap debian-archive-keyring
  # networks of Nomad's jobs
  containernetworking-plugins iptables
  # the demo's clients
  mariadb-client redis-tools curl ca-certificates
)
[ -n "$demo" ] || packages+=(
  # the guest's own kernel
  build-essential flex bison bc libelf-dev libssl-dev cpio lz4 bzip2 zstd
  # more clients and servers, and docker to compare with
  docker.io git nfs-common nfs-ganesha nfs-ganesha-vfs rpcbind iputils-ping procps
  # clients of the filer
  libnfs-utils litmus cadaver davfs2 rclone s3cmd
  # file systems that volumes are kept on
  btrfs-progs ceph-common ceph-fuse ceph-mds ceph-mgr ceph-mon ceph-osd
  # other programs that read bali's images, and what gives files their fs-verity digest
  busybox-static fsverity libarchive-tools openssh-client python3
  # a server that has them, started by the test alone
  dropbear-bin openssh-sftp-server
)
command -v docker >/dev/null || packages+=("$(apt-cache pkgnames docker-cli | grep -x docker-cli || echo docker.io)") # Debian 12 has the client in docker.io
# Debian 13 has taken these out of docker.io and qemu-system-common.
[ -n "$demo" ] || [ ! -e /usr/bin/qemu-system-x86_64 ] || [ -e /usr/lib/qemu/virtiofsd ] || packages+=(virtiofsd)
[ -n "$demo" ] || [ ! -e /usr/sbin/dockerd ] || command -v docker >/dev/null || packages+=(docker-cli)
missing=()
want_missing() {
  missing=()
  local name status
  declare -A have=()
  while read -r name status; do [ "$status" != installed ] || have[$name]=1; done \
    < <(dpkg-query -W -f '${Package} ${db:Status-Status}\n' "${packages[@]}" 2>/dev/null)
  for name in "${packages[@]}"; do
    [ -n "${have[$name]:-}" ] || missing+=("$name")
  done
  [ -n "$demo" ] || [ -n "$(dpkg-query -W -f '${db:Status-Status}\n' 'linux-source-*' 2>/dev/null | grep -x installed)" ] || missing+=(linux-source)
}
want_missing
[ "${#missing[@]}" -gt 0 ] || exit 0
if [ -n "$check" ]; then die "missing packages: ${missing[*]}: run tools/setup.sh as root"; fi

run=()
if [ "$(id -u)" != 0 ]; then
  sudo -n true 2>/dev/null || die "missing packages: ${missing[*]}: run make setup as root"
  run=(sudo -n)
fi
echo "setup: installing ${missing[*]}" >&2
log=$(mktemp)
trap 'rm -f "$log"' EXIT
apt() {
  # No package starts a daemon: the tests start dockerd by hand, on their own folders. Somebody else's installation is waited for.
  "${run[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq -o Dpkg::Use-Pty=0 -o DPkg::Lock::Timeout=600 -o Acquire::Retries=3 "$@" </dev/null >>"$log" 2>&1 || { tail -n 20 "$log" >&2; die "apt-get $* (see above)"; }
}
apt update
for i in "${!missing[@]}"; do
  [ "${missing[i]}" != linux-source ] || missing[i]=$(newest_source)
  [ -n "${missing[i]}" ] || die "apt offers no linux-source package: enable the distribution's main archive"
done
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
  printf '#!/bin/sh\nexit 101\n' | "${run[@]}" tee "$policy" >/dev/null
  "${run[@]}" chmod 0755 "$policy"
  trap 'rm -f "$log"; "${run[@]}" rm -f "$policy"' EXIT
fi
# An installation that was cut short is completed first: apt wants that.
[ -z "$(dpkg --audit)" ] || "${run[@]}" env DEBIAN_FRONTEND=noninteractive dpkg --configure -a </dev/null >>"$log" 2>&1 || true
apt install -y --no-install-recommends "${missing[@]}"
# Whether docker's client and virtiofsd came along is known only now.
[ -n "${SETUP_AGAIN:-}" ] || SETUP_AGAIN=1 "$0" "$@"
