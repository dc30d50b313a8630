#!/bin/sh
# keys.sh CONSUL KEYS NODE server|client ADDRESS: make the keys of the node with that name and address in the folder KEYS/NODE.
#
# CONSUL is the image, a path or URL: its `consul tls` makes the certificates, so this needs nothing but bali. The authority
# and the gossip key are made on first use; KEYS stays with the operator, KEYS/NODE goes to the node. Needs root (bali run).
set -eu
[ $# = 5 ] || { sed -n '2,5p' "$0" >&2; exit 2; }
image=$1 keys=$2 node=$3 role=$4 address=$5
umask 077
mkdir -p "$keys/$node"
keys=$(cd "$keys" && pwd)
consul() { bali run -q -v "$keys:/keys" --workdir /keys "$image" -- "$@"; }

[ -e "$keys/cradlestack-agent-ca.pem" ] || consul tls ca create -domain cradlestack -days 3650 >/dev/null
[ -e "$keys/gossip" ] || { consul keygen >"$keys/gossip.new" && mv "$keys/gossip.new" "$keys/gossip"; }

# One certificate for both programs. Consul and Nomad believe that a peer is a server by these names: a client's certificate
# has none of them.
case $role in
  server) kind=server; set -- -server -node "$node" -additional-dnsname server.dc1.consul -additional-dnsname server.global.nomad ;;
  client) kind=client; set -- -client ;;
  *) echo "keys.sh: $role is no role: server or client" >&2; exit 2 ;;
esac
consul tls cert create "$@" -additional-ipaddress "$address" -domain cradlestack -dc dc1 -days 1095 -additional-dnsname client.global.nomad >/dev/null
mv "$keys/dc1-$kind-cradlestack-0-key.pem" "$keys/$node/key.pem"
mv "$keys/dc1-$kind-cradlestack-0.pem" "$keys/$node/cert.pem"
cp "$keys/cradlestack-agent-ca.pem" "$keys/$node/ca.pem"
gossip=$(cat "$keys/gossip")
echo "encrypt = \"$gossip\"" >"$keys/$node/consul.hcl"
echo "server { encrypt = \"$gossip\" }" >"$keys/$node/nomad.hcl"
