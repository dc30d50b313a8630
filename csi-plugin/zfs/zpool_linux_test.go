package zfs

import (
	"errors"
	"slices"
	"testing"

	"github.com/cradlestack/cradlestack/csi-plugin/volume"
)

// What is given to zpool as a name is one, and no option.
func TestZpools(t *testing.T) {
	names, err := Zpools([]Pool{{"default", "tank/cradle"}, {"more", "tank/more"}, {"other", "other.pool-2"}})
	if want := []string{"tank", "other.pool-2"}; err != nil || !slices.Equal(names, want) {
		t.Errorf("the zpools are %q, %v; want %q", names, err, want)
	}
	for _, dataset := range []string{"", "/tank", "-f", "-f/x", "2tank", "tank x", "../tank", "tank\n", "tank@s"} {
		if names, err := Zpools([]Pool{{"default", dataset}}); !errors.Is(err, volume.ErrInvalid) {
			t.Errorf("of %q the zpools are %q, %v", dataset, names, err)
		}
	}
}
