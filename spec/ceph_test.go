package spec

import "testing"

func TestCephCoherent(t *testing.T) {
	for release, want := range map[string]bool{
		"6.1.192-cradle": true, "6.1.0-42-cloud-amd64": false, "6.8.12": false, "6.9.0": false, "6.12": false, "6.12.6": false, "6.12.7": true, "6.12.43+deb13-amd64": true,
		"6.13.0-rc4": true, "6.14.0-27-generic": true, "7.0": true, "7.0.1": true, "5.10.0-cradle": true,
		"": false, "cradle": false, "-cradle": false, "6": false,
	} {
		if got := CephCoherent(release); got != want {
			t.Errorf("%q: %t", release, got)
		}
	}
}
