# A block volume of the host node1 that is copied to cold storage every hour. Should the host be lost:
# cradle-csi lv2 restore ledger --to NODE
id           = "ledger"
name         = "ledger"
type         = "csi"
plugin_id    = "cradle-node1"
capacity_min = "64MiB"

capability {
  access_mode     = "single-node-writer"
  attachment_mode = "file-system"
}

parameters {
  class = "lv2"
  cold  = "hourly=24,daily=7,weekly=4"
}
