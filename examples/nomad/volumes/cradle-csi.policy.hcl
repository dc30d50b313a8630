# What the plugin may do in Nomad: read which volumes were restored on another host.
namespace "default" {
  variables {
    path "cradle/lv2/*" {
      capabilities = ["read"]
    }
  }
}
