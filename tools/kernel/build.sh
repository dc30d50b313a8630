#!/usr/bin/env bash
# build.sh [DEST]: build the guest kernel of boot package "default" and print the path of its vmlinux.
#
# Debian's linux-source, `make allnoconfig` with cradle.config on top. The result is cached under
# ${XDG_CACHE_HOME:-~/.cache}/cradlestack/kernel/KEY, where KEY hashes the configuration, this script,
# the source package's version and the compiler's; a second run prints the path and ends.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
src=/usr/src/linux-source-6.1.tar.xz
[ -e "$src" ] || { echo "build.sh: $src is missing: apt-get install linux-source-6.1" >&2; exit 1; }
for tool in gcc make flex bison bc lz4 xz; do
  command -v "$tool" >/dev/null || { echo "build.sh: $tool is missing: apt-get install build-essential flex bison bc lz4 xz-utils libelf-dev libssl-dev" >&2; exit 1; }
done
version=$(dpkg-query -W -f '${Version}' linux-source-6.1)
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
echo "build.sh: unpacking linux-source-6.1 $version" >&2
tar -C "$work" --strip-components=1 -xf "$src"
# Two builds of the same inputs give the same bytes.
export KBUILD_BUILD_TIMESTAMP='1970-01-01 00:00:00 UTC' KBUILD_BUILD_USER=cradle KBUILD_BUILD_HOST=cradle KBUILD_BUILD_VERSION=1
cd "$work"
make -s KCONFIG_ALLCONFIG="$here/cradle.config" allnoconfig >&2
# Every option asked for must have been taken: a renamed or unmet one is an error here, not a surprise in the guest.
missing=0
while read -r line; do
  case $line in
    CONFIG_*=n) grep -q "^${line%=n}=y" .config && { echo "build.sh: ${line%=n} is on though cradle.config says n" >&2; missing=1; } ;;
    CONFIG_*=*) grep -qxF -- "$line" .config || { echo "build.sh: $line was not taken by Kconfig" >&2; missing=1; } ;;
  esac
done <"$here/cradle.config"
[ "$missing" = 0 ] || exit 1
echo "build.sh: compiling (about 5 minutes on two cores)" >&2
make -s -j"$(nproc)" KCFLAGS="-ffile-prefix-map=$work=." vmlinux >&2
strip --strip-debug -o vmlinux.stripped vmlinux
mkdir -p "$out.tmp"
mv vmlinux.stripped "$out.tmp/vmlinux"
cp .config "$out.tmp/config"
echo "linux-source-6.1 $version" >"$out.tmp/source"
mv "$out.tmp" "$out"
echo "$out/vmlinux"
