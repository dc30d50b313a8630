//go:build vm && soak

package nomad

import "testing"

func TestVMSoakChaos(t *testing.T) { chaos(t, 20, 200) }

func TestVMSoakKilledInTheMiddle(t *testing.T) { killedInTheMiddle(t, 70) }

func TestVMSoakKeptDiskKilled(t *testing.T) { keptDiskKilled(t, 60) }
