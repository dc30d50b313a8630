datacenter           = "dc1"
data_dir             = "/var/lib/nomad"
disable_update_check = true

# The HTTP API listens on the loopback interface; RPC and gossip between nodes on all.
addresses {
  http = "127.0.0.1"
}

consul {
  address = "127.0.0.1:8500"
}

tls {
  rpc                    = true
  http                   = false
  ca_file                = "/run/credentials/nomad.service/ca.pem"
  cert_file              = "/run/credentials/nomad.service/cert.pem"
  key_file               = "/run/credentials/nomad.service/key.pem"
  verify_server_hostname = true
}
