# What the states beside this file are of. They were written by the versions of the provider that they are named for, and stay as they are.

terraform {
  required_providers {
    cradle = { source = "cradlestack/cradle" }
  }
}

provider "cradle" {}

resource "cradle_volume" "files" {
  name = "recorded-files"
  size = "16MiB"
}

resource "cradle_volume" "disk" {
  name                      = "recorded-disk"
  class                     = "lv2"
  size                      = "32 MiB"
  snapshots                 = "hourly=2"
  parameters                = { fs = "ext4" }
  prevent_destroy_if_in_use = false
}

resource "cradle_snapshot" "before" {
  volume = cradle_volume.files.name
  name   = "recorded-before"
}

resource "cradle_volume" "copy" {
  name        = "recorded-copy"
  size        = "16MiB"
  snapshot_id = cradle_snapshot.before.id
}

resource "cradle_pod" "least" {
  name     = "recorded-least"
  replicas = 0
  container {
    name  = "main"
    image = "oci:/nowhere"
  }
}

resource "cradle_pod" "most" {
  name         = "recorded-most"
  replicas     = 0
  cpus         = 2
  memory       = "512 MiB"
  disk         = "1GiB"
  hostname     = "most"
  network      = "bridge"
  zone         = "north"
  variant      = "default"
  replace_lost = false
  restart      = { attempts = 3, interval = "20m", delay = "5s", mode = "delay" }
  rollout      = { max_parallel = 2, min_healthy = "2s", deadline = "4m", auto_revert = true }
  wait_for     = "running"
  wait_timeout = "5m"

  container {
    name               = "web"
    image              = "oci:/nowhere"
    entrypoint         = ["sh", "-c"]
    command            = ["exec sleep 1000"]
    env                = { OPEN = "seen" }
    secret_env         = { HIDDEN = "secret" }
    secret_env_version = "1"
    user               = "1000:1000"
    working_dir        = "/srv"
    stop_signal        = "SIGINT"
    stop_timeout       = "20s"
    init               = true
    cap_add            = ["NET_ADMIN"]
    cap_drop           = ["CHOWN"]
    labels             = { tier = "front" }
    healthcheck        = { test = ["CMD", "true"], interval = "5s", timeout = "2s", start_period = "1s", retries = 5 }
    restart            = "on-failure"
    restart_delay      = "2s"
    max_starts         = 5
    mount {
      path    = "/files"
      volume  = cradle_volume.files.name
      shared  = true
      subpath = "below"
    }
    mount {
      path    = "/cache"
      scratch = "cache"
    }
    mount {
      path      = "/etc/node"
      host_path = "/etc"
      read_only = true
    }
  }
  container {
    name     = "beside"
    image    = "oci:/nowhere"
    memory   = "64MiB"
    critical = true
    after    = [{ container = "web", until = "healthy" }]
  }
  port {
    port      = 80
    host_port = 20080
  }
  port {
    port     = 53
    protocol = "udp"
  }
  service {
    name  = "recorded"
    port  = 80
    tags  = ["a", "b"]
    check = { type = "http", path = "/", interval = "5s", timeout = "1s" }
  }
  constraint {
    attribute = "$${attr.cpu.arch}"
    operator  = "!="
    value     = "arm64"
  }
}
