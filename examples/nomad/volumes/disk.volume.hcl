# A block device, raw.
id           = "disk"
name         = "disk"
type         = "csi"
plugin_id    = "cradle"
capacity_min = "64MiB"

capability {
  access_mode     = "single-node-writer"
  attachment_mode = "block-device"
}

parameters {
  class = "lv2"
}
