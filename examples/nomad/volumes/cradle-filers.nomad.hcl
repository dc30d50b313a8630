# A set of filers, on every node that has the file system at /mnt/shared: one of them serves its volumes at the floating address, another takes over when that ends.
# Before it: mkdir /mnt/shared/volumes, once.
#
# The plugin on such nodes has, in cradle-csi.nomad.hcl:
#     "--pool", "/mnt/shared/volumes", "--filer", "files.service.consul:2051", "--filer-key", "/mnt/shared/volumes/.cradle-filer@state/handles.key"
# where files.service.consul is looked up in Consul's DNS; else the floating address stands there.
#
# On nodes that have not that file system, and with a set on ZFS on all nodes, the active filer makes the volumes, and the plugin has
#     "--backend", "filer", "--filer", "files.service.consul:2051", "--filer-key", "/etc/cradle/peers.key"
# which is a copy of that key, or the file of the filers' --peers-key.
job "cradle-filers" {
  type = "system"

  group "cradle-filer" {
    # Pods that have files open wait until one serves again, and go on.
    restart {
      interval = "1m"
      attempts = 20
      delay    = "1s"
      mode     = "delay"
    }

    task "cradle-filer" {
      driver = "raw_exec"

      # It lets another one serve before it ends.
      kill_signal  = "SIGTERM"
      kill_timeout = "20s"

      config {
        command = "/usr/local/bin/cradle-filer"
        args = [
          "serve", "--set", "files", "--member", "${node.unique.name}", "--floating", "10.1.2.9/24@eth0",
          "--pool", "/mnt/shared/volumes",
        ]
      }
    }
  }
}
