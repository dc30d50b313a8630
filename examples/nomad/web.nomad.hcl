# A web server and a second container beside it in the same microVM: they share the network and a volume. Consul checks it from outside, by HTTP, and from inside, by a script.

variable "images" {
  description = "where the example images are: make images has put them there; a registry is as good"
  default     = "oci:/root/.cache/cradlestack/images"
}

job "web" {
  group "web" {
    network {
      mode = "bridge"
      port "http" {
        to = 80
      }
    }

    service {
      name = "web"
      port = "http"
      check {
        type     = "http"
        path     = "/"
        interval = "5s"
        timeout  = "5s"
      }
    }

    task "nginx" {
      driver = "cradle"

      config {
        image = "${var.images}/nginx"
        mount {
          source = "pages"
          target = "/usr/share/nginx/html"
        }

        # The sidecar: it writes what nginx serves.
        container "clock" {
          image   = "${var.images}/busybox"
          command = "sh"
          args    = ["-c", "cd /pages && while true; do date +'<p>It is %T in the pod.</p>' >clock.new && mv clock.new clock.html; sleep 1; done"]
          mount {
            source = "pages"
            target = "/pages"
          }
          lifecycle {
            after {
              container = "nginx"
            }
            restart_on_failure = true
          }
        }
      }

      # A check that runs in the task.
      service {
        name = "web-inside"
        check {
          name     = "configuration"
          type     = "script"
          command  = "/usr/sbin/nginx"
          args     = ["-t", "-q"]
          interval = "5s"
          timeout  = "10s"
        }
      }

      resources {
        cpu    = 200
        memory = 128
      }
    }
  }
}
