//go:build vm && soak

package nomad

import (
	"fmt"
	"math"
	"testing"
)

// TestVMSoakLimits measures for 30 seconds in a pod what a volume with a limit does in one.
func TestVMSoakLimits(t *testing.T) {
	s := startStorehouse(t, "")
	for _, l := range []struct {
		parameter, dd string
		value         any
		times         int // that dd goes to the disk
		want          float64
	}{
		{"iops", "if=/dev/wanted of=/dev/null bs=4k iflag=direct", 200, 30 * 200, 200},
		{"iops", "if=/dev/zero of=/dev/wanted bs=4k oflag=direct", 200, 30 * 200, 200},
		{"bandwidth", "if=/dev/wanted of=/dev/null bs=1M iflag=direct", "8MiB", 30 * 8, 8},
		{"bandwidth", "if=/dev/zero of=/dev/wanted bs=1M oflag=direct", "8MiB", 30 * 8, 8},
	} {
		s.volume("disk", `class = "lv2"`, fmt.Sprintf("class = \"lv2\"\n  attach = \"direct\"\n  %s = \"%v\"", l.parameter, l.value), "64MiB", "256MiB")
		out := s.completes("measure", "disk", true, "/dev/wanted", fmt.Sprintf("read from rest </proc/uptime; dd %s count=%d 2>/dev/null && read to rest </proc/uptime && echo $from $to", l.dd, l.times))
		var from, to float64
		if _, err := fmt.Sscan(out, &from, &to); err != nil {
			t.Fatalf("%s: %q: %v", l.dd, out, err)
		}
		got := float64(l.times) / (to - from)
		t.Logf("%s=%v, dd %s: %.1f in a second, for %.1f s", l.parameter, l.value, l.dd, got, to-from)
		if math.Abs(got/l.want-1) > 0.1 {
			t.Errorf("%s=%v, dd %s: %.1f in a second", l.parameter, l.value, l.dd, got)
		}
		s.CLI(t, "job", "stop", "-purge", "measure")
		s.CLI(t, "volume", "delete", "disk")
		delete(s.used, "disk")
	}
}
