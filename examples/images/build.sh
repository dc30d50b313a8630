#!/bin/bash
# Makes real container images from the packages of this Debian (or Ubuntu) host; no registry is asked.
#
#   build.sh NAME…|all      one of: busybox debian nginx redis postgres mariadb
#   build.sh path NAME      prints where the image is
#
# Each result is an OCI layout, ${XDG_CACHE_HOME:-~/.cache}/cradlestack/images/NAME (use it as oci:DIR); it is rebuilt only
# when its recipe or its base changes. busybox exists a second time as busybox-docker.tar, built by `docker build` from
# busybox/Dockerfile and written by `docker save` (use it as docker-archive:FILE).
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
top=$(cd "$here/../.." && pwd)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/cradlestack/images
export SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-1767225600} # 2026-01-01: no file in an image is newer
export LC_ALL=C.UTF-8 DEBIAN_FRONTEND=noninteractive

all=(busybox debian nginx redis postgres mariadb)

die() { echo "images: $*" >&2; exit 1; }

# recipe_key NAME: what the image's content depends on, beside the packages' versions.
recipe_key() {
	{
		cd "$here"
		find "$1" mkimage build.sh -type f -print0 | sort -z | xargs -0 sha256sum
		find "$1" -type f -perm /111 | sort
		[ "$1" = busybox ] || [ "$1" = debian ] || recipe_key debian
		echo "$SOURCE_DATE_EPOCH $(dpkg --print-architecture) ${VERSION_CODENAME:-}"
	} | sha256sum | cut -c1-32
}

# contained COMMAND…: whatever mounts or leaves processes runs in namespaces of its own. They end with this script, however
# that ends: the kernel kills unshare with its parent, and the namespace's first process with unshare.
contained() {
	setpriv --pdeathsig KILL unshare --mount --pid --fork --kill-child --mount-proc --propagation private -- "$@" &
	child=$!
	wait "$child" || return
	child=
}

cleanup() {
	[ -z "${child:-}" ] || { kill -KILL "$child"; wait "$child"; } 2>/dev/null || true
	rm -rf "$work"
}

# need COMMAND PACKAGE
need() {
	command -v "$1" >/dev/null || die "$1 is missing: apt-get install -y --no-install-recommends $2"
}

# download DIR STATUS PACKAGE…: the packages with what they need beyond the dpkg status file, by the host's own apt.
download() {
	local dir=$1 status=$2
	shift 2
	mkdir -p "$dir/partial"
	local apt=(apt-get -qq -y --no-install-recommends --download-only -o Debug::NoLocking=1
		-o Dir::Cache::archives="$dir" -o Dir::State::status="$status" -o APT::Sandbox::User=root)
	if ! "${apt[@]}" install "$@" >"$dir/log" 2>&1; then
		apt-get -qq update || die "apt-get update failed: are the package sources of this host reachable?"
		"${apt[@]}" install "$@" >"$dir/log" 2>&1 || { cat "$dir/log" >&2; die "cannot download $*"; }
	fi
	rm -rf "$dir/partial" "$dir/log" "$dir/lock"
}

# finish NAME: makes $work/NAME the image.
finish() {
	recipe_key "$1" >"$work/$1/recipe"
	chmod -R a+rX "$work/$1"
	rm -rf "${cache:?}/$1.old"
	[ ! -e "$cache/$1" ] || mv "$cache/$1" "$cache/$1.old"
	mv "$work/$1" "$cache/$1"
	rm -rf "${cache:?}/$1.old"
}

build_busybox() {
	: >"$work/status"
	download "$work/debs" "$work/status" busybox-static
	dpkg-deb -x "$work"/debs/busybox-static_*.deb "$work/busybox.deb"
	local root=$work/busybox.root
	mkdir -p "$root"/{bin,dev,etc,home,root,tmp,usr/bin,usr/sbin,sbin,var/spool/mail,var/www}
	cp "$work/busybox.deb/bin/busybox" "$root/bin/busybox"
	local applet
	for applet in $("$root/bin/busybox" --list); do
		[ "$applet" = busybox ] || ln "$root/bin/busybox" "$root/bin/$applet"
	done
	ln "$root/bin/busybox" "$root/usr/bin/env"
	cp -R "$here/busybox/rootfs/." "$root/"
	mkdir -p "$root/etc/network"/if-{down,post-down,pre-up,up}.d
	chmod -R u=rwX,go=rX "$root/etc"
	chmod 600 "$root/etc/shadow"
	chmod 700 "$root/root"
	chmod 1777 "$root/tmp" "$root/var/spool/mail"
	chown -R 33:33 "$root/var/www"
	"$work/mkimage" build -o "$work/busybox" -config "$here/busybox/image.json" -layer "$root"
}

build_debian() {
	need mmdebstrap mmdebstrap
	local sources=() f opts=()
	for f in "/etc/apt/sources.list.d/$ID.sources" /etc/apt/sources.list; do
		[ ! -s "$f" ] || sources+=("$f")
	done
	# How this host's apt reaches its sources holds while building and is not part of the image.
	for f in /etc/apt/apt.conf /etc/apt/apt.conf.d/*; do
		! grep -qs Acquire "$f" || opts+=(--aptopt="$f")
	done
	contained mmdebstrap --quiet --mode=root --variant=minbase --format=directory \
		--dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/info/*' \
		--dpkgopt='path-exclude=/usr/share/locale/*' --dpkgopt='path-exclude=/usr/share/doc/*' \
		--dpkgopt='path-include=/usr/share/doc/*/copyright' "${opts[@]}" \
		"$VERSION_CODENAME" "$work/debian.root" "${sources[@]}" >&2 ||
		die "mmdebstrap could not make the base system"
	if [ "$ID" = debian ]; then
		cat >"$work/debian.root/etc/apt/sources.list" <<-EOS
			deb http://deb.debian.org/debian $VERSION_CODENAME main
			deb http://deb.debian.org/debian $VERSION_CODENAME-updates main
			deb http://deb.debian.org/debian-security $VERSION_CODENAME-security main
		EOS
		rm -f "$work"/debian.root/etc/apt/sources.list.d/*
	fi
	( # what belongs to this build or to one machine
		cd "$work/debian.root"
		rm -rf dev/* etc/hostname etc/resolv.conf etc/apt/apt.conf.d/99mmdebstrap etc/*- \
			var/cache/ldconfig/aux-cache var/cache/debconf/*-old var/lib/dpkg/*-old var/log/*
		printf '#!/bin/sh\nexit 101\n' >usr/sbin/policy-rc.d # no service starts while a package is installed
		chmod 755 usr/sbin/policy-rc.d
	)
	"$work/mkimage" build -o "$work/debian" -config "$here/debian/image.json" -layer "$work/debian.root"
}

# build_service NAME: the debian image, a layer of packages (NAME/packages) as NAME/install.sh leaves it, and a layer
# with the files of NAME/rootfs.
build_service() {
	local name=$1
	base_root
	download "$work/$name.debs" "$work/base/var/lib/dpkg/status" $(grep -v '^#' "$here/$name/packages")
	mkdir -p "$work/$name.upper" "$work/$name.ovl" "$work/$name.mnt"
	contained bash -euc '
		mnt=$1; recipe=$2; debs=$3
		mount -t overlay overlay -o "lowerdir=$4,upperdir=$5,workdir=$6" "$mnt"
		mount -t proc proc "$mnt/proc"
		mount -t tmpfs tmpfs "$mnt/dev"
		for d in null zero full random urandom tty; do
			touch "$mnt/dev/$d"
			mount --bind "/dev/$d" "$mnt/dev/$d"
		done
		mount -t tmpfs tmpfs "$mnt/mnt"
		mkdir "$mnt/mnt/debs" "$mnt/mnt/recipe"
		mount --bind "$debs" "$mnt/mnt/debs"
		mount --bind "$recipe" "$mnt/mnt/recipe"
		mount -t tmpfs tmpfs "$mnt/run"
		mount -t tmpfs tmpfs "$mnt/tmp"
		env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8 HOME=/root DEBIAN_FRONTEND=noninteractive \
			SOURCE_DATE_EPOCH="$SOURCE_DATE_EPOCH" chroot "$mnt" sh -eu /mnt/recipe/install.sh
		cd "$mnt"
		rm -rf var/log/apt var/log/dpkg.log var/log/alternatives.log var/cache/apt/*.bin var/cache/apt/archives/*.deb \
			var/cache/ldconfig/aux-cache var/cache/debconf/*-old var/lib/dpkg/*-old var/lib/apt/lists/* etc/*-
	' build "$work/$name.mnt" "$here/$name" "$work/$name.debs" "$work/base" "$work/$name.upper" "$work/$name.ovl" \
		</dev/null >"$work/$name.log" 2>&1 || { tail -n 40 "$work/$name.log" >&2; die "$name: install.sh failed"; }
	# debconf writes its answers in an order of its own each time; nobody asks for them again, the base's will do.
	rm -f "$work/$name.upper"/var/cache/debconf/config.dat
	mkdir "$work/files"
	cp -R "$here/$name/rootfs/." "$work/files/"
	chmod -R u=rwX,go=rX "$work/files"
	"$work/mkimage" build -o "$work/$name" -config "$here/$name/image.json" -base "$cache/debian" \
		-layer "$work/$name.upper" -layer "$work/files"
	rm -rf "$work/files"
}

# base_root unpacks the debian image to $work/base, once.
base_root() {
	[ ! -d "$work/base" ] || return 0
	mkdir "$work/base"
	local layer
	for layer in $("$work/mkimage" layers "$cache/debian"); do
		tar -xpzf "$layer" -C "$work/base" --numeric-owner --xattrs --xattrs-include='*'
	done
}

# build_docker runs a real `docker build` in a dockerd of its own, which ends with it.
build_docker() {
	need dockerd docker.io
	need docker docker.io
	"$work/mkimage" save -o "$work/base.tar" -name debian:latest "$cache/debian"
	"$work/mkimage" save -o "$work/bb.tar" -name busybox-packaged:latest "$cache/busybox"
	contained bash -euc '
		work=$1; recipe=$2
		mount -t tmpfs -o mode=755 tmpfs /run
		export DOCKER_HOST=unix:///run/docker.sock DOCKER_BUILDKIT=0 HOME=$work
		dockerd --data-root "$work/docker" --exec-root /run/docker --pidfile /run/docker.pid -H "$DOCKER_HOST" \
			--bridge=none --iptables=false >"$work/dockerd.log" 2>&1 &
		pid=$!
		for i in $(seq 150); do
			docker version >/dev/null 2>&1 && break
			kill -0 $pid || { tail -n 20 "$work/dockerd.log"; exit 1; }
			sleep 0.2
		done
		docker load -q -i "$work/base.tar"
		docker load -q -i "$work/bb.tar"
		docker build --network none -t busybox:docker "$recipe"
		docker save -o "$work/busybox-docker.tar" busybox:docker
		kill $pid
		wait $pid || true
	' build "$work" "$here/busybox" </dev/null >"$work/docker.log" 2>&1 ||
		{ tail -n 40 "$work/docker.log" >&2; die "docker build of busybox failed"; }
	mv "$work/busybox-docker.tar" "$cache/busybox-docker.tar"
	{ recipe_key busybox; recipe_key debian; } >"$cache/busybox-docker.recipe"
}

make_one() {
	local name=$1
	if [ "$(cat "$cache/$name/recipe" 2>/dev/null)" != "$(recipe_key "$name")" ]; then
		echo "images: building $name" >&2
		case $name in
		busybox) build_busybox ;;
		debian) build_debian ;;
		*)
			make_one debian
			build_service "$name"
			;;
		esac
		finish "$name"
	fi
	if [ "$name" = busybox ] && [ "$with_docker" = yes ] &&
		[ "$(cat "$cache/busybox-docker.recipe" 2>/dev/null)" != "$(recipe_key busybox; recipe_key debian)" ]; then
		make_one debian
		echo "images: building busybox with docker" >&2
		build_docker
	fi
}

. /etc/os-release

[ $# -gt 0 ] || die "usage: build.sh NAME…|all (one of ${all[*]})"
if [ "$1" = path ]; then
	[ $# = 2 ] || die "usage: build.sh path NAME"
	echo "$cache/$2"
	exit
fi
with_docker=no
names=("$@")
if [ "$1" = all ]; then
	names=("${all[@]}")
	with_docker=yes
fi
for name in "${names[@]}"; do
	[[ " ${all[*]} " == *" $name "* ]] || die "no recipe $name: one of ${all[*]}"
done

mkdir -p "$cache"
exec 9>"$cache/.lock"
flock 9

stale=no
for name in "${names[@]}"; do
	[ "$(cat "$cache/$name/recipe" 2>/dev/null)" = "$(recipe_key "$name")" ] || stale=yes
done
if [ $with_docker = yes ]; then
	[ "$(cat "$cache/busybox-docker.recipe" 2>/dev/null)" = "$(recipe_key busybox; recipe_key debian)" ] || stale=yes
fi
[ $stale = yes ] || exit 0

[ "$(id -u)" = 0 ] || die "building images needs root (chroot, overlay mounts)"
rm -rf "$cache"/.work.* # of a run that was killed
work=$(mktemp -d "$cache/.work.XXXXXX")
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
(cd "$top" && go build -o "$work/mkimage" ./examples/images/mkimage)
for name in "${names[@]}"; do
	make_one "$name"
done
