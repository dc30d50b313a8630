#!/usr/bin/env bash
# build.sh [--cached]: build the guest kernel of boot package "default" and print the path of its vmlinux.
#
# The distribution's linux-source (6.1, which cradle.config was written for, before any other that is installed, else the newest),
# `make allnoconfig` with cradle.config on top. The result is cached under ${XDG_CACHE_HOME:-~/.cache}/cradlestack/kernel/KEY,
# where KEY hashes the configuration, this script, the source package's version and the compiler's; a second run prints the path
# and ends. --cached builds nothing: exit code 3 where there is no kernel yet.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
src=$(ls -v /usr/src/linux-source-*.tar.* 2>/dev/null | tail -n 1 || true)
for known in /usr/src/linux-source-6.1.tar.*; do [ ! -e "$known" ] || src=$known; done
[ -n "$src" ] || { echo "build.sh: /usr/src holds no linux-source: apt-get install linux-source-6.1, or the newest one of this distribution" >&2; exit 1; }
package=$(basename "${src%.tar.*}")
for tool in gcc make flex bison bc lz4 xz; do
  command -v "$tool" >/dev/null || { echo "build.sh: $tool is missing: apt-get install build-essential flex bison bc lz4 xz-utils libelf-dev libssl-dev" >&2; exit 1; }
done
version=$(dpkg-query -W -f '${Version}' "$package")
key=$( (cat "$here/cradle.config" "$here/build.sh"; echo "$version"; gcc -dumpfullversion) | sha256sum | cut -c1-16)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/cradlestack/kernel
out=$cache/$key
if [ -e "$out/vmlinux" ]; then echo "$out/vmlinux"; exit 0; fi
if [ "${1:-}" = --cached ]; then exit 3; fi
mkdir -p "$cache"
exec 9>"$cache/$key.lock"
flock 9
if [ -e "$out/vmlinux" ]; then echo "$out/vmlinux"; exit 0; fi
work=$cache/$key.build
rm -rf "$work"
mkdir -p "$work"
trap 'rm -rf "$work"' EXIT
echo "build.sh: unpacking $package $version" >&2
tar -C "$work" --strip-components=1 -xf "$src"
# Until Linux 6.9 a read of a CephFS file to which another client appends puts more into the reader's buffer than it says, and goes on behind that: bytes are there
# twice, and others are missing (docs/decisions/0028). What is read ends where the file did when the read began, which is then asked for anew.
read=$work/fs/ceph/file.c
if grep -q 'left = ret > 0 ? ret : 0;' "$read"; then
  cp "$read" "$read.distributed"
  sed -i '/^static ssize_t ceph_sync_read/,/^}/{
    /^\t\ti_size = i_size_read(inode);$/d
    s/^\t\tleft = ret > 0 ? ret : 0;$/\t\tleft = ret > 0 \&\& off < i_size ? min_t(u64, ret, i_size - off) : 0;/
    s/^\tif (off > iocb->ki_pos) {$/\tif (off > iocb->ki_pos || ret > 0) {/
    s/^\t\t\tret = i_size - iocb->ki_pos;$/\t\t\tret = off - iocb->ki_pos;/
    s/^\t\t\tiocb->ki_pos = i_size;$/\t\t\tiocb->ki_pos = off;/
  }' "$read"
  [ "$(diff "$read.distributed" "$read" | grep -c '^[<>]')" = 9 ] || { echo "build.sh: fs/ceph/file.c of $package $version is not as it was: look at what is changed there" >&2; exit 1; }
  rm "$read.distributed"
fi
# Two builds of the same inputs give the same bytes.
export KBUILD_BUILD_TIMESTAMP='1970-01-01 00:00:00 UTC' KBUILD_BUILD_USER=cradle KBUILD_BUILD_HOST=cradle KBUILD_BUILD_VERSION=1
cd "$work"
# Later versions renamed some options and dropped others; for 6.1 there is no such excuse.
cp "$here/cradle.config" wanted.config
if [ "$package" != linux-source-6.1 ]; then
  grep -rhoE --include='Kconfig*' '^[[:space:]]*(menu)?config [A-Z0-9_]+' . | awk '{ print "CONFIG_" $2 }' | sort -u >known
  while IFS== read -r name value; do
    case $name in
      CONFIG_*) ;;
      *) continue ;;
    esac
    renamed=CONFIG_MITIGATION_${name#CONFIG_}
    renamed=${renamed/MITIGATION_CPU_/MITIGATION_}
    if grep -qxF "$name" known; then echo "$name=$value"
    elif grep -qxF "$renamed" known; then echo "$renamed=$value"
    else echo "build.sh: $package knows no ${name#CONFIG_}: left out" >&2; fi
  done <"$here/cradle.config" >wanted.config
fi
make -s KCONFIG_ALLCONFIG=wanted.config allnoconfig >&2
# Every option asked for must have been taken: a renamed or unmet one is an error here, not a surprise in the guest.
missing=0
while read -r line; do
  case $line in
    CONFIG_*=n) grep -q "^${line%=n}=y" .config && { echo "build.sh: ${line%=n} is on though cradle.config says n" >&2; missing=1; } ;;
    CONFIG_*=*) grep -qxF -- "$line" .config || { echo "build.sh: $line was not taken by Kconfig" >&2; missing=1; } ;;
  esac
done <wanted.config
[ "$missing" = 0 ] || exit 1
echo "build.sh: compiling (about 5 minutes on two cores)" >&2
make -s -j"$(nproc)" KCFLAGS="-ffile-prefix-map=$work=." vmlinux >&2
strip --strip-debug -o vmlinux.stripped vmlinux
mkdir -p "$out.tmp"
mv vmlinux.stripped "$out.tmp/vmlinux"
cp .config "$out.tmp/config"
echo "$package $version" >"$out.tmp/source"
mv "$out.tmp" "$out"
echo "$out/vmlinux"
