# A service that is updated without being away: a canary of the new version runs beside the old ones until it is promoted, then they are replaced one by one.
#
#     nomad job run canary.nomad.hcl
#     nomad job run -detach -var greeting=new canary.nomad.hcl
#     nomad deployment promote ID
#
# It also moves by itself when its node is drained, one allocation after the other: nomad node drain -enable ID.

variable "images" {
  description = "where the example images are: make images has put them there; a registry is as good"
  default     = "oci:/root/.cache/cradlestack/images"
}

variable "greeting" {
  default = "old"
}

job "canary" {
  group "canary" {
    count = 2

    network {
      mode = "bridge"
      port "http" {
        to = 80
      }
    }

    service {
      name        = "canary"
      port        = "http"
      tags        = ["live"]
      canary_tags = ["canary"]
      check {
        type     = "http"
        path     = "/"
        interval = "2s"
        timeout  = "5s"
      }
    }

    update {
      canary           = 1
      max_parallel     = 1
      min_healthy_time = "2s"
      auto_revert      = true
    }

    migrate {
      max_parallel     = 1
      min_healthy_time = "2s"
    }

    task "page" {
      driver = "cradle"

      config {
        image   = "${var.images}/busybox"
        init    = true # httpd as process 1 would not hear signals
        command = "sh"
        args    = ["-c", "mkdir /www && echo '${var.greeting}' >/www/index.html && exec httpd -f -p 80 -h /www"]
      }

      resources {
        cpu    = 100
        memory = 64
      }
    }
  }
}
