package launch

import (
	"fmt"
	"strings"
	"testing"
)

func TestParseVolume(t *testing.T) {
	for s, want := range map[string]Volume{
		"/a:/b":               {"/a", "/b", false, Shared},
		"/a:/b/../c/":         {"/a", "/c", false, Shared},
		"/a:/b:ro":            {"/a", "/b", true, Shared},
		"/a:/b:rw,rslave":     {"/a", "/b", false, Slave},
		"/a:/b:rprivate,ro":   {"/a", "/b", true, Private},
		"/with space:/b c:ro": {"/with space", "/b c", true, Shared},
	} {
		if got, err := ParseVolume(s); err != nil || got != want {
			t.Errorf("%s: %+v, %v", s, got, err)
		}
	}
	for _, s := range []string{"", "/a", "a:/b", "/a:b", "/a:/b:", "/a:/b:fast", "/a:/b:ro:rw"} {
		if got, err := ParseVolume(s); err == nil {
			t.Errorf("%s: %+v, want an error", s, got)
		}
	}
}

func TestOrder(t *testing.T) {
	for _, c := range []struct{ volumes, want string }{
		{"/x:/a/b/c:rslave /x:/a:rslave /x:/a/b:rslave /x:/z", "/a /z /a/b /a/b/c"},
		{"/x:/a /x:/ab", "/a /ab"}, // a name that begins alike is not inside
		{"/x:/a /x:/a/b", "give the outer one :rslave"},
		{"/x:/a /x:/a", "two volumes at /a"},
		{"/x:/", "would hide the image"},
		{"/x:/../", "would hide the image"},
		{"/x:/proc/1", "the host's own"},
		{"/x:/run/../dev/x", "the host's own"},
		{"/x:/running", "/running"},
		{"/run/x/:/run/x", "/run/x"}, // it is there already
		{"/run/x:/run/x:ro", "the host's own"},
	} {
		var vs []Volume
		for s := range strings.FieldsSeq(c.volumes) {
			v, err := ParseVolume(s)
			if err != nil {
				t.Fatal(err)
			}
			vs = append(vs, v)
		}
		got, err := order(vs)
		var targets []string
		for _, v := range got {
			targets = append(targets, v.Target)
		}
		if s := strings.Join(targets, " ") + fmt.Sprint(err); !strings.Contains(s, c.want) {
			t.Errorf("%s: %s, want %q", c.volumes, s, c.want)
		}
	}
}
