# A directory of whichever node has room, made by Nomad itself.
name      = "mariadb"
type      = "host"
plugin_id = "mkdir"

capability {
  access_mode     = "single-node-writer"
  attachment_mode = "file-system"
}
