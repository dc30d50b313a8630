#!/bin/sh
# Makes the client that cradle-csi is to Ceph, or mends its capabilities after an upgrade, and prints its keyring. It is an administrator who runs it:
#
#   ceph-client.sh FILESYSTEM [GROUP [CLIENT]] >/etc/ceph/ceph.client.cradle.keyring
#
# The client makes, changes and removes the subvolumes of one group, and keys that read and write the files of one of these and nothing else. It reads no
# key, no file and no object itself. That the manager is not asked which keys for itself it lets others make is Ceph's limit: guard the keyring as root's.
set -eu

fs=${1:?usage: ceph-client.sh FILESYSTEM [GROUP [CLIENT]]}
group=${2:-cradle}
client=client.${3:-cradle}

escaped() { printf %s "$1" | sed 's/\./\\./g'; }

maps="allow service mon r, allow service mds r, allow service osd r, allow service pg r"
mon="$maps, allow service mgr r, allow service fs r"
mon="$mon, allow command \"auth get-or-create\" with entity prefix \"client.cradle:$fs:$group:\" caps_mon=\"$maps\""
mon="$mon caps_mds regex \"allow rw? fsname=$(escaped "$fs") path=/volumes/$(escaped "$group")/[^, ]+\""
mon="$mon caps_osd regex \"allow rw? pool=[^, ]+ namespace=fsvolumens_[^, ]+\""
mon="$mon, allow command \"auth rm\" with entity prefix \"client.cradle:$fs:$group:\""
[ ${#mon} != 512 ] || mon="$mon, allow service mon r" # of that length, Ceph 16.2 lets nobody in
mgr=
for command in "group create" " create" " ls" " info" " rm" " resize" " evict" " metadata set" " metadata ls" " metadata rm" \
  " snapshot create" " snapshot ls" " snapshot info" " snapshot rm"; do
  mgr="${mgr:+$mgr, }allow command \"fs subvolume$command\" with vol_name=$fs group_name=$group"
done

ceph auth get-or-create "$client" mon "$mon" mgr "$mgr" mds "allow * fsname=$fs" >/dev/null 2>&1 ||
  ceph auth caps "$client" mon "$mon" mgr "$mgr" mds "allow * fsname=$fs" >/dev/null # it is there, with others
printf '[%s]\n\tkey = %s\n' "$client" "$(ceph auth print-key "$client")"
