# A web server and a database, each in a microVM with a volume of its own.

terraform {
  required_version = ">= 1.11" # for values that are in no state
  required_providers {
    cradle = { source = "cradlestack/cradle" }
  }
}

provider "cradle" {} # Nomad as NOMAD_ADDR and NOMAD_TOKEN say

variable "images" {
  description = "where the example images are: make images has put them there; a registry is as good"
  type        = string
  default     = "oci:/root/.cache/cradlestack/images"
}

variable "database_image" {
  description = "of the database, where it is not that of images: another one takes its place and has its data"
  type        = string
  default     = null
}

variable "greeting" {
  description = "what the page says"
  type        = string
  default     = "hello from a microVM"
}

variable "password" {
  description = "of the database; another one has to be set in the database as well"
  type        = string
  default     = "secret"
  sensitive   = true
}

# Files, for as many pods as want them.
resource "cradle_volume" "pages" {
  name = "shop-pages"
  size = "64MiB"
}

# A disk that the database's machine has for itself.
resource "cradle_volume" "data" {
  name      = "shop-data"
  class     = "lv2"
  size      = "1GiB"
  snapshots = "hourly=24,daily=7"
}

resource "cradle_pod" "web" {
  name   = "shop-web"
  memory = "128MiB"

  container {
    name  = "nginx"
    image = "${var.images}/nginx"
    mount {
      path      = "/usr/share/nginx/html"
      volume    = cradle_volume.pages.name
      shared    = true
      read_only = true
    }
  }

  port {
    port = 80
  }

  service {
    name = "shop-web"
    port = 80
    check = {
      type = "http"
      path = "/"
    }
  }
}

# Writes the page, and keeps it as it should be.
resource "cradle_pod" "writer" {
  name   = "shop-writer"
  memory = "64MiB"

  container {
    name       = "writer"
    image      = "${var.images}/busybox"
    entrypoint = ["sh", "-c"]
    command    = ["echo \"$GREETING\" >/pages/index.html; exec sleep 1000000"]
    env        = { GREETING = var.greeting }
    init       = true
    mount {
      path    = "/pages"
      volume  = cradle_volume.pages.name
      shared  = true
      no_copy = true
    }
  }
}

resource "cradle_pod" "database" {
  name    = "shop-database"
  memory  = "512MiB"
  network = "bridge" # its port can be connected to when the database listens, and not before

  container {
    name               = "mariadb"
    image              = coalesce(var.database_image, "${var.images}/mariadb")
    env                = { MARIADB_DATABASE = "shop" }
    secret_env         = { MARIADB_ROOT_PASSWORD = var.password }
    secret_env_version = "1"
    mount {
      path   = "/var/lib/mysql"
      volume = cradle_volume.data.name
    }
  }

  port {
    port = 3306
  }

  service {
    name  = "shop-database"
    port  = 3306
    check = {}
  }

  rollout = {
    deadline = "10m" # a new database is made first
  }
  wait_timeout = "12m"
}

output "page" {
  description = "where the page is"
  value       = "http://${cradle_pod.web.instances[0].ports["80/tcp"]}/"
}

output "database" {
  description = "where the database is"
  value       = cradle_pod.database.instances[0].ports["3306/tcp"]
}
