//go:build vm

package main

import (
	"fmt"
	"regexp"
	"strings"
	"testing"

	"github.com/hashicorp/nomad/api"

	"github.com/cradlestack/cradlestack/internal/nomadtest"
)

// Where Nomad has ACLs, the example's policy lets the plugin's job, and no other, read which volumes were restored elsewhere, or that one was not, and change nothing.
func TestRootPolicy(t *testing.T) {
	s := &stack{t: t, Cluster: nomadtest.Start(t, nomadtest.Options{ACL: true, Drivers: []string{"raw_exec"}})}
	const job, file = "cradle-csi-node1", "cradle-csi.policy.hcl"
	command := regexp.MustCompile("nomad (acl policy apply .*)").FindStringSubmatch(s.example("cradle-csi-host.nomad.hcl"))
	if command == nil {
		t.Fatal("the example does not say how the policy is applied")
	}
	s.CLI(t, strings.Fields(strings.NewReplacer("cradle-csi-NAME", job, file, s.file(s.example(file))).Replace(command[1]))...)
	for _, path := range []string{ownerPath("ledger"), "cradle/other"} {
		if _, _, err := s.API.Variables().Create(&api.Variable{Path: path, Items: api.VariableItems{"generation": "7"}}, nil); err != nil {
			t.Fatal(err)
		}
	}
	for name, wants := range map[string][]string{
		job:     {"ledger: 7", "pages: Variable not found", "other: .*403", "written: .*403"},
		"other": {"ledger: .*403", "pages: .*403", "other: .*403", "written: .*403"},
	} {
		s.Run(t, fmt.Sprintf(`
job %q {
  type = "batch"
  group "g" {
    task "t" {
      driver = "raw_exec"
      identity {
        env = true
      }
      config {
        command = "/bin/sh"
        args = ["-c", <<-EOT
          export NOMAD_ADDR=unix://$NOMAD_SECRETS_DIR/api.sock
          say() { what=$1; shift; echo "$what: $("$@" 2>&1 | tr '\n' ' ')"; }
          say ledger %[2]s var get -item generation %[3]s
          say pages %[2]s var get -item generation %[4]s
          say other %[2]s var get -item generation cradle/other
          say written %[2]s var put -force %[3]s generation=8
          echo all is said
          EOT
        ]
      }
    }
  }
}`, name, s.Nomad(), ownerPath("ledger"), ownerPath("pages")))
		a := s.UntilAlloc(t, name, "its end", func(a *api.AllocationListStub) bool { return a.ClientStatus == api.AllocClientStatusComplete })
		said := s.Logs(t, a.ID, "t", "stdout")
		for _, want := range wants {
			if !regexp.MustCompile("(?m)^" + want).MatchString(said) {
				t.Errorf("job %s is told\n%swhere %q is wanted", name, said, want)
			}
		}
	}
	if v, _, err := s.API.Variables().Read(ownerPath("ledger"), nil); err != nil || v.Items["generation"] != "7" {
		t.Errorf("%+v, %v", v, err)
	}
}
