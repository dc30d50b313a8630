server = true

ui_config {
  enabled = true
}
