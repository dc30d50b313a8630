#!/usr/bin/env bash
# lab.sh build        build a machine that has ZFS, from the distribution's packages alone (contrib is on main's mirror)
# lab.sh run JOBDIR   boot it, emulated, and run JOBDIR/run.sh inside: JOBDIR travels in, the console comes out
#                     ($ZFSLAB_DISK: the disk's file, which several machines may have at once; $ZFSLAB_NET: QEMU's -netdev, and $ZFSLAB_MAC; $ZFSLAB_QMP: a socket for QEMU's monitor)
#                     ($ZFSLAB_CPUS, 1; $ZFSLAB_MEMORY in MiB, 1536; $ZFSLAB_TIMEOUT in seconds, 300)
#
# It is cached under ${XDG_CACHE_HOME:-~/.cache}/cradlestack/zfslab-KEY, where KEY hashes how it is built; that takes 3 minutes on two idle
# cores. Nothing of the host is changed. Needs root, and qemu-system-x86 mmdebstrap cpio zstd make gcc.
#
# What the emulation of a newer processor and the kernel's mitigations cost is a third of the time of everything. With two processors the boot and 50 commands of zfs took 24 to
# 28 s of the host's, with one 17 to 20.
# The machine is a q35 with virtio-pci: Debian's kernel finds no disk on microvm with acpi=off. There is no udev inside, so that a pool goes on
# the partition /dev/vda1 (for a whole disk zpool waits half a minute in vain), and zvols are /dev/zdN alone.
set -euo pipefail
build() {
  exec 9>"$W.lock"
  flock 9
  [ ! -e "$W/initramfs.zst" ] || return 0
  cd "$W"; mkdir -p debs tree lists/partial ko
  sed -s 's/^Components:.*/Components: main contrib/' /etc/apt/sources.list.d/debian.sources >apt.sources
  local opt=(-o Dir::Etc::sourcelist="$W/apt.sources" -o Dir::Etc::sourceparts=/dev/null -o Dir::State::lists="$W/lists" -o APT::Sandbox::User=root)
  apt-get -qq "${opt[@]}" update
  local image kv abi
  image=$(apt-cache "${opt[@]}" depends linux-image-cloud-amd64 | awk '/Depends: linux-image/{print $2; exit}')
  kv=${image#linux-image-}; abi=${kv%-cloud-amd64}; echo "$kv" >kernel-version
  (cd debs && rm -f ./*.deb && apt-get -qq "${opt[@]}" download "$image" "linux-headers-$kv" "linux-headers-$abi-common" linux-kbuild-6.1 linux-compiler-gcc-12-x86 zfs-dkms)
  for d in debs/*.deb; do dpkg -x "$d" tree; done
  rm -rf src; cp -a tree/usr/src/zfs-* src
  # the headers name absolute paths: lay them over /usr in a private mount namespace
  unshare -m bash -euc "
    mount -t overlay -o lowerdir='$W/tree/usr':/usr overlay /usr
    cd '$W/src'
    ./configure --with-config=kernel --with-linux=/usr/src/linux-headers-$abi-common --with-linux-obj=/usr/src/linux-headers-$kv >'$W/configure.log' 2>&1
    make -j\$(nproc) >'$W/make.log' 2>&1"
  rm -f ko/*; cp src/module/*/*.ko ko/; strip --strip-debug ko/*.ko

  rm -rf userland
  mmdebstrap --quiet --variant=extract --include=zfsutils-linux,busybox-static,e2fsprogs,xfsprogs,nfs-common,util-linux,mount \
    "$(. /etc/os-release; echo "$VERSION_CODENAME")" userland apt.sources
  local I=$W/initramfs R=$W/userland M=$W/tree/lib/modules/$kv/kernel
  rm -rf "$I"; mkdir -p "$I"/{bin,sbin,dev,proc,sys,run,tmp,etc,mnt,root,usr,lib/modules}
  local b l m
  for b in /sbin/zfs /sbin/zpool /sbin/zdb /sbin/mkfs.ext4 /sbin/mkfs.xfs /sbin/resize2fs /usr/sbin/xfs_growfs /sbin/mount.nfs /sbin/e2fsck \
           /bin/mount /bin/umount /sbin/blkid /usr/bin/findmnt /bin/lsblk; do
    [ -e "$R$b" ] || continue
    mkdir -p "$I$(dirname $b)"; cp -L "$R$b" "$I$b"
    chroot "$R" /lib64/ld-linux-x86-64.so.2 --list "$b" | grep -oE '/[^ ]+' | while read -r l; do mkdir -p "$I$(dirname "$l")"; [ -e "$I$l" ] || cp -L "$R$l" "$I$l"; done
  done
  cp -L "$R/bin/busybox" "$I/bin/busybox"
  for m in drivers/virtio/virtio drivers/virtio/virtio_ring drivers/virtio/virtio_pci drivers/virtio/virtio_pci_modern_dev drivers/virtio/virtio_pci_legacy_dev \
           drivers/block/virtio_blk net/core/failover drivers/net/net_failover drivers/net/virtio_net net/sunrpc/sunrpc fs/nfs_common/grace fs/nfs_common/nfs_acl \
           fs/lockd/lockd fs/netfs/netfs fs/fscache/fscache net/dns_resolver/dns_resolver fs/nfs/nfs fs/nfs/nfsv3 fs/nfs/nfsv4 lib/libcrc32c fs/xfs/xfs drivers/block/loop net/802/stp net/llc/llc net/bridge/bridge drivers/net/veth; do
    [ ! -e "$M/$m.ko" ] || cp "$M/$m.ko" "$I/lib/modules/"
  done
  cp ko/*.ko "$I/lib/modules/"; strip --strip-debug "$I"/lib/modules/*.ko
  cat >"$I/init" <<'INIT'
#!/bin/busybox sh
/bin/busybox --install -s /bin 2>/dev/null
export PATH=/sbin:/usr/sbin:/bin:/usr/bin
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev; mkdir -p /dev/pts /dev/shm; mount -t devtmpfs dev /dev 2>/dev/null; mount -t devpts p /dev/pts
exec </dev/console >/dev/console 2>&1; ln -sf /proc/mounts /etc/mtab
load() { for pass in 1 2 3 4; do for m in "$@"; do [ -d /sys/module/$m ] || insmod /lib/modules/$m.ko 2>/dev/null; done; done; }
load virtio_ring virtio virtio_pci_legacy_dev virtio_pci_modern_dev virtio_pci virtio_blk failover net_failover virtio_net
load spl znvpair zavl zcommon zunicode zlua zzstd icp zfs
load sunrpc grace nfs_acl lockd netfs fscache dns_resolver nfs nfsv3 nfsv4 libcrc32c xfs loop
load llc stp bridge veth
[ -d /sys/module/zfs ] || { echo "lab.sh: zfs did not load"; dmesg | tail -5; }
ip link set lo up; ip addr add 10.0.2.15/24 dev eth0; ip link set eth0 up; ip route add default via 10.0.2.2
mkdir -p /job; tar -xf /dev/vdb -C /job; cd /job; sh ./run.sh; echo "lab.sh: exit $?"
reboot -f
INIT
  chmod +x "$I/init"
  (cd "$I" && find . | cpio -o -H newc --quiet | zstd -3 -q -f -o "$W/initramfs.part")
  cp "tree/boot/vmlinuz-$kv" vmlinuz
  rm -rf tree src userland initramfs debs
  mv initramfs.part initramfs.zst
}

key=$(declare -f build | sha256sum | cut -c1-16)
W=${XDG_CACHE_HOME:-$HOME/.cache}/cradlestack/zfslab-$key
mkdir -p "$W"

run() {
  local job=$1
  tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
  [ -e "$W/initramfs.zst" ] || { echo "lab.sh: not built: run $0 build" >&2; exit 1; }
  tar -C "$job" -hcf "$tmp/job.tar" .; truncate -s %1M "$tmp/job.tar"
  local disk=${ZFSLAB_DISK:-$tmp/disk}
  if [ ! -s "$disk" ]; then
    truncate -s 4G "$disk"
    # one partition of type 83 over sectors 2048…8388607 (the MBR's first entry, and its signature)
    printf '\0\0\0\0\x83\0\0\0\x00\x08\x00\x00\x00\xf8\x7f\x00' | dd of="$disk" bs=1 seek=446 conv=notrunc status=none
    printf '\x55\xaa' | dd of="$disk" bs=1 seek=510 conv=notrunc status=none
  fi
  timeout --foreground "${ZFSLAB_TIMEOUT:-300}" qemu-system-x86_64 -M q35 -accel tcg,thread=multi -cpu qemu64 -smp "${ZFSLAB_CPUS:-1}" -m "${ZFSLAB_MEMORY:-1536}" -nodefaults -vga none -no-user-config -nographic -serial stdio -no-reboot \
    -kernel "$W/vmlinuz" -initrd "$W/initramfs.zst" -append "console=ttyS0 quiet reboot=t panic=-1 mitigations=off nopti init_on_alloc=0 zfs.zfs_arc_max=402653184" \
    -drive id=d0,file="$disk",format=raw,if=none,cache=unsafe,file.locking=off -device virtio-blk-pci,drive=d0 \
    -drive id=d1,file="$tmp/job.tar",format=raw,if=none -device virtio-blk-pci,drive=d1 \
    ${ZFSLAB_QMP:+-qmp "unix:$ZFSLAB_QMP,server=on,wait=off"} \
    -netdev "${ZFSLAB_NET:-user},id=n0" -device virtio-net-pci,netdev=n0,mac="${ZFSLAB_MAC:-52:54:00:12:34:56}",romfile= </dev/null | tee "$tmp/console"
  grep -q 'lab.sh: exit 0' "$tmp/console"
}

case ${1:-} in build) build ;; run) run "${2:?JOBDIR}" ;; *) sed -n '2,3p' "$0" >&2; exit 2 ;; esac
