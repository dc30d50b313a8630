# A block volume that a cradle pod attaches itself: the fastest way, and the host's kernel never reads its file system.
id           = "guest"
name         = "guest"
type         = "csi"
plugin_id    = "cradle"
capacity_min = "1GiB"

capability {
  access_mode     = "single-node-writer"
  attachment_mode = "file-system"
}

# Nomad 1.11 takes a changed capacity_min of a volume in use only where this block is there, be it empty.
mount_options {
  fs_type = "ext4"
}

parameters {
  class     = "lv2"
  attach    = "direct"
  iops      = "2000"
  bandwidth = "100MiB"
}
