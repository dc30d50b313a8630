# Every key that a container has.
job "full" {
  group "g" {
    task "web" {
      driver = "cradle"
      user   = "www-data"
      env {
        GREETING = "hello"
      }
      config {
        image             = "registry.example.org/team/web@sha256:4bcff63911fcb4448bd4fdacec207030997caf25e9bea4045fa6c8c44de311d1"
        entrypoint        = ["/usr/bin/env"]
        command           = "nginx"
        args              = ["-g", "daemon off;"]
        group_add         = ["audio", "1000"]
        work_dir          = "/srv"
        tty               = true
        interactive       = true
        init              = true
        privileged        = true
        cap_add           = ["net_admin", "CAP_SYS_TIME"]
        cap_drop          = ["all"]
        no_new_privileges = true
        readonly_rootfs   = true
        tmpfs             = ["/run", "/cache:size=64m,mode=1777"]
        shm_size          = "128MiB"
        devices           = ["/dev/fuse"]
        pids_limit        = 100
        cpu_shares        = 512
        cpus              = 0.5
        hostname          = "web"
        domainname        = "example.org"
        extra_hosts       = ["db:192.0.2.7", "v6:2001:db8::7"]
        dns_servers       = ["192.0.2.53"]
        dns_search_domains = ["example.org"]
        dns_options       = ["ndots:2"]
        disk              = "20GiB"
        image_pull_timeout = "10m"
        force_pull        = true
        labels {
          team = "shop"
        }
        ulimit {
          nofile = "1024:2048"
          core   = "0"
        }
        sysctl = {
          "net.core.somaxconn" = "1024"
        }
        healthcheck {
          test           = ["CMD", "curl", "-f", "http://localhost/"]
          interval       = "10s"
          timeout        = "3s"
          start_period   = "1m"
          start_interval = "1s"
          retries        = 5
        }
        auth {
          username = "robot"
          password = "secret"
        }
        volumes = ["cache:/var/cache", "local/page:/usr/share/page:ro", "/srv/files:/files:ro,nocopy"]
        mount {
          type    = "tmpfs"
          target  = "/scratch"
          options = "size=1m"
        }
        mount {
          type      = "bind"
          source    = "/srv/many"
          target    = "/many"
          transport = "virtiofs"
          subpath   = "small"
        }
        mount {
          source   = "cache"
          target   = "/var/cache2"
          subpath  = "two"
          readonly = true
          no_copy  = true
        }
        lifecycle {
          restart_on_success = true
          restart_on_failure = true
          restart_delay      = "2s"
          max_starts         = 3
          critical           = false
        }
      }
    }
  }
}
