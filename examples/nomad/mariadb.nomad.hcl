# A database whose data outlives its pod: stop the job, run it again, and every row is there. The volume is a directory of the node:
#
#     nomad volume create mariadb.volume.hcl

variable "images" {
  description = "where the example images are: make images has put them there; a registry is as good"
  default     = "oci:/root/.cache/cradlestack/images"
}

variable "password" {
  description = "of root; a real job reads it from a Nomad variable by a template"
  default     = "secret"
}

job "mariadb" {
  group "mariadb" {
    network {
      mode = "bridge"
      port "sql" {
        to = 3306
      }
    }

    volume "data" {
      type            = "host"
      source          = "mariadb"
      access_mode     = "single-node-writer"
      attachment_mode = "file-system"
    }

    service {
      name = "mariadb"
      port = "sql"
      check {
        type     = "tcp"
        interval = "5s"
        timeout  = "5s"
      }
    }

    task "mariadb" {
      driver       = "cradle"
      kill_timeout = "30s"

      config {
        image = "${var.images}/mariadb"
      }

      volume_mount {
        volume      = "data"
        destination = "/var/lib/mysql"
      }

      template {
        data        = <<-END
          MARIADB_ROOT_PASSWORD=${var.password}
          MARIADB_DATABASE=shop
        END
        destination = "secrets/mariadb.env"
        env         = true
      }

      resources {
        cpu    = 500
        memory = 512
      }
    }
  }

  # The first start makes the database, which takes its time where machines are emulated.
  update {
    healthy_deadline  = "9m"
    progress_deadline = "10m"
  }
}
