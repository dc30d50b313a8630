# cluster.sh, TestVMSoakCluster's: node.sh's third, with two more. Every machine is server and client, joined over a network
# of their own; each has the images on a stick. The first runs a pod for all, and tells the others when it has.
. ./lib.sh
n=$(cat number)
hostnamectl hostname "node$n"
host "10.1.0.$n" 10.1.0.9
export EXPECT=3
join=
[ "$n" = 1 ] || join=10.1.0.1
sh ./bootstrap/bootstrap.sh server,client /job/web "/job/keys/node$n" "10.1.0.$n" $join
ok "bootstrap from a stick"
wait_for 900 "three nodes are ready, with healthy drivers" ready 3
wait_for 300 "three servers are healthy" sh -c 'curl -sf 127.0.0.1:4646/v1/operator/autopilot/health | grep -o "\"Voter\":true" | wc -l | grep -x 3'
kv=http://127.0.0.1:8500/v1/kv
if [ "$n" = 1 ]; then
  nomad node status
  nomad server members
  # where its image is
  busybox_pod hello 'echo hello from a pod' 'constraint {
      attribute = "${attr.unique.hostname}"
      value     = "node1"
    }'
  wait_for 900 "a pod ran" said hello 'hello from a pod'
  # each machine waits for the others
  for other in 2 3; do wait_for 600 "node$other has seen it" curl -sf "$kv/seen$other"; done
  curl -sf -X PUT -d 1 "$kv/done"
  sleep 10
else
  wait_for 1800 "a pod of the first is seen from here" said hello 'hello from a pod'
  curl -sf -X PUT -d 1 "$kv/seen$n"
  wait_for 600 "the first is done" curl -sf "$kv/done"
fi
ok "done"
