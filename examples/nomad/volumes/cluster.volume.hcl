# Files for many pods on many hosts, on CephFS, which each guest mounts itself (a plugin with --backend ceph): nomad volume create cluster.volume.hcl
id           = "cluster"
name         = "cluster"
type         = "csi"
plugin_id    = "cradle"
capacity_min = "64MiB"

capability {
  access_mode     = "multi-node-multi-writer"
  attachment_mode = "file-system"
}

# Nomad 1.11 takes a changed capacity_min of a volume in use only where this block is there, be it empty.
mount_options {}

parameters {
  class  = "gfs"
  attach = "direct"
}
