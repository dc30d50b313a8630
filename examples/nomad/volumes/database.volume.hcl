# A block volume with a file system that the host mounts: nomad volume create database.volume.hcl
id           = "database"
name         = "database"
type         = "csi"
plugin_id    = "cradle"
capacity_min = "320MiB"

capability {
  access_mode     = "single-node-writer"
  attachment_mode = "file-system"
}

# Nomad 1.11 takes a changed capacity_min of a volume in use only where this block is there, be it empty.
mount_options {
  fs_type     = "xfs"
  mount_flags = ["noatime"]
}

parameters {
  class = "lv2"
}
