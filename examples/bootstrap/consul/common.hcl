datacenter       = "dc1"
data_dir         = "/var/lib/consul"
client_addr      = "127.0.0.1"
disable_update_check = true

# Every connection between agents is mutual TLS. The files are systemd credentials.
tls {
  defaults {
    ca_file         = "/run/credentials/consul.service/ca.pem"
    cert_file       = "/run/credentials/consul.service/cert.pem"
    key_file        = "/run/credentials/consul.service/key.pem"
    verify_incoming = true
    verify_outgoing = true
  }
  internal_rpc {
    verify_server_hostname = true
  }
  # the HTTP API listens on the loopback interface only
  https {
    verify_incoming = false
  }
}
