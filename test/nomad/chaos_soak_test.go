//go:build vm && soak

package nomad

import "testing"

func TestVMSoakChaos(t *testing.T) { chaos(t, 20, 200) }
