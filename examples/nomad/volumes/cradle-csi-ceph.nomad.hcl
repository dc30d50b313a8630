# The CSI plugin, on every node, with volumes on the CephFS "cephfs". Before it, on each node: ceph-common and ceph-fuse, /etc/ceph/ceph.conf, and the
# keyring that ceph-client.sh prints, as /etc/ceph/ceph.client.cradle.keyring.
#
# stage_publish_base_dir is this client's data_dir, client/csi/TYPE/ID: under raw_exec the plugin sees the host's paths.
job "cradle-csi-ceph" {
  type = "system"

  group "cradle-csi" {
    # Volumes that are in use don't need it; whoever wants one now does.
    restart {
      interval = "1m"
      attempts = 20
      delay    = "1s"
      mode     = "delay"
    }

    task "cradle-csi" {
      driver = "raw_exec"

      config {
        command = "/usr/local/bin/cradle-csi"
        args    = ["monolith", "--backend", "ceph", "--pool", "cephfs", "--node-id", "${node.unique.name}", "--zone", "${node.datacenter}"]
      }

      csi_plugin {
        id                     = "cradle"
        type                   = "monolith"
        stage_publish_base_dir = "/var/lib/nomad/client/csi/monolith/cradle"
      }
    }
  }
}
