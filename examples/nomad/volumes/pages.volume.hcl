# Files for many readers and writers, with a quota and automatic snapshots.
id           = "pages"
name         = "pages"
type         = "csi"
plugin_id    = "cradle"
capacity_min = "64MiB"

capability {
  access_mode     = "multi-node-multi-writer"
  attachment_mode = "file-system"
}

capability {
  access_mode     = "multi-node-reader-only"
  attachment_mode = "file-system"
}

parameters {
  class     = "nfs"
  snapshots = "hourly=24,daily=7,weekly=4,monthly=12"
}
