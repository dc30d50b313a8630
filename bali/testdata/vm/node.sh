# node.sh, TestVMSystemd's: a bare host becomes a node that runs pods.
. ./lib.sh
serve
host 10.0.2.15 10.0.2.2
sh ./bootstrap/bootstrap.sh server,client http://127.0.0.1:8000 /job/keys/node 10.0.2.15
ok "bootstrap from a URL"
wait_for 300 "the node is ready, with a healthy driver" ready 1
nomad node status | grep -w ready
ok "nomad node status is ready"
