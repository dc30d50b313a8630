# A clone of a snapshot: nomad volume snapshot create database before-upgrade
id           = "copy"
name         = "copy"
type         = "csi"
plugin_id    = "cradle"
snapshot_id  = "database@before-upgrade"

capability {
  access_mode     = "single-node-writer"
  attachment_mode = "file-system"
}

parameters {
  class = "lv2"
}
