#!/bin/sh
# bootstrap.sh ROLES SOURCE KEYS ADDRESS [JOIN…]: make this bare host a member of the stack.
#
#   ROLES    of server, client and dockerapi, with commas between them; all is the three of them, for a first host
#   SOURCE   URL or folder (a USB stick) with the images (images.sh)
#   KEYS     folder with this node's keys (keys.sh); it can go away afterwards
#   ADDRESS  this node's own address
#   JOIN     addresses of servers; none for the first one
#
# EXPECT=3 waits for that many servers before a leader is elected (default 1). SUFFIX is that of images.sh (default tar.gz).
# Needs root, systemd and bali, and that the images' signer is trusted here: bali trust add IDENTITY.
set -eu
[ $# -ge 4 ] || { sed -n '2,11p' "$0" >&2; exit 2; }
roles=$1 source=$2 keys=$3 address=$4
shift 4
here=$(cd "$(dirname "$0")" && pwd)
etc=/etc/cradlestack
store=/etc/credstore.encrypted
cache=/var/cache/bali
suffix=${SUFFIX:-tar.gz}
join="$*"
[ -n "$join" ] || join=$address
[ "$roles" != all ] || roles=server,client,dockerapi
for role in $(echo "$roles" | tr , ' '); do
  case $role in server|client|dockerapi) ;; *) echo "bootstrap.sh: $role is no role: server, client, dockerapi or all" >&2; exit 2 ;; esac
done
is() { case ,$roles, in *,$1,*) ;; *) return 1 ;; esac; }
case $source in *://*) ;; *) source=$(cd "$source" && pwd) ;; esac

umask 077
mkdir -p "$etc/consul" "$etc/nomad" "$store" "$cache"
for service in consul nomad; do
  rm -f "$etc/$service"/*.hcl
  cp "$here/$service/common.hcl" "$etc/$service/"
done
if is server; then cp "$here/consul/server.hcl" "$etc/consul/"; else cp "$here/consul/client.hcl" "$etc/consul/"; fi
for role in server client; do
  if is $role; then cp "$here/nomad/$role.hcl" "$etc/nomad/"; fi
done

# this node's own words
list=$(for j in $join; do printf '"%s", ' "$j"; done)
{
  echo "bind_addr = \"$address\""
  echo "retry_join = [${list%, }]"
  if is server; then echo "bootstrap_expect = ${EXPECT:-1}"; fi
} >"$etc/consul/node.hcl"
{
  echo "advertise {"
  echo "  http = \"127.0.0.1\""
  echo "  rpc  = \"$address\""
  echo "  serf = \"$address\""
  echo "}"
  if is server; then echo "server { bootstrap_expect = ${EXPECT:-1} }"; fi
  # without, it looks for a default route
  if is client; then printf 'client { network_interface = "{{ GetAllInterfaces | include `address` `^%s/` | attr `name` }}" }\n' "$address"; fi
} >"$etc/nomad/node.hcl"

# Keys lie on the disk encrypted to this machine (its TPM, or a key of systemd's); a service sees its own in
# /run/credentials, in memory that is never swapped.
seal() { systemd-creds encrypt --name="$2" "$keys/$1" "$store/$3" 2>/dev/null || { echo "bootstrap.sh: systemd-creds can't encrypt $keys/$1" >&2; exit 1; }; }
for service in consul nomad cradle-dockerapi; do
  for f in ca.pem cert.pem key.pem; do seal "$f" "$f" "$service.$f"; done
done
for service in consul nomad; do seal "$service.hcl" secrets.hcl "$service.secrets.hcl"; done

# put NAME FLAGS… [-- CMD…]: install a service, with its credentials. It runs from the cache, so that its image lies on the disk
# and not in memory.
put() {
  name=$1; shift
  for f in ca.pem cert.pem key.pem secrets.hcl; do
    [ ! -e "$store/$name.$f" ] || set -- --credential "$f:encrypted:$store/$name.$f" "$@"
  done
  bali install "$source/$name.$suffix" --name "$name" --cache "$cache" --within 5m "$@"
}
put consul --state consul -v "$etc/consul:/etc/consul:ro" -- \
  agent -config-dir=/etc/consul -config-file=/run/credentials/consul.service/secrets.hcl

# Pods' and volumes' data (cradle) and networks' addresses (cni) are the host's. raw_exec's tasks run images by bali too.
# SSL_CERT_DIR: the driver believes the registry of cradle-dockerapi.
put nomad --host --after consul.service --state nomad --state cradle --state cni \
  -v "$etc/nomad:/etc/nomad:ro" -v /lib/modules:/lib/modules:ro -v /etc/bali:/etc/bali:ro -v "$cache:$cache" \
  -e SSL_CERT_DIR=/run/credentials/nomad.service -- \
  agent -config=/etc/nomad -config=/run/credentials/nomad.service/secrets.hcl

# the sockets of the next two
echo 'd /run/cradle 0755 root root' >/etc/tmpfiles.d/cradlestack.conf
systemd-tmpfiles --create /etc/tmpfiles.d/cradlestack.conf

# A client serves its file volumes to its pods. cradle-csi, which makes them, is a job of Nomad's; a client has its image beforehand, and later without SOURCE.
if is client; then
  put cradle-filer --state cradle -v /run/cradle:/run/cradle --check 'test -S /run/cradle/filer/api.sock' -- serve --address "$address"
  bali run -q --cache "$cache" "$source/cradle-csi.$suffix" -- version
fi

if is dockerapi; then
  credentials=/run/credentials/cradle-dockerapi.service
  put cradle-dockerapi --after nomad.service --state cradle-images -v /run/cradle:/run/cradle --check 'test -S /run/cradle/docker.sock' -- \
    serve --images /var/lib/cradle-images --registry-listen "$address:5000" --registry-cert $credentials/cert.pem --registry-key $credentials/key.pem
fi
echo "$roles: done; bali upgrade NAME [URL] installs another image of consul, nomad, cradle-filer or cradle-dockerapi, bali rollback NAME goes back"
