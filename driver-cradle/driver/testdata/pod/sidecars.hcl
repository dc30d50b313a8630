# Several containers in one pod.
job "shop" {
  group "g" {
    task "shop" {
      driver = "cradle"
      env {
        PASSWORD = "only the task's own container has it"
      }
      config {
        image = "shop:1"
        lifecycle {
          after {
            container = "migrate"
            until     = "exited"
          }
          after {
            container = "cache"
            until     = "healthy"
          }
        }
        volumes = ["files:/files"]
        container "migrate" {
          image   = "shop:1"
          command = "migrate"
          env {
            NOMAD_ALLOC_ID = "none"
            DATABASE       = "shop"
          }
        }
        container "cache" {
          image       = "redis:7"
          memory      = "32MiB"
          stop_signal = "SIGINT"
          user        = "redis"
          healthcheck {
            test = ["CMD", "redis-cli", "ping"]
          }
          lifecycle {
            restart_on_failure = true
            critical           = true
          }
          mount {
            type     = "task"
            source   = "/files"
            target   = "/seen"
            readonly = true
          }
        }
      }
    }
  }
}
