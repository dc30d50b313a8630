# The CSI plugin of one host among several, and copies of its volumes to cold storage every hour:
# nomad job run -var node=NAME cradle-csi-host.nomad.hcl
#
# Nomad sends what is to be made to any plugin of an id, so that each host has its own. With ACLs the plugin has to be allowed to read which volumes
# were restored elsewhere: nomad acl policy apply -namespace default -job cradle-csi-NAME cradle-csi-NAME cradle-csi.policy.hcl
variable "node" {
  type = string
}

job "cradle-csi-host" {
  id   = "cradle-csi-${var.node}"
  type = "system"

  constraint {
    attribute = "${node.unique.name}"
    value     = var.node
  }

  group "cradle-csi" {
    restart {
      interval = "1m"
      attempts = 20
      delay    = "1s"
      mode     = "delay"
    }

    task "cradle-csi" {
      driver = "raw_exec"

      # By which it asks Nomad.
      identity {
        env = true
      }

      config {
        command = "/usr/local/bin/cradle-csi"
        args = [
          "monolith", "--pool", "/var/lib/cradle/volumes", "--node-id", "${node.unique.name}", "--zone", "${node.datacenter}",
          "--cold", "/srv/cradle-cold", "--cold-key", "/etc/cradle/cold.key",
        ]
      }

      csi_plugin {
        id                     = "cradle-${var.node}"
        type                   = "monolith"
        stage_publish_base_dir = "/var/lib/nomad/client/csi/monolith/cradle-${var.node}"
      }
    }
  }
}
