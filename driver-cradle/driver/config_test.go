package driver

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/nomad/plugins/drivers"
)

// An agent's configuration as people write it, with a mistake in each value.
const mistakes = `# the client
client {
  enabled = true
}
plugin "raw_exec" {
  config {
    accelerator = "not ours"
  }
}
plugin "nomad-driver-cradle" {
  config {
    state_dir    = "relative"
    accelerator  = "magic"
    default_disk = "1KiB"

    registry "docker.io" {
      mirrors = ["a mirror"]
    }
    registry "not/one" {
      mirrors = []
    }
    volumes {
      paths = ["/srv", "../etc"]
    }
    gc {
      image_delay  = "soon"
      orphan_delay = "-5s"
      image_size   = "huge"
    }
    auth {
      config = "/nowhere/docker.json"
      helper = "/bin/helper"
    }
    insecure_registries = ["http://x/"]
    image_pull_timeout  = "1"
    qemu_uid            = 0
  }
}
`

func TestPluginMistakes(t *testing.T) {
	_, config, _ := strings.Cut(mistakes, `plugin "nomad-driver-cradle" {`+"\n  config {\n")
	body := config[:strings.LastIndex(config, "  }\n}")]
	c := decodeConfig(t, body)
	err := c.complete()
	if err == nil {
		t.Fatal("it is taken")
	}
	dir := t.TempDir()
	file := filepath.Join(dir, "agent.hcl")
	if err := os.WriteFile(file, []byte(mistakes), 0o600); err != nil {
		t.Fatal(err)
	}
	other := filepath.Join(dir, "other.hcl")
	if err := os.WriteFile(other, []byte("} no configuration"), 0o600); err != nil {
		t.Fatal(err)
	}
	text := withPlaces(err, []string{filepath.Join(dir, "missing.hcl"), other, file}, "nomad-driver-cradle").Error()
	for _, want := range []string{
		`:12: state_dir: "relative" is no absolute path`,
		`:13: accelerator: "magic" is none of auto, kvm, tcg`,
		`:14: default_disk: 1KiB is out of range`,
		`:17: registry.docker.io.mirrors: "a mirror" is no address`,
		`:19: registry.not/one: no registry has that name`,
		`:23: volumes.paths: "../etc" is no absolute path`,
		`:23: volumes.paths: means nothing without enabled = true`,
		`:26: gc.image_delay: "soon" is no duration`,
		`:27: gc.orphan_delay: "-5s" is no duration`,
		`:28: gc.image_size: `,
		`:31: auth.config: `,
		`:32: auth.helper: "/bin/helper" is no helper's name`,
		`:34: insecure_registries: "http://x/" is no registry`,
		`:35: image_pull_timeout: "1" is no duration`,
		`:36: qemu_uid: "0" is no first id: 1 to 4294901759`,
	} {
		if !strings.Contains(text, file+want) {
			t.Errorf("it does not say %s%s:\n%s", file, want, text)
		}
	}
	if n := strings.Count(text, "\n") + 1; n != 15 {
		t.Errorf("it says %d things:\n%s", n, text)
	}
	// Where the line can't be found, the key is still told; what is no key's is left as it is.
	if got := withPlaces(err, nil, "x").Error(); got != err.Error() {
		t.Errorf("without files: %s", got)
	}
	plain := errors.New("something else")
	if got := withPlaces(plain, []string{file}, "nomad-driver-cradle"); got != plain {
		t.Errorf("something else becomes %v", got)
	}
}

// decodeConfig reads a configuration as Nomad's client does.
func decodeConfig(t *testing.T, body string) *config {
	t.Helper()
	job := "job \"j\" {\n group \"g\" {\n task \"t\" {\n driver = \"cradle\"\n config {\n" + body + "\n}\n}\n}\n}"
	var encoded drivers.TaskConfig
	if err := decode(t, configSchema(), parseJob(t, job).Config, &encoded); err != nil {
		t.Fatal(err)
	}
	var c config
	if err := encoded.DecodeDriverConfig(&c); err != nil {
		t.Fatal(err)
	}
	return &c
}

func TestPluginDefaults(t *testing.T) {
	c := decodeConfig(t, "")
	if err := c.complete(); err != nil {
		t.Fatal(err)
	}
	if c.StateDir != defaultStateDir || c.CacheDir != defaultCacheDir || c.Accelerator != "auto" || c.pullTimeout != 5*time.Minute || c.imageDelay != 24*time.Hour ||
		c.orphanDelay != 5*time.Minute || c.imageSize != 0 || !enabled(c.GC.Image, true) || !enabled(c.GC.Container, true) {
		t.Errorf("%+v", c)
	}
	if err := c.allowed("/srv"); err == nil || !strings.Contains(err.Error(), "volumes { enabled = true }") {
		t.Errorf("a directory of the host: %v", err)
	}
}

// Where tasks write, symbolic links and dots lead nowhere.
func TestAllowed(t *testing.T) {
	dir := t.TempDir()
	for _, d := range []string{"allowed/below", "secret"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink(filepath.Join(dir, "secret"), filepath.Join(dir, "allowed/link")); err != nil {
		t.Fatal(err)
	}
	c := &config{Volumes: &volumesConfig{Enabled: true, Paths: []string{filepath.Join(dir, "allowed"), filepath.Join(dir, "missing")}}}
	for path, want := range map[string]string{
		"allowed": "", "allowed/below": "", "allowed/../allowed": "",
		"secret": "is not below", "allowed/link": "is not below", "allowed/../secret": "is not below", "allowed/none": "does not exist", "allowedbutnot": "does not exist",
	} {
		if err := c.allowed(dir + "/" + path); (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v; want %q", path, err, want)
		}
	}
	for path, want := range map[string]string{"allowed/below": "", "secret": "", "nothing": "does not exist", "../../../../../../etc": "does not exist", "allowed/link": "does not exist"} {
		got, err := within(filepath.Join(dir), path)
		if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) || err == nil && !strings.HasPrefix(got, dir+"/") {
			t.Errorf("within %s: %s, %v; want %q", path, got, err, want)
		}
	}
	if got, err := within(filepath.Join(dir, "allowed"), "link"); err == nil {
		t.Errorf("a link leads out to %s", got)
	}
}
