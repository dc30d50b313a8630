#!/usr/bin/env bash
# stock.sh: get the kernel of boot package "stock" and print the folder that holds it.
#
# The distribution's own kernel for virtual machines (Debian: linux-image-cloud-amd64, Ubuntu: linux-image-virtual) is
# downloaded with apt-get and unpacked without being installed. The folder holds
#
#   vmlinuz, config   the kernel and its configuration
#   modules/          /lib/modules/VERSION, with the indices of depmod
#   source            package and version
#
# It is cached under ${XDG_CACHE_HOME:-~/.cache}/cradlestack/kernel/stock-KEY, where KEY hashes this script and the
# package's version; a second run prints the path and ends. Needs no root.
set -euo pipefail
die() { echo "stock.sh: $*" >&2; exit 1; }
for tool in apt-get apt-cache dpkg-deb depmod; do
  PATH=$PATH:/usr/sbin:/sbin command -v "$tool" >/dev/null || die "$tool is missing: apt-get install apt dpkg kmod"
done
export PATH=$PATH:/usr/sbin:/sbin LC_ALL=C

# The meta package depends on the kernel's package of the moment.
meta= image=
for meta in linux-image-cloud-amd64 linux-image-virtual; do
  image=$(apt-cache depends "$meta" 2>/dev/null | awk '$1 == "Depends:" && $2 ~ /^linux-image-[0-9]/ { print $2; exit }')
  [ -z "$image" ] || break
done
[ -n "$image" ] || die "apt knows neither linux-image-cloud-amd64 nor linux-image-virtual: run apt-get update"
version=$(apt-cache show --no-all-versions "$image" | awk '$1 == "Version:" { print $2; exit }')
release=${image#linux-image-}
# On Ubuntu the modules come in a package of their own.
packages=("$image")
modules=linux-modules-$release
! apt-cache show "$modules" >/dev/null 2>&1 || packages+=("$modules")

key=$( (cat "$0"; echo "$image $version") | sha256sum | cut -c1-16)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/cradlestack/kernel
out=$cache/stock-$key
if [ -e "$out/vmlinuz" ]; then echo "$out"; exit 0; fi
mkdir -p "$cache"
exec 9>"$cache/stock-$key.lock"
flock 9
if [ -e "$out/vmlinuz" ]; then echo "$out"; exit 0; fi
work=$cache/stock-$key.build
rm -rf "$work"
mkdir -p "$work/root" "$work/out"
trap 'rm -rf "$work"' EXIT

echo "stock.sh: downloading ${packages[*]} $version" >&2
(cd "$work" && apt-get -qq download "${packages[@]}" 2>download.log) || { cat "$work/download.log" >&2; die "apt-get download ${packages[*]}"; }
for deb in "$work"/*.deb; do dpkg-deb -x "$deb" "$work/root"; done
boot=$work/root/boot lib=$work/root/lib
[ -d "$lib/modules" ] || lib=$work/root/usr/lib
[ -d "$lib/modules/$release" ] || die "$image $version holds no modules for $release"

depmod -b "${lib%/lib}" "$release"
mv "$boot/vmlinuz-$release" "$work/out/vmlinuz"
mv "$lib/modules/$release" "$work/out/modules"
mv "$boot/config-$release" "$work/out/config"
echo "$image $version" >"$work/out/source"
rm -rf "$out"
mv "$work/out" "$out"
echo "$out"
