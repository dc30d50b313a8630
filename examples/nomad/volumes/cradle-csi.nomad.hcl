# The CSI plugin, with volumes in a directory of its node, which is the only one that has volumes. Where several have, each needs a plugin id of its own, as
# Nomad asks any plugin of an id for whatever volume: cradle-csi-host.nomad.hcl.
#
# stage_publish_base_dir is this client's data_dir, client/csi/TYPE/ID: under raw_exec the plugin sees the host's paths.
job "cradle-csi" {
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
        args    = ["monolith", "--pool", "/var/lib/cradle/volumes", "--filer", "/run/cradle/filer/api.sock", "--node-id", "${node.unique.name}", "--zone", "${node.datacenter}"]
      }

      csi_plugin {
        id                     = "cradle"
        type                   = "monolith"
        stage_publish_base_dir = "/var/lib/nomad/client/csi/monolith/cradle"
      }
    }
  }
}
