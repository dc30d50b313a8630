# The filer, on every node: it serves that node's file volumes to the guests of cradle pods, as cradle-csi tells it.
job "cradle-filer" {
  type = "system"

  group "cradle-filer" {
    # Pods that have files open wait until it is back, and go on.
    restart {
      interval = "1m"
      attempts = 20
      delay    = "1s"
      mode     = "delay"
    }

    task "cradle-filer" {
      driver = "raw_exec"

      config {
        command = "/usr/local/bin/cradle-filer"
        args    = ["serve", "--pool", "/var/lib/cradle/volumes", "--state", "/var/lib/cradle/filer"]
      }
    }
  }
}
