#!/usr/bin/env bash
# stock.sh: get the kernel of boot package "stock" and print the folder that holds it.
#
# The distribution's own kernel for virtual machines (Debian: linux-image-cloud-amd64, Ubuntu: linux-image-virtual) is
# downloaded with apt-get and unpacked without being installed. The folder holds
#
#   vmlinux             the ELF image out of the bzImage (it has the PVH entry point that QEMU's microvm boots from)
#   modules/NNN-NAME.ko what the guest needs beyond it, uncompressed, in load order
#   config, source      the kernel's configuration; package and version
#
# It is cached under ${XDG_CACHE_HOME:-~/.cache}/cradlestack/kernel/stock-KEY, where KEY hashes this script and the
# package's version; a second run prints the path and ends. Needs no root.
set -euo pipefail
die() { echo "stock.sh: $*" >&2; exit 1; }
for tool in apt-get apt-cache dpkg-deb modprobe depmod xz zstd lz4 od; do
  PATH=$PATH:/usr/sbin:/sbin command -v "$tool" >/dev/null || die "$tool is missing: apt-get install apt dpkg kmod xz-utils zstd lz4 coreutils"
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
if [ -e "$out/vmlinux" ]; then echo "$out"; exit 0; fi
mkdir -p "$cache"
exec 9>"$cache/stock-$key.lock"
flock 9
if [ -e "$out/vmlinux" ]; then echo "$out"; exit 0; fi
work=$cache/stock-$key.build
rm -rf "$work"
mkdir -p "$work/root" "$work/out/modules"
trap 'rm -rf "$work"' EXIT

echo "stock.sh: downloading ${packages[*]} $version" >&2
(cd "$work" && apt-get -qq download "${packages[@]}" 2>download.log) || { cat "$work/download.log" >&2; die "apt-get download ${packages[*]}"; }
for deb in "$work"/*.deb; do dpkg-deb -x "$deb" "$work/root"; done
boot=$work/root/boot lib=$work/root/lib
[ -d "$lib/modules" ] || lib=$work/root/usr/lib
[ -d "$lib/modules/$release" ] || die "$image $version holds no modules for $release"

# u16/u32 FILE OFFSET: a little-endian number of the file.
u16() { od -An -v -tu2 -j"$2" -N2 "$1" | tr -d ' '; }
u32() { od -An -v -tu4 -j"$2" -N4 "$1" | tr -d ' '; }
# Linux Documentation/arch/x86/boot.rst: the protected-mode code begins after setup_sects + 1 sectors; payload_offset and
# payload_length (0x248, 0x24c) say where in it the compressed ELF image lies.
bz=$boot/vmlinuz-$release
[ "$(u32 "$bz" 514)" = 1400005704 ] || die "$bz is no bzImage (no HdrS at 0x202)"
sects=$(( $(u16 "$bz" 497) & 255 ))
[ "$sects" != 0 ] || sects=4
start=$(( (sects + 1) * 512 + $(u32 "$bz" 584) ))
length=$(u32 "$bz" 588)
tail -c "+$((start + 1))" "$bz" | head -c "$length" >"$work/payload" || true
case $(od -An -v -tx1 -N4 "$work/payload" | tr -d ' ') in
  fd377a58) unpack=(xz -dc --single-stream) ;;
  28b52ffd) unpack=(zstd -dcq) ;;
  02214c18) unpack=(lz4 -dcq) ;;
  1f8b*)    unpack=(gzip -dcq) ;;
  *) die "the payload of $bz is compressed in a way this script does not know" ;;
esac
# The last four bytes of the payload are the image's size, after the compressed data: decompressors complain about them.
"${unpack[@]}" <"$work/payload" >"$work/out/vmlinux" 2>/dev/null || true
size=$(u32 "$work/payload" $((length - 4)))
[ "$(stat -c %s "$work/out/vmlinux")" = "$size" ] || die "$bz unpacks to $(stat -c %s "$work/out/vmlinux") bytes instead of $size"

# What the guest uses of the devices and file systems that the kernel does not have built in, dependencies first.
depmod -b "${lib%/lib}" "$release" 2>/dev/null
n=100
seen=' '
for module in virtio_mmio virtio_console virtio-rng virtio_balloon virtio_net virtio_scsi sd_mod overlay xfs fuse virtiofs 9pnet_virtio 9p nfs nfsv3 nfsv4 tun; do
  # Not every kernel has each as a module: built in, or left out as 9p is in Debian's cloud kernel.
  while read -r insmod file _; do
    [ "$insmod" = insmod ] || continue
    name=$(basename "$file")
    name=${name%%.ko*}
    case $seen in *" $name "*) continue ;; esac
    seen="$seen$name "
    n=$((n + 1))
    dest=$work/out/modules/$n-$name.ko
    case $file in
      *.ko) cp "$file" "$dest" ;;
      *.ko.xz) xz -dc "$file" >"$dest" ;;
      *.ko.zst) zstd -dcq "$file" >"$dest" ;;
      *.ko.gz) gzip -dc "$file" >"$dest" ;;
      *) die "$file is compressed in a way this script does not know" ;;
    esac
    chmod 0644 "$dest"
  done < <(modprobe -d "${lib%/lib}" -S "$release" --show-depends "$module" 2>/dev/null || true)
done
[ -e "$work"/out/modules/*-virtio_mmio.ko ] || grep -q '^CONFIG_VIRTIO_MMIO=y' "$boot/config-$release" || die "$image has no virtio_mmio"
cp "$boot/config-$release" "$work/out/config"
echo "$image $version" >"$work/out/source"
rm -rf "$out"
mv "$work/out" "$out"
echo "$out"
