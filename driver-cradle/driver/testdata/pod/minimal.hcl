# The least there is: everything else is the image's and docker's.
job "hello" {
  group "g" {
    task "hello" {
      driver = "cradle"
      config {
        image = "debian:12"
      }
    }
  }
}
