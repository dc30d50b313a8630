# The CSI plugin, on the client that has volumes (of several each needs a plugin id of its own, see README.md), from its signed image:
#
#     bali run -q --cache /var/cache/bali /var/lib/bali/nomad/current -- job run -var image=SOURCE/cradle-csi.tar.gz - <cradle-csi.nomad.hcl
#
# With bootstrap.sh's SOURCE each client has the image already, and starts from its cache while SOURCE is away.
#
# The plugin's mounts are made in folders that it shares with Nomad, and Nomad with the host, so they appear in all three.
variable "image" {
  description = "URL or path of cradle-csi.tar.gz"
}

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
        command = "/bin/bali"
        args = [
          "run", "--cache", "/var/cache/bali", "-v", "/var/lib/nomad:/var/lib/nomad", "-v", "/var/lib/cradle:/var/lib/cradle", "-v", "/run/cradle:/run/cradle", var.image, "--",
          "monolith", "--pool", "/var/lib/cradle/volumes", "--filer", "/run/cradle/filer/api.sock", "--node-id", "${node.unique.name}", "--zone", "${node.datacenter}",
        ]
      }

      csi_plugin {
        id                     = "cradle"
        type                   = "monolith"
        stage_publish_base_dir = "/var/lib/nomad/client/csi/monolith/cradle"
      }
    }
  }
}
