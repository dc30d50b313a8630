client {
  enabled = true
}
