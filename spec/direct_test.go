package spec

import (
	"bytes"
	"path"
	"strings"
	"testing"
)

func TestGoldenDirectAttachments(t *testing.T) {
	for name, data := range read(t, "direct") {
		d, err := ParseDirectAttachment(name, data)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if got := write(t, d); !bytes.Equal(got, data) {
			t.Errorf("%s changes when it is written again:\n%s", name, got)
		}
		if want := path.Join(DirectDir, DirectSocket(d.Target)); d.Control != want {
			t.Errorf("%s: the control socket of that target is %s", name, want)
		}
	}
}

// The plugin and who runs pods find the same file, however the path was written.
func TestDirectFile(t *testing.T) {
	const target = "/alloc/volume/rw"
	for _, same := range []string{target + "/", "/alloc//volume/rw", "/alloc/x/../volume/rw"} {
		if DirectFile(same) != DirectFile(target) {
			t.Errorf("%s has another record than %s", same, target)
		}
	}
	if DirectFile("/alloc/volume/ro") == DirectFile(target) {
		t.Error("two targets share one record")
	}
	if n := len(path.Join(DirectDir, DirectSocket(target))); n > 107 {
		t.Errorf("the control socket's path has %d bytes; a unix socket's has at most 107", n)
	}
}

func TestDirectAttachmentErrors(t *testing.T) {
	golden := string(read(t, "direct")["lv2.json"])
	for _, test := range []struct{ old, new, want string }{
		{`"version": 1`, `"version": 2`, `lv2.json:2:14: version: is 2; this program reads version 1`},
		{`"target": "/`, `"target": "`, `lv2.json:3:13: target: `},
		{`"name": "data"`, `"name": "../data"`, `lv2.json:5:13: volume.name: "../data" is no name`},
		{`"path": "/var`, `"path": "var`, `lv2.json:8:15: volume.block.path: "var/lib/cradle/volumes/data/image" is relative`},
		{`"fsType": "xfs"`, `"fsType": "ntfs"`, `volume.block.fsType: "ntfs" is none of ext4, xfs`},
		{`"iops": 500`, `"iops": -1`, `limits: are below 0`},
		{`"limits"`, `"raw": true, "limit"`, `lv2.json:13:16: limit: there is no such field; did you mean limits?`},
	} {
		data := strings.Replace(golden, test.old, test.new, 1)
		_, err := ParseDirectAttachment("lv2.json", []byte(data))
		if err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s → %s: %v; want %s", test.old, test.new, err, test.want)
		}
	}

	golden = string(read(t, "direct")["nfs.json"])
	for _, test := range []struct{ old, new, want string }{
		{`"control"`, `"raw": true, "control"`, `raw: is for block volumes`},
		{`"control"`, `"limits": {"iops": 5}, "control"`, `limits: are for block volumes`},
	} {
		data := strings.Replace(golden, test.old, test.new, 1)
		_, err := ParseDirectAttachment("nfs.json", []byte(data))
		if err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s → %s: %v; want %s", test.old, test.new, err, test.want)
		}
	}
}

// A record is refused, or written again and read as the same; its paths are absolute.
func FuzzParseDirectAttachment(f *testing.F) {
	for _, data := range read(f, "direct") {
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		d, err := ParseDirectAttachment("x", data)
		if err != nil {
			return
		}
		if !path.IsAbs(d.Target) || !path.IsAbs(d.Control) || d.Volume.Block == nil && d.Volume.NFS == nil {
			t.Errorf("%+v", d)
		}
		text := write(t, d)
		again, err := ParseDirectAttachment("x", text)
		if err != nil || !bytes.Equal(write(t, again), text) {
			t.Errorf("%s is read again as %+v, %v", text, again, err)
		}
	})
}
