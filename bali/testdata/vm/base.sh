#!/usr/bin/env bash
# base.sh: print the folder of a Debian machine that boots: vmlinuz, initrd, root.img.
#
# Made of the distribution's packages, cached under ${XDG_CACHE_HOME:-~/.cache}/cradlestack/bali-vm-KEY, where KEY hashes
# this script and the release. The machine unpacks its second disk, a tar, into /job and runs /job/run.sh as a service of its
# systemd, with the output on the console, then powers off. Needs root. 2 minutes on two idle cores.
set -euo pipefail
for need in mmdebstrap:mmdebstrap mkfs.ext4:e2fsprogs; do
  command -v "${need%:*}" >/dev/null || { echo "base.sh: ${need%:*} is missing: apt-get install ${need#*:}" >&2; exit 1; }
done
suite=$(. /etc/os-release && echo "$VERSION_CODENAME")
key=$( (cat "$0"; echo "$suite") | sha256sum | cut -c1-16)
out=${XDG_CACHE_HOME:-$HOME/.cache}/cradlestack/bali-vm-$key
if [ -e "$out/root.img" ]; then echo "$out"; exit 0; fi
mkdir -p "$out"
exec 9>"$out.lock"
flock 9
if [ -e "$out/root.img" ]; then echo "$out"; exit 0; fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# only the drivers of this machine: under emulation every byte of the initrd takes time
mkdir -p "$work/skel/etc/initramfs-tools/conf.d" "$work/skel/etc/systemd/system/multi-user.target.wants"
echo MODULES=list >"$work/skel/etc/initramfs-tools/conf.d/list"
printf 'virtio_pci\nvirtio_blk\next4\n' >"$work/skel/etc/initramfs-tools/modules"
cat >"$work/skel/etc/systemd/system/job.service" <<'UNIT'
[Unit]
After=multi-user.target
[Service]
Type=exec
ExecStart=/bin/sh -c 'mkdir -p /job && tar -xf /dev/vdb -C /job && cd /job && sh ./run.sh; echo "job: exit $?"; systemctl --no-block poweroff'
StandardOutput=tty
StandardError=tty
TTYPath=/dev/ttyS0
Environment=HOME=/root
UNIT
ln -s ../job.service "$work/skel/etc/systemd/system/multi-user.target.wants/job.service"
sed -s 's/^Components:.*/Components: main/' /etc/apt/sources.list.d/debian.sources >"$work/debian.sources"
mmdebstrap --quiet --variant=minbase --mode=root --aptopt='Apt::Install-Recommends "false"' \
  --include=systemd-sysv,udev,dbus,kmod,initramfs-tools,linux-image-cloud-amd64,iproute2,procps,curl,ca-certificates,busybox-static \
  --essential-hook="cp -a $work/skel/. \"\$1\"" \
  --customize-hook='echo node >"$1/etc/hostname"; printf "127.0.0.1 localhost node\n" >"$1/etc/hosts"; echo "/dev/vda / ext4 rw 0 1" >"$1/etc/fstab"' \
  --customize-hook='chroot "$1" systemctl mask --quiet getty@tty1.service serial-getty@ttyS0.service systemd-timesyncd.service apt-daily.timer apt-daily-upgrade.timer e2scrub_reap.service' \
  "$suite" "$work/root" "$work/debian.sources" >&2
cp -L "$work/root/vmlinuz" "$out/vmlinuz"
cp -L "$work/root/initrd.img" "$out/initrd"
rm -rf "$work"/root/var/cache/apt/* "$work"/root/var/lib/apt/lists/*
truncate -s 4G "$out/root.part"
mkfs.ext4 -q -F -O verity -L root -d "$work/root" "$out/root.part"
mv "$out/root.part" "$out/root.img"
echo "$out"
