//go:build vm && soak

package main

import (
	"testing"
	"time"
)

// TestRootSoakFailover does to the active one of two filers, again and again, while clients write by each protocol: it is killed, stopped, frozen, cut off; another one
// takes over on purpose; Consul loses its leader. Nothing that was acknowledged is lost or becomes older, never do two of them answer, and no client sees more than a
// pause.
func TestRootSoakFailover(t *testing.T) { failOver(t, 50, 5*time.Second, embedded) }

// TestRootSoakGaneshaFailover does the same to filers with NFS-Ganesha.
func TestRootSoakGaneshaFailover(t *testing.T) { failOver(t, 50, 5*time.Second, byGanesha) }
