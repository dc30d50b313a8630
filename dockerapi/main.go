// Command cradle-dockerapi is docker's Engine API in front of Nomad: docker and docker compose, unchanged, run their containers as microVM pods.
package main

import "github.com/cradlestack/cradlestack/internal/command"

func main() { command.Main(run) }
