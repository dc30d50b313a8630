# A job that runs every minute, and never twice at once. nomad job periodic force periodic runs it now.

variable "images" {
  description = "where the example images are: make images has put them there; a registry is as good"
  default     = "oci:/root/.cache/cradlestack/images"
}

job "periodic" {
  type = "batch"

  periodic {
    crons            = ["* * * * *"]
    prohibit_overlap = true
  }

  group "periodic" {
    task "date" {
      driver = "cradle"

      config {
        image   = "${var.images}/busybox"
        command = "date"
      }
    }
  }
}
