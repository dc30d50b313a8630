# A computation that ends: Nomad shows its exit code and keeps its output.

variable "images" {
  description = "where the example images are: make images has put them there; a registry is as good"
  default     = "oci:/root/.cache/cradlestack/images"
}

job "batch" {
  type = "batch"

  group "batch" {
    task "primes" {
      driver = "cradle"

      config {
        image   = "${var.images}/busybox"
        command = "sh"
        args = ["-c", <<-END
          for n in $(seq 2 50); do
            prime=yes
            for d in $(seq 2 $((n - 1))); do [ $((n % d)) != 0 ] || prime=; done
            [ -z "$prime" ] || echo $n
          done
        END
        ]
      }
    }
  }
}
