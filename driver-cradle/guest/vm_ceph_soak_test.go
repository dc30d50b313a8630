//go:build vm && soak

package guest_test

import "testing"

// TestVMSoakCephTruncated: a machine reads a file of CephFS that another one cuts and writes anew all the while, 300 times; its kernel goes on, and gives it no byte
// that nobody has written. Linux 6.9 to 6.12.6 runs over its memory there (docs/decisions/0028).
func TestVMSoakCephTruncated(t *testing.T) {
	volume := cephVolume(t)
	writer := boots(t, cephPod("writer", `until [ -e /v/ready ]; do sleep 0.1; done
yes 0123456789abcde | head -n 8192 >/tmp/lines
n=0; while [ $n -lt 300 ]; do n=$((n+1)); : >/v/f; cat /tmp/lines >>/v/f; done; touch /v/end; echo written`, volume))
	reader := boots(t, cephPod("reader", `: >/v/f; touch /v/ready; rounds=0
until [ -e /v/end ]; do
	tr -d '\000\n0-9a-e' </v/f
	dd if=/v/f of=/dev/null bs=4k 2>/dev/null
	rounds=$((rounds+1))
done
wc -c </v/f; echo "$rounds rounds" >&2`, volume))
	writer.ends()
	writer.printed("writer", "written\n")
	reader.ends()
	stdout, stderr := reader.logs("reader")
	if stdout != "131072\n" {
		t.Errorf("it says\n%.1000s", stdout)
	}
	t.Log(stderr)
}
