#!/bin/sh
# bootstrap.sh ROLE SOURCE KEYS ADDRESS [JOIN…]: make this bare host a member of the stack.
#
#   ROLE     server, or client; a first server is both (all)
#   SOURCE   URL or folder (a USB stick) with consul.tar.gz and nomad.tar.gz
#   KEYS     folder with this node's keys (keys.sh); it can go away afterwards
#   ADDRESS  this node's own address
#   JOIN     addresses of servers; none for the first one
#
# EXPECT=3 waits for that many servers before a leader is elected (default 1).
# Needs root, systemd and bali, and that the images' signer is trusted here: bali trust add IDENTITY.
set -eu
[ $# -ge 4 ] || { sed -n '2,11p' "$0" >&2; exit 2; }
role=$1 source=$2 keys=$3 address=$4
shift 4
here=$(cd "$(dirname "$0")" && pwd)
etc=/etc/cradlestack
store=/etc/credstore.encrypted
join="$*"
[ -n "$join" ] || join=$address

umask 077
mkdir -p "$etc/consul" "$etc/nomad" "$store"
case $role in
  server|all) cp "$here/consul/server.hcl" "$etc/consul/role.hcl"; cp "$here/nomad/server.hcl" "$etc/nomad/role.hcl" ;;
  client) cp "$here/consul/client.hcl" "$etc/consul/role.hcl"; cp "$here/nomad/client.hcl" "$etc/nomad/role.hcl" ;;
  *) echo "bootstrap.sh: $role is no role: server, client or all" >&2; exit 2 ;;
esac
[ "$role" != all ] || cp "$here/nomad/client.hcl" "$etc/nomad/client.hcl"
for service in consul nomad; do cp "$here/$service/common.hcl" "$etc/$service/common.hcl"; done

# this node's own words
list=$(for j in $join; do printf '"%s", ' "$j"; done)
{
  echo "bind_addr = \"$address\""
  echo "retry_join = [${list%, }]"
  [ "$role" = client ] || echo "bootstrap_expect = ${EXPECT:-1}"
} >"$etc/consul/node.hcl"
{
  echo "advertise {"
  echo "  http = \"127.0.0.1\""
  echo "  rpc  = \"$address\""
  echo "  serf = \"$address\""
  echo "}"
  [ "$role" = client ] || echo "server { bootstrap_expect = ${EXPECT:-1} }"
} >"$etc/nomad/node.hcl"

# Keys lie on the disk encrypted to this machine (its TPM, or a key of systemd's); a service sees its own in
# /run/credentials, in memory that is never swapped.
seal() { systemd-creds encrypt --name="$2" "$keys/$1" "$store/$3" 2>/dev/null || { echo "bootstrap.sh: systemd-creds can't encrypt $keys/$1" >&2; exit 1; }; }
for service in consul nomad; do
  for f in ca.pem cert.pem key.pem; do seal "$f" "$f" "$service.$f"; done
  seal "$service.hcl" secrets.hcl "$service.secrets.hcl"
done

credentials() { for f in ca.pem cert.pem key.pem secrets.hcl; do printf -- '--credential %s:encrypted:%s/%s.%s ' "$f" "$store" "$1" "$f"; done; }
# shellcheck disable=SC2046 # words
bali install "$source/consul.tar.gz" --name consul --state consul -v "$etc/consul:/etc/consul:ro" $(credentials consul) \
  --within 5m -- agent -config-dir=/etc/consul -config-file=/run/credentials/consul.service/secrets.hcl
# shellcheck disable=SC2046 # words
bali install "$source/nomad.tar.gz" --name nomad --host --state nomad -v "$etc/nomad:/etc/nomad:ro" -v /lib/modules:/lib/modules:ro $(credentials nomad) \
  --after consul.service --within 5m -- agent -config=/etc/nomad -config=/run/credentials/nomad.service/secrets.hcl
echo "consul and nomad run; bali upgrade consul|nomad [URL] installs another image, bali rollback goes back"
