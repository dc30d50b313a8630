package spec

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
)

// read gives the golden files of one folder.
func read(tb testing.TB, folder string) map[string][]byte {
	tb.Helper()
	names, err := filepath.Glob(filepath.Join("testdata", folder, "*.json"))
	if err != nil || len(names) == 0 {
		tb.Fatalf("testdata/%s: %v, %d files", folder, err, len(names))
	}
	all := map[string][]byte{}
	for _, name := range names {
		data, err := os.ReadFile(name)
		if err != nil {
			tb.Fatal(err)
		}
		all[filepath.Base(name)] = data
	}
	return all
}

func write(tb testing.TB, v any) []byte {
	tb.Helper()
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "  ")
	if err := enc.Encode(v); err != nil {
		tb.Fatal(err)
	}
	return b.Bytes()
}

// The golden files are examples for people; written again they are the same to the byte, so that nothing in them is
// ignored and nothing of the format is lost.
func TestGoldenLaunches(t *testing.T) {
	for name, data := range read(t, "launch") {
		l, err := ParseLaunch(name, data)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if got := write(t, l); !bytes.Equal(got, data) {
			t.Errorf("%s changes when it is written again:\n%s", name, got)
		}
	}
}

func TestGoldenPods(t *testing.T) {
	for name, data := range read(t, "pod") {
		p, err := ParsePod(name, data)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if got := write(t, p); !bytes.Equal(got, data) {
			t.Errorf("%s changes when it is written again:\n%s", name, got)
		}
	}
}

// What only an empty or absent list can say survives: a Pod's empty entrypoint clears the image's, none keeps it.
func TestEmptyIsNotAbsent(t *testing.T) {
	p, err := ParsePod("web.json", read(t, "pod")["web.json"])
	if err != nil {
		t.Fatal(err)
	}
	c := p.Containers[0]
	if c.Entrypoint == nil || len(*c.Entrypoint) != 0 {
		t.Errorf("entrypoint is %v, not an empty list", c.Entrypoint)
	}
	if c.StopTimeout != nil {
		t.Errorf("stopTimeout is %v, not absent", c.StopTimeout)
	}
}

func TestLaunchErrors(t *testing.T) {
	for _, test := range []struct {
		file     string // golden file that is edited
		old, new string
		want     string // the message, or the lines of several
	}{
		// The text.
		{"minimal", `"version": 1,`, `"version": 1`, `launch.json:3:3: no valid JSON: invalid character '"' after object key:value pair`},
		{"minimal", `"oci:/var/lib/images/busybox"`, `oci`, `launch.json:11:22: no valid JSON: invalid character 'o' looking for beginning of value`},
		{"minimal", "\n}\n", "\n", "launch.json:26:1: the document ends too early; is a closing bracket missing?"},
		{"minimal", "\n}\n", "\n}\n{}", "launch.json:27:1: something follows the document; remove it"},
		{"minimal", `"name": "hello",`, `"name": "hello", "name": "hello",`, "launch.json:4:20: name: is there twice; keep one"},
		{"minimal", `"hello"`, "\"\xff\"", "launch.json:4:12: no valid UTF-8; is it the right file?"},
		// Fields and types.
		{"minimal", `"hostname"`, `"hostName"`, "launch.json:5:3: hostName: there is no such field; did you mean hostname?"},
		{"mariadb", `"memory": "512MiB"`, `"ram": "512MiB"`, "launch.json:7:5: resources.ram: there is no such field; known are cpus, memory"},
		{"mariadb", `"user": "mysql"`, `"user": null`, "launch.json:72:15: containers[0].user: null is no value; leave the field out"},
		{"mariadb", `"user": "mysql"`, `"user": 999`, "launch.json:72:15: containers[0].user: is a number; write a string"},
		{"mariadb", `"memory": "512MiB"`, `"memory": "512 potatoes"`, `launch.json:7:15: resources.memory: size "512 potatoes": unit "potatoes" is none of B KB KiB MB MiB GB GiB TB TiB PB PiB`},
		{"mariadb", `"cpus": 2`, `"cpus": 1.5`, "launch.json:8:13: resources.cpus: 1.5 is out of range; write a whole number"},
		{"mariadb", `"hostPort": 3306`, `"hostPort": 70000`, "launch.json:19:21: network.publish[0].hostPort: 70000 is out of range; write a number from 0 to 65535"},
		{"mariadb", `"interval": "10s"`, `"interval": 10`, `launch.json:83:21: containers[0].healthcheck.interval: duration 10 is no string such as "1m30s"`},
		{"minimal", `"hostname"`, `"network": [], "hostname"`, "launch.json:5:14: network: is a list; write an object: {…}"},
		{"minimal", `"version": 1`, `"version": "1"`, "launch.json:2:14: version: is a string; write a whole number"},
		{"sidecars", `"net.core.somaxconn": "1024"`, `"net.core.somaxconn": 1024`, `launch.json:68:31: containers[1].sysctls["net.core.somaxconn"]: is a number; write a string`},
		// Meaning.
		{"minimal", `"version": 1`, `"version": 2`, "launch.json:2:14: version: is 2; this program reads version 1"},
		{"minimal", `"id": "b94d`, `"id": "B94D`, `launch.json:3:9: id: "B94D27b9934d3e08a52e52d7da7dabfac484efe37a5380ee9088f7ace2efcde9" is no id; 64 lower-case hexadecimal digits`},
		{"minimal", `"name": "hello",` + "\n      \"image\"", `"name": "../hello",` + "\n      \"image\"", `launch.json:9:15: containers[0].name: "../hello" is no name; letters, digits, _ . and -, a letter or digit first, at most 128`},
		{"minimal", `"layers/0.ext4"`, `"../0.ext4"`, `launch.json:17:19: containers[0].layers[0].file: "../0.ext4" is no path inside the pod directory; write it relative, without .., //, and a slash at its end`},
		{"minimal", `"id": "sha256:`, `"id": "sha265:`, `launch.json:12:15: containers[0].image.id: "sha265:de7d1b721a1e0632b7cf04edf5032c8ecffa9f9a08492152b926f1a5a7e765d7" is no digest; sha256: and 64 lower-case hexadecimal digits`},
		{"minimal", `"hello"` + "\n      ]", `"a\u0000b"` + "\n      ]", "launch.json:22:9: containers[0].command[1]: holds a NUL byte; remove it"},
		{"minimal", `"hostname"`, `"resources": {"memory": "1MiB"}, "hostname"`, "launch.json:5:27: resources.memory: 1MiB is too small to boot; at least 16MiB"},
		{"mariadb", `"cpus": 2`, `"cpus": 65`, "launch.json:8:13: resources.cpus: 65 is out of range; 1 to 64, or leave it out for 1"},
		{"mariadb", `"template"`, `"warm"`, `launch.json:12:14: boot.start: "warm" is none of auto, template, cold; write one of them, or leave it out for auto`},
		{"mariadb", `"port": 3306`, `"protocol": "sctp"`, "launch.json:17:7: network.publish[0].port: is missing; 1 to 65535\n" +
			`launch.json:20:21: network.publish[0].protocol: "sctp" is none of tcp, udp; write one of them, or leave it out for tcp`},
		{"mariadb", `"192.0.2.53"`, `"dns.example.org"`, `launch.json:24:7: network.dns[0]: "dns.example.org" is no IP address; write 192.0.2.1 or 2001:db8::1`},
		{"mariadb", `"MARIADB_DATABASE=shop"`, `"=shop"`, `launch.json:70:9: containers[0].env[1]: "=shop" is no assignment; write NAME=value`},
		{"mariadb", `"SIGTERM"`, `"SIGNAL"`, `launch.json:73:21: containers[0].stopSignal: "SIGNAL" is no signal; write a name such as SIGTERM, or a number from 1 to 64`},
		{"mariadb", `"CMD",`, `"RUN",`, `launch.json:78:17: containers[0].healthcheck.test: ["RUN" "healthcheck.sh" "--connect"] is no test; write ["CMD", program, argument…], ["CMD-SHELL", line] or ["NONE"]`},
		{"mariadb", `"soft": 65536`, `"soft": -1`, "launch.json:92:19: containers[0].ulimits[0].soft: -1 is above the hard limit 65536; lower it"},
		{"mariadb", `"/run/mysqld"`, `"/run/../etc"`, `launch.json:97:9: containers[0].tmpfs["/run/../etc"]: "/run/../etc" is no clean absolute path; write it from /, without .., //, and a slash at its end`},
		{"mariadb", `"/run/mysqld"`, `"/var/lib/mysql"`, "launch.json:97:9: containers[0].tmpfs[\"/var/lib/mysql\"]: /var/lib/mysql is the place of containers[0].mounts[0].path as well; choose another"},
		{"mariadb", `"volume": "data"`, `"volume": "date"`, `launch.json:102:21: containers[0].mounts[0].volume: the pod has no volume "date"; declare it under volumes`},
		{"mariadb", `"class": "lv2",`, `"scratch": {},`, "launch.json:115:5: volumes[0]: has 2 of block, directory, nfs, ceph, tmpfs and scratch; write exactly one"},
		{"sidecars", `"NET_BIND_SERVICE"`, `"NET_BIND"`, `launch.json:61:9: containers[1].capAdd[0]: "NET_BIND" is no capability; write one such as NET_ADMIN, or ALL`},
		{"sidecars", `"net.core.somaxconn"`, `"vm.swappiness"`, `launch.json:68:9: containers[1].sysctls["vm.swappiness"]: is no parameter that a container has for itself; net.*, fs.mqueue.*, kernel.sem, kernel.msg* and kernel.shm* are`},
		{"sidecars", `"cpus": 0.5`, `"cpus": -0.5`, "launch.json:72:17: containers[1].resources.cpus: -0.5 is no number of processors; 0 (no limit) to 64"},
		{"sidecars", `"/run/netns/web"`, `"web"`, `launch.json:12:14: network.netns: "web" is no clean absolute path; write it from /, without .., //, and a slash at its end`},
		{"sidecars", `"/run/netns/web"`, `"/run/netns/web", "upstreams": [9191, 0, 9191]`, "launch.json:12:52: network.upstreams[1]: 0 is no port; 1 to 65535\n" +
			"launch.json:12:55: network.upstreams[2]: 9191 is upstreams[0] as well; leave one out"},
		{"sidecars", `"/run/netns/web"`, `"/run/netns/web", "onLink": [80, 0]`, "launch.json:12:47: network.onLink[1]: 0 is no port; 1 to 65535"},
		{"mariadb", `"mode": "user"`, `"mode": "user", "onLink": [1]`, `launch.json:15:31: network.onLink: are ports in a network namespace, in mode "netns" alone; leave them out`},
		{"mariadb", `"mode": "user"`, `"mode": "user", "upstreams": [1]`, `launch.json:15:34: network.upstreams: are services of a network namespace, in mode "netns" alone; leave them out`},
		{"sidecars", `"mode": "netns"`, `"mode": "user"`, `launch.json:12:14: network.netns: means nothing in mode "user"; set mode to "netns", or leave it out`},
		{"sidecars", `"container": "fetch"`, `"container": "nginx"`, "launch.json:97:18: containers[1].lifecycle.after: nginx waits for itself in the end; break the circle"},
		{"sidecars", `"container": "fetch"`, `"container": "fetsch"`, `launch.json:99:26: containers[1].lifecycle.after[0].container: the pod has no container "fetsch"; name one of fetch, nginx`},
		{"sidecars", `"until": "exited"`, `"until": "healthy"`, "launch.json:98:11: containers[1].lifecycle.after[0]: fetch has no healthcheck and is never healthy; give it one, or wait until started"},
		{"sidecars", `"name": "nginx"`, `"name": "fetch"`, "launch.json:42:15: containers[1].name: fetch is there twice; rename one"},
		{"sidecars", `"subpath": "web"`, `"subpath": "../web"`, `launch.json:84:22: containers[1].mounts[1].subpath: "../web" is no path inside the volume; write it relative, without .., //, and a slash at its end`},
		{"sidecars", `"readOnly": true` + "\n        },", `"raw": true` + "\n        },", `launch.json:78:19: containers[1].mounts[0].path: a raw device appears below /dev; leave path empty for /dev/volumes/page` + "\n" +
			`launch.json:79:18: containers[1].mounts[0].raw: volume "page" is no block volume; leave raw out`},
		{"sidecars", `"filer.example.org:2049"`, `"filer.example.org:nfs"`, `launch.json:127:20: volumes[2].nfs.address: "filer.example.org:nfs" has no valid port; write host or host:port`},
		{"sidecars", `"vers=4.1,hard"`, `"vers=4.1, hard"`, `launch.json:129:20: volumes[2].nfs.options: "vers=4.1, hard" are no mount options; separate them by commas, without spaces`},
		{"sidecars", `"journal.img"`, `"a/../../b"`, `launch.json:135:17: volumes[3].block.path: "a/../../b" is no path inside the pod directory; write it relative, without .., //, and a slash at its end`},
	} {
		t.Run(test.file+"/"+test.new, func(t *testing.T) {
			data := string(read(t, "launch")[test.file+".json"])
			if !strings.Contains(data, test.old) {
				t.Fatalf("%s.json does not contain %s", test.file, test.old)
			}
			l, err := ParseLaunch("launch.json", []byte(strings.Replace(data, test.old, test.new, 1)))
			if err == nil || l != nil {
				t.Fatalf("accepted; want %s", test.want)
			}
			if got := err.Error(); got != test.want {
				t.Errorf("\n got %s\nwant %s", got, test.want)
			}
		})
	}
}

func TestPodErrors(t *testing.T) {
	for _, test := range []struct{ old, new, want string }{
		{`"image": "registry.example.org/nginx:1.22",`, ``, "pod.json:19:5: containers[0].image: is missing; name one: debian:12, docker-archive:FILE, oci:DIR"},
		{`"NGINX_VERSION"`, `""`, `pod.json:30:9: containers[0].env[1]: "" has no name; write NAME=value, or NAME to remove one`},
		{`"port": 53`, `"port": 53, "hostPort": 8080, "hostIp": "::1"`, ""},
		{`"port": 53`, `"port": 53, "hostPort": 8080, "hostIp": "::"`, ""},
		{`"protocol": "udp"`, `"protocol": "tcp"`, ""},
		{`"path": "/srv/page"`, `"path": "srv/page"`, `pod.json:51:17: volumes[0].directory.path: "srv/page" is no clean absolute path; write it from /, without .., //, and a slash at its end`},
	} {
		data := string(read(t, "pod")["web.json"])
		if !strings.Contains(data, test.old) {
			t.Fatalf("web.json does not contain %s", test.old)
		}
		_, err := ParsePod("pod.json", []byte(strings.Replace(data, test.old, test.new, 1)))
		got := ""
		if err != nil {
			got = err.Error()
		}
		if got != test.want {
			t.Errorf("\n got %s\nwant %s", got, test.want)
		}
	}
}

func TestErrorsAreErrors(t *testing.T) {
	_, err := ParseLaunch("l", []byte("{}"))
	var e *Error
	if !errors.As(err, &e) || e.Line != 1 || e.Column != 1 {
		t.Errorf("%#v has no *Error with a place", err)
	}
	if got := (&Launch{}).Validate(); !errors.As(got, &e) || e.Line != 0 || strings.Contains(got.Error(), ":0:") {
		t.Errorf("Validate without a document: %v", got)
	}
}

func TestHugeDocuments(t *testing.T) {
	if _, err := ParseLaunch("l", bytes.Repeat([]byte(" "), MaxDocument+1)); err == nil || !strings.Contains(err.Error(), "more than 4MiB") {
		t.Errorf("too large: %v", err)
	}
	if _, err := ParseLaunch("l", bytes.Repeat([]byte("["), MaxDocument)); err == nil || !strings.Contains(err.Error(), "nested deeper") {
		t.Errorf("too deep: %v", err)
	}
}

// Whatever is accepted means the same after it was written and read again.
func FuzzParseLaunch(f *testing.F) {
	for _, data := range read(f, "launch") {
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		l, err := ParseLaunch("launch.json", data)
		if err != nil {
			var e *Error
			if !errors.As(err, &e) || e.Line < 1 || e.Column < 1 {
				t.Fatalf("an error without a place: %v", err)
			}
			return
		}
		text := write(t, l)
		again, err := ParseLaunch("launch.json", text)
		if err != nil {
			t.Fatalf("written, it is refused: %v\n%s", err, text)
		}
		if got := write(t, again); !bytes.Equal(got, text) {
			t.Fatalf("written twice, it differs:\n%s\n%s", text, got)
		}
	})
}

func FuzzParsePod(f *testing.F) {
	for _, data := range read(f, "pod") {
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		p, err := ParsePod("pod.json", data)
		if err != nil {
			return
		}
		again, err := ParsePod("pod.json", write(t, p))
		if err != nil || !reflect.DeepEqual(p.Containers[0].Entrypoint, again.Containers[0].Entrypoint) {
			t.Fatalf("written and read, it differs: %v", err)
		}
	})
}

func FuzzParseJoin(f *testing.F) {
	id := strings.Repeat("ab", 32)
	f.Add([]byte(`{"id": "` + id + `", "container": {"name": "a", "image": "busybox", "mounts": [{"volume": "v", "path": "/v"}]}, "volumes": [{"name": "v", "scratch": {}}], "run": 1, "auth": {"username": "a", "password": "b"}}`))
	f.Add([]byte(`{"id": "` + id + `", "container": {"name": "a", "image": "busybox", "mounts": [{"volume": "v", "path": "/v"}]}, "shared": {"v": "/data"}}`))
	f.Add([]byte(`{"id": "` + id + `", "container": {"name": "a", "image": "busybox"}, "volumes": [{"name": "v", "block": {"path": "/dev/sda"}}]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		j, err := ParseJoin(data)
		if err != nil {
			return
		}
		for _, v := range j.Volumes {
			if v.Scratch == nil {
				t.Fatalf("it joins with volume %+v", v)
			}
		}
		if _, err := ParseJoin(write(t, j)); err != nil {
			t.Fatalf("written and read, it differs: %v", err)
		}
	})
}

// A container joins with what is its own alone.
func TestParseJoin(t *testing.T) {
	id := strings.Repeat("ab", 32)
	for text, want := range map[string]string{
		`{"id": "` + id + `", "container": {"name": "a", "image": "busybox"}, "run": 1}`:                                                                                "",
		`{"id": "../x", "container": {"name": "a", "image": "busybox"}, "run": 1}`:                                                                                      "id",
		`{"id": "` + id + `", "container": {"name": "a", "image": "busybox"}, "volumes": [{"name": "v", "directory": {"path": "/etc"}}], "run": 1}`:                     "no volume of the pod's own disk",
		`{"id": "` + id + `", "container": {"name": "a", "image": "busybox", "mounts": [{"volume": "other", "path": "/v"}]}, "run": 1}`:                                 "other",
		`{"id": "` + id + `", "container": {"name": "a", "image": "busybox", "mounts": [{"volume": "theirs", "path": "/v"}]}, "shared": {"theirs": "/data"}, "run": 1}`: "",
		`{"id": "` + id + `", "container": {"name": "a", "image": "busybox"}, "volumes": [{"name": "v", "scratch": {}}], "shared": {"v": "/data"}, "run": 1}`:           "a volume of the container's own",
		`{"id": "` + id + `", "container": {"name": "a", "image": "busybox"}, "pid": "` + strings.Repeat("cd", 32) + `", "ipc": "x", "run": 1}`:                         "ipc",
		`{"id": "` + id + `", "container": {"name": "a", "image": "busybox"}, "pid": "` + id + `", "run": 1}`:                                                           "is the container itself",
		`{"id": "` + id + `", "container": {"name": "a", "image": "busybox"}, "shared": {"v": "/data/.."}, "run": 1}`:                                                   "clean absolute path",
		`{"id": "` + id + `", "container": {"name": "a", "image": "busybox", "lifecycle": {"after": [{"container": "b"}]}}, "run": 1}`:                                  "waits for none",
		`{"id": "` + id + `", "container": {"name": "a", "image": "busybox"}, "disks": [], "run": 1}`:                                                                   "disks",
		`{"id": "` + id + `", "container": {"name": "a/b", "image": "busybox"}, "run": 1}`:                                                                              "is no name",
	} {
		_, err := ParseJoin([]byte(text))
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%s: %v, want %q", text, err, want)
		}
	}
}

func FuzzParseBytes(f *testing.F) {
	for _, s := range []string{"0", "512MiB", "10 GB", "1.5g", "8EiB", "9223372036854775807", "-1", "1e3", "0x10"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		b, err := ParseBytes(s)
		if err != nil {
			return
		}
		if b < 0 {
			t.Fatalf("ParseBytes(%q) = %d", s, b)
		}
		if again, err := ParseBytes(b.String()); err != nil || again != b {
			t.Fatalf("ParseBytes(%q) = %d, written %s, read %d, %v", s, b, b, again, err)
		}
	})
}

func TestParseBytes(t *testing.T) {
	for s, want := range map[string]Bytes{
		"0": 0, "1000": 1000, "1k": 1024, "1KB": 1000, "1KiB": 1024, "10 GB": 10e9, "1.5GiB": 3 << 29, "512m": 512 << 20, "7EiB": 7 << 60, "9223372036854775807": 1<<63 - 1,
	} {
		if got, err := ParseBytes(s); err != nil || got != want {
			t.Errorf("ParseBytes(%q) = %d, %v; want %d", s, got, err, want)
		}
	}
	for _, s := range []string{"", "MiB", "-1", "1 XB", "8EiB", "1e400", "1.2.3", "9223372036854775808"} {
		if got, err := ParseBytes(s); err == nil {
			t.Errorf("ParseBytes(%q) = %d, want an error", s, got)
		}
	}
}
