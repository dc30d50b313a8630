# Files for many pods, which each guest mounts itself from the filer: nomad volume create shared.volume.hcl
id           = "shared"
name         = "shared"
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

# Nomad 1.11 takes a changed capacity_min of a volume in use only where this block is there, be it empty.
mount_options {}

parameters {
  class  = "nfs"
  attach = "direct"
}
