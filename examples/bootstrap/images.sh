#!/usr/bin/env bash
# images.sh OUT [consul|nomad|cradle-csi|cradle-filer|cradle-dockerapi…]: make the signed images of a host's services in the folder OUT.
#
# Signs with the key of `bali id`. Takes our own programs and the boot package from ../../bin (make bootstrap-images makes
# them), consul and nomad from PATH or builds them (tools/build.sh), and the rest from this host's Debian packages. Same
# programs, same key, same bytes. SUFFIX=tar.zst compresses them with zstd, which hosts unpack in half the time.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
bin=$(cd "$here/../.." && pwd)/bin
PATH=$bin:$PATH:/usr/sbin:/sbin
out=$(mkdir -p "${1:?usage: images.sh OUT [NAME…]}" && cd "$1" && pwd)
shift
[ $# -gt 0 ] || set -- consul nomad cradle-csi cradle-filer cradle-dockerapi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
die() { echo "images.sh: $*" >&2; exit 1; }

# add PACKAGE PROGRAM [DIR]: copy a program to DIR (/usr/bin) of $root, with the libraries it is linked to
add() {
  local program lib
  program=$(command -v "$2") || die "$2 is missing: apt-get install $1"
  install -D -m 755 "$program" "$root${3:-/usr/bin}/$(basename "$2")"
  for lib in $(ldd "$program" 2>/dev/null | grep -oE '/[^ ]+' || true); do install -D -m 755 "$lib" "$root$lib"; done
}
own() { [ -e "$bin/$1" ] || die "$bin/$1 is missing: make build"; install -D -m 755 "$bin/$1" "$root${2:-/usr/bin}/$1"; }

# Each adds what one service needs, and may set what the image says of it.
consul() { add '' "$("$here/../../tools/build.sh" consul)"; type=notify; }

cradle-csi() {
  own cradle-csi
  for program in mkfs.ext4 resize2fs; do add e2fsprogs "$program"; done
  for program in mkfs.xfs xfs_growfs; do add xfsprogs "$program"; done
}

cradle-filer() { own cradle-filer; own cradle-s3; }

cradle-dockerapi() { own cradle-dockerapi; }

nomad() {
  add '' "$("$here/../../tools/build.sh" nomad)"
  type=notify signal=SIGINT
  # whom tasks' folders belong to
  echo 'nobody:x:65534:65534:nobody:/:/bin/false' >>"$root/etc/passwd"
  echo 'nogroup:x:65534:' >>"$root/etc/group"
  # its fingerprints of network and disk, and raw_exec's way to our other images
  add iproute2 ip
  add coreutils df
  own bali
  # networks in mode bridge
  for program in bridge host-local portmap firewall loopback; do add containernetworking-plugins "/usr/lib/cni/$program" /usr/lib/cni; done
  for program in iptables ip6tables; do add iptables "$program"; done
  cp -rL --parents /usr/lib/*-linux-gnu/xtables "$root"
  # the driver, with the machines' kernel and agent, where it looks for them
  own nomad-driver-cradle /usr/lib/nomad/plugins
  [ -e "$bin/boot/default/manifest.json" ] || die "$bin/boot/default is missing: make boot-default"
  mkdir -p "$root/usr/lib/cradle/boot" && cp -rL "$bin/boot/default" "$root/usr/lib/cradle/boot/"
  # QEMU opens these two files when it emulates such a machine, and no others beside its libraries
  add qemu-system-x86 qemu-system-x86_64
  cp -L --parents /usr/share/qemu/qboot.rom /usr/lib/*-linux-gnu/qemu/accel-tcg-x86_64.so "$root"
  add e2fsprogs mke2fs
  add xfsprogs mkfs.xfs
}

for name; do
  root=$work/$name type=exec signal=SIGTERM
  # one /usr, as on Debian: the driver shows it, and nothing else, to its machines
  mkdir -p "$root"/{.bali,etc/ssl/certs,usr/{bin,lib,lib64},var}
  for dir in bin lib lib64; do ln -s "usr/$dir" "$root/$dir"; done
  ln -s usr/bin "$root/sbin"
  ln -s bin "$root/usr/sbin"
  ln -s ../run "$root/var/run"
  install -m 644 /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/"
  echo 'root:x:0:0:root:/:/bin/false' >"$root/etc/passwd"
  echo 'root:x:0:' >"$root/etc/group"
  case $name in
    consul | nomad | cradle-csi | cradle-filer | cradle-dockerapi) "$name" ;;
    *) die "$name is no service: consul, nomad, cradle-csi, cradle-filer, cradle-dockerapi" ;;
  esac
  # notify: it tells systemd when it is ready
  cat >"$root/.bali/image.json" <<JSON
{"version": 1, "os": "linux", "architecture": "$(go env GOARCH)", "entrypoint": ["/bin/$name"],
 "env": ["PATH=/bin"], "stopSignal": "$signal", "labels": {"bali.type": "$type"}}
JSON
  bali build "$out/$name.${SUFFIX:-tar.gz}" --from "$root" --timestamp 0
done
