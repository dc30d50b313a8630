#!/usr/bin/env bash
# images.sh OUT [consul|nomad…]: make the signed images of a host's services in the folder OUT.
#
# Needs bali on PATH (or in ../../bin), signs with the key of `bali id`, and takes consul and nomad from PATH or builds
# them (tools/build.sh). Same programs, same key, same bytes.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
PATH=$here/../../bin:$PATH:/usr/sbin:/sbin
out=$(mkdir -p "${1:?usage: images.sh OUT [NAME…]}" && cd "$1" && pwd)
shift
[ $# -gt 0 ] || set -- consul nomad
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# add ROOT PROGRAM: copy a program to /bin with the libraries it is linked to
add() {
  install -D -m 755 "$2" "$1/bin/$(basename "$2")"
  local lib
  for lib in $(ldd "$2" 2>/dev/null | grep -oE '/[^ ]+' || true); do install -D -m 755 "$lib" "$1$lib"; done
}

for name; do
  root=$work/$name
  add "$root" "$("$here/../../tools/build.sh" "$name")"
  install -D -m 644 /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/ca-certificates.crt"
  echo 'root:x:0:0:root:/:/bin/false' >"$root/etc/passwd"
  echo 'root:x:0:' >"$root/etc/group"
  mkdir -p "$root/.bali"
  signal=SIGTERM
  if [ "$name" = nomad ]; then
    signal=SIGINT
    # its fingerprints of network and disk call these
    add "$root" "$(command -v ip)"
    add "$root" "$(command -v df)"
    mkdir -p "$root/sbin" && ln -s ../bin/ip "$root/sbin/ip"
  fi
  # bali unit makes it Type=notify: both tell systemd when they are ready
  cat >"$root/.bali/image.json" <<JSON
{"version": 1, "os": "linux", "architecture": "$(go env GOARCH)", "entrypoint": ["/bin/$name"],
 "env": ["PATH=/bin"], "stopSignal": "$signal", "labels": {"bali.type": "notify"}}
JSON
  bali build "$out/$name.tar.gz" --from "$root" --timestamp 0
done
