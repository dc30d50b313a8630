client {
  enabled  = true
  cni_path = "/usr/lib/cni" # of the image
}

plugin_dir = "/usr/lib/nomad/plugins"

plugin "nomad-driver-cradle" {
  config {}
}

# for cradle-csi.nomad.hcl; who may submit jobs is root on the nodes with it, until ACLs say who may
plugin "raw_exec" {
  config {
    enabled = true
  }
}
