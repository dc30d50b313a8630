//go:build vm

package main

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/hashicorp/nomad/api"

	"github.com/cradlestack/cradlestack/internal/nomadtest"
)

// toldHCL are pods of which none runs, and what tells of them.
const toldHCL = `
provider "cradle" {}
resource "cradle_volume" "pages" {
  name = "pages"
  size = "16MiB"
}
resource "cradle_pod" "told" {
  name     = "told"
  replicas = 0
  memory   = "100 MB"
  container {
    name               = "main"
    image              = "oci:/nowhere"
    labels             = { tier = "front" }
    env                = { OPEN = "seen" }
    secret_env         = { PASSWORD = "concealed-one", KEY = "concealed-two" }
    secret_env_version = "1"
  }
}
resource "cradle_pod" "beside" {
  name     = "told-beside"
  replicas = 0
  container {
    name  = "main"
    image = "oci:/nowhere"
  }
}
data "cradle_pod" "told" {
  name       = cradle_pod.told.name
  depends_on = [cradle_pod.told]
}
data "cradle_pods" "all" {
  prefix     = "told"
  depends_on = [cradle_pod.told, cradle_pod.beside]
}
output "seen" {
  value = join(" ", concat([data.cradle_pod.told.id, data.cradle_pod.told.containers[0].image, data.cradle_pod.told.containers[0].labels.tier, data.cradle_pod.told.status], data.cradle_pods.all.pods[*].name))
}
output "secrets" {
  value = join(" ", cradle_pod.told.container[0].secret_env_names)
}
`

// orderedHCL is a pod with several of all that has no order, in this one or in the other.
func orderedHCL(other bool) string {
	in := func(all ...string) string {
		if other {
			slices.Reverse(all)
		}
		return strings.Join(all, "\n")
	}
	return `
resource "cradle_pod" "ordered" {
  name     = "ordered"
  replicas = 0
  network  = "bridge"
  container {
    name    = "main"
    image   = "oci:/nowhere"
    cap_add = [` + strings.ReplaceAll(in(`"NET_ADMIN",`, `"SYS_TIME",`), "\n", " ") + `]
    labels  = {
      ` + in(`a = "1"`, `b = "2"`) + `
    }
    ` + in("mount {\npath = \"/a\"\nscratch = \"a\"\n}", "mount {\npath = \"/b\"\nscratch = \"b\"\n}") + `
  }
  ` + in("port {\nport = 80\n}", "port {\nport = 443\n}", "port {\nport = 53\nprotocol = \"udp\"\n}") + `
  ` + in("service {\nname = \"one\"\nport = 80\n}", "service {\nname = \"two\"\nport = 443\n}") + `
  ` + in("constraint {\nattribute = \"$${attr.cpu.arch}\"\nvalue = \"amd64\"\n}", "constraint {\nattribute = \"$${attr.kernel.name}\"\nvalue = \"linux\"\n}") + `
}
`
}

// Pods are told of by data sources; what a plan can't know is looked at by the apply, before anything is made; a secret that no configuration has does not go
// unseen.
func TestTerraformPods(t *testing.T) {
	c := openNomad(t)
	w := openWorkspace(t, c)
	w.apply(toldHCL)
	w.unchanged()
	if got, want := w.output("seen"), "default/told oci:/nowhere front running told told-beside"; got != want {
		t.Errorf("the data sources have %q, want %q", got, want)
	}
	if got := w.output("secrets"); got != "KEY PASSWORD" {
		t.Errorf("the secrets are %q", got)
	}

	// Another order of what has none is no change.
	w.apply(toldHCL + orderedHCL(false))
	w.unchanged()
	w.write(toldHCL + orderedHCL(true))
	w.unchanged()
	w.apply(toldHCL)

	// A tainted resource is made anew.
	made := jobIndexes(t, c)
	w.run("taint", "cradle_pod.told")
	w.run("taint", "cradle_volume.pages")
	all, said := w.plan()
	if len(all) != 2 || all["cradle_pod.told"].actions() != string(replaced) || all["cradle_volume.pages"].actions() != string(replaced) {
		t.Errorf("what is tainted is %v:\n%s", all, said)
	}
	w.run("apply", "-auto-approve", "-no-color")
	w.unchanged()
	if now := jobIndexes(t, c); now["told"] == made["told"] || now["told-beside"] != made["told-beside"] {
		t.Errorf("jobs made at %v are those of %v", made, now)
	}

	// Imported without one of its secrets and without another's name, the plan tells what goes.
	less := strings.Replace(toldHCL, `PASSWORD = "concealed-one", KEY`, `OTHER = "concealed-three", KEY`, 1)
	w.run("state", "rm", "cradle_pod.told")
	w.write(less)
	w.run("import", "-no-color", "cradle_pod.told", "told")
	all, said = w.plan()
	if a := all["cradle_pod.told"]; len(all) != 1 || a.actions() != string(inPlace) || a.onlyIn("container") != nil || !strings.Contains(said, `~ "PASSWORD" -> "OTHER",`) || strings.Contains(said, "concealed") {
		t.Errorf("a secret that the configuration has not: %v\n%s", all, said)
	}
	w.run("apply", "-auto-approve", "-no-color")
	w.unchanged()
	v, _, err := c.API.Variables().Read("nomad/jobs/told", nil)
	if err != nil {
		t.Fatal(err)
	}
	if env := v.Items["env"]; env != `["KEY=concealed-two","OPEN=seen","OTHER=concealed-three"]` {
		t.Errorf("the pod's environment is %s", env)
	}

	testLater(w, c)
	w.write("provider \"cradle\" {}\n")
	w.run("apply", "-auto-approve", "-no-color")
}

// testLater has values that are known only when something else was made or changed, and then can't be.
func testLater(w *workspace, c *nomadtest.Cluster) {
	w.t.Helper()
	for _, m := range []struct{ value, line, in, want string }{
		{"rel", `working_dir = terraform_data.later.output`, "container", `"rel" is not absolute`},
		{"Web", `name = terraform_data.later.output`, "pod", `"Web" is no name`},
		{"lots", `memory = terraform_data.later.output`, "pod", `unit "lots" is none of`},
		{"~> a", `value = terraform_data.later.output`, "constraint", "Nomad refuses the job"},
		{"shrunk", `size = terraform_data.later.output == "shrunk" ? "1MiB" : null`, "volume", "A volume never shrinks"},
	} {
		pod := map[string]string{"name": `name = "late"`, m.in: m.line}
		if m.in == "pod" && !strings.HasPrefix(m.line, "name") {
			pod["name"] += "\n" + m.line
		} else if m.in == "pod" {
			pod["name"] = m.line
		}
		hcl := toldHCL
		if m.in == "volume" {
			hcl = strings.Replace(hcl, `size = "16MiB"`, m.line, 1)
		}
		w.write(hcl + `
resource "terraform_data" "later" {
  input = "` + m.value + `"
}
resource "cradle_pod" "late" {
  ` + pod["name"] + `
  replicas = 0
  container {
    name               = "main"
    image              = "oci:/nowhere"
    secret_env         = { PASSWORD = "hidden" }
    secret_env_version = "1"
    ` + pod["container"] + `
  }
  constraint {
    attribute = "$${attr.nomad.version}"
    operator  = "version"
    ` + map[bool]string{true: pod["constraint"], false: `value = ">= 1.0"`}[m.in == "constraint"] + `
  }
  depends_on = [cradle_volume.pages]
}
`)
		w.run("plan", "-no-color")
		want := []string{m.want}
		if m.in != "constraint" {
			want = append(want, m.line)
		}
		w.fails(want, "apply", "-auto-approve", "-no-color")
		jobs, _, err := c.API.Jobs().List(nil)
		if err != nil || slices.ContainsFunc(jobs, func(j *api.JobListStub) bool { return !strings.HasPrefix(j.ID, "told") && j.ID != "cradle-csi" }) {
			w.t.Errorf("%s: a job was made: %v, %v", m.line, jobs, err)
		}
		if _, _, err := c.API.Variables().Read("nomad/jobs/late", nil); !errors.Is(err, api.ErrVariablePathNotFound) {
			w.t.Errorf("%s: its variable was made: %v", m.line, err)
		}
	}
}
