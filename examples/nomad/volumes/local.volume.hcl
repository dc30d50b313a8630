# A dynamic host volume with a quota: nomad volume create local.volume.hcl
name         = "local"
type         = "host"
plugin_id    = "cradle-host-volume"
capacity_min = "64MiB"
capacity_max = "64MiB"

capability {
  access_mode     = "single-node-multi-writer"
  attachment_mode = "file-system"
}

parameters {
  class = "nfs"
}
