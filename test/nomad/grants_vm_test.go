//go:build vm

package nomad

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hashicorp/nomad/api"

	"github.com/cradlestack/cradlestack/internal/nomadtest"
	"github.com/cradlestack/cradlestack/test/programs"
)

// TestRootGrants: who may change a volume in its namespace gives and takes grants of it, whose secrets are in Variables of that namespace for its jobs to read. Nobody
// else sees, uses, changes or ends them, whatever their names are.
func TestRootGrants(t *testing.T) {
	s := startStorehouse(t, "", func(o *nomadtest.Options) { o.ACL = true })
	filer, err := programs.Path("cradle-filer")
	if err != nil {
		t.Fatal(err)
	}
	const url = "http://127.0.0.1:2050"
	s.Run(t, strings.Replace(s.example("cradle-filer.nomad.hcl"), `"serve",`, `"serve", "--api", "127.0.0.1:2050", "--nomad", "http://127.0.0.1:4646", "--webdav", "127.0.0.1:8443", "--s3", "127.0.0.1:9000",`, 1))
	tokens := map[string]string{}
	token := func(name, namespace, rules string) {
		t.Helper()
		policy := &api.ACLPolicy{Name: name, Rules: fmt.Sprintf("namespace %q {\n%s\n}\nplugin { policy = \"read\" }", namespace, rules)}
		if _, err := s.API.ACLPolicies().Upsert(policy, nil); err != nil {
			t.Fatal(err)
		}
		made, _, err := s.API.ACLTokens().Create(&api.ACLToken{Name: name, Type: "client", Policies: []string{name}}, nil)
		if err != nil {
			t.Fatal(err)
		}
		tokens[name] = made.SecretID
	}
	const writes = `capabilities = ["csi-read-volume", "csi-write-volume"]`
	const variables = "\nvariables {\n  path \"*\" { capabilities = [\"read\", \"write\", \"destroy\"] }\n}"
	for _, namespace := range []string{"red", "blue"} {
		if _, err := s.API.Namespaces().Register(&api.Namespace{Name: namespace}, nil); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if _, err := s.API.Namespaces().Delete(namespace, nil); err != nil {
				t.Error(err)
			}
		})
		token(namespace, namespace, writes+variables)
		path := filepath.Join(t.TempDir(), "volume.hcl")
		if err := os.WriteFile(path, []byte(strings.NewReplacer(`id           = "shared"`, `id = "data"`, `name         = "shared"`, fmt.Sprintf("name = %q", namespace+".data")).Replace(s.example("shared.volume.hcl"))), 0o600); err != nil {
			t.Fatal(err)
		}
		s.CLI(t, "volume", "create", "-namespace", namespace, path)
		t.Cleanup(func() { s.CLI(t, "volume", "delete", "-namespace", namespace, "data") })
	}
	token("reader", "red", `capabilities = ["csi-read-volume"]`+variables)
	token("files", "red", `capabilities = ["csi-read-volume", "csi-write-volume", "read-fs"]`+variables)
	token("without", "red", writes)
	as := func(who, namespace string, args ...string) (string, error) {
		ctx, cancel := context.WithTimeout(t.Context(), nomadtest.Patience)
		defer cancel()
		cmd := s.node.Command(ctx, filer, args...)
		cmd.Env = append(cmd.Env, "CRADLE_FILER_API="+url, "NOMAD_TOKEN="+tokens[who], "NOMAD_NAMESPACE="+namespace)
		var out, errs bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &errs
		err := s.node.Launch(cmd)
		if err == nil {
			err = cmd.Wait()
		}
		if err != nil {
			err = errors.Join(err, errors.New(errs.String()))
		}
		return out.String(), err
	}
	must := func(out string, err error) string {
		t.Helper()
		if err != nil {
			t.Fatal(out, err)
		}
		return out
	}
	curl := func(user, path string, more ...string) (string, error) {
		return s.node.Output(t.Context(), "curl", append([]string{"--silent", "--show-error", "--fail", "--max-time", "60", "--user", user, path}, more...)...)
	}
	s.eventually("an answer of the filer", func() bool {
		out, err := as("red", "red", "grants", "-o", "json")
		return err == nil && strings.TrimSpace(out) == "[]"
	})
	type grant struct {
		ID, Secret, WebDAV, S3, Volume string
		Tenant                         struct{ Namespace, Name, Volume, Variable string }
	}
	give := func(who string, args ...string) (g grant) {
		t.Helper()
		if err := json.Unmarshal([]byte(must(as(who, who, append([]string{"grant", "data", "-o", "json"}, args...)...))), &g); err != nil {
			t.Fatal(err)
		}
		return g
	}
	// One name in both namespaces: each has its own, and again the same.
	red, blue := give("red", "--id", "app", "--user", "1000"), give("blue", "--id", "app")
	if again := give("red", "--id", "app", "--user", "1000"); again != red || red.ID == blue.ID || red.Secret == blue.Secret || red.Tenant.Variable != "cradle-filer/app" {
		t.Errorf("granted %+v, %+v, then %+v", red, blue, again)
	}
	login := func(g grant) string { return g.ID + ":" + g.Secret }
	item := func(namespace, path, name string) string {
		return strings.TrimSpace(s.CLI(t, "var", "get", "-namespace", namespace, "-item", name, path))
	}
	for namespace, g := range map[string]grant{"red": red, "blue": blue} {
		if user := item(namespace, "cradle-filer/app", "user") + ":" + item(namespace, "cradle-filer/app", "secret"); user != login(g) {
			t.Errorf("the Variable of %s has %s, and the grant is %+v", namespace, user, g)
		}
		must(curl(login(g), g.WebDAV+"of", "--request", "PUT", "--data", namespace))
	}
	// What is another's is not used, seen, taken or ended.
	if out, err := curl(login(red), blue.WebDAV+"of"); err == nil {
		t.Errorf("red reads by WebDAV %q", out)
	}
	if out, err := curl(login(red), blue.S3+blue.Volume+"/of", "--aws-sigv4", "aws:amz:us-east-1:s3", "--header", "x-amz-content-sha256: UNSIGNED-PAYLOAD"); err == nil {
		t.Errorf("red reads by S3 %q", out)
	}
	if out := must(curl(login(red), red.S3+red.Volume+"/of", "--aws-sigv4", "aws:amz:us-east-1:s3", "--header", "x-amz-content-sha256: UNSIGNED-PAYLOAD")); out != "red" {
		t.Errorf("red has by S3 %q", out)
	}
	for what, want := range map[[3]string]string{
		{"red", "blue", "grant data --id mine"}:                            "permission denied",
		{"red", "blue", "grant data --id app"}:                             "permission denied",
		{"red", "blue", "revoke app"}:                                      "not found",
		{"red", "blue", "revoke none"}:                                     "not found",
		{"reader", "red", "grant data --id mine"}:                          "permission denied",
		{"reader", "red", "revoke app"}:                                    "not found",
		{"without", "red", "grant data --id mine"}:                         "permission denied",
		{"without", "red", "revoke app"}:                                   "permission denied",
		{"nobody", "red", "grant data --id app"}:                           "permission denied",
		{"nobody", "red", "revoke app"}:                                    "not found",
		{"red", "red", "grant default.data --id mine"}:                     "not found",
		{"red", "red", "grant red.data --id mine"}:                         "not found",
		{"red", "red", "grant ../data --id mine"}:                          "not found",
		{"red", "red", "grant data --id ../mine"}:                          "is no name",
		{"red", "red", "grant data --id mine --variable cradle-filer/app"}: "exists",
		{"red", "red", "grant data --id mine --variable x?namespace=blue"}: "a path has",
		{"red", "red", "grant data --id app --variable elsewhere"}:         "exists",
	} {
		out, err := as(what[0], what[1], strings.Fields(what[2])...)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s, in %s: cradle-filer %s: %s, %v; want %q", what[0], what[1], what[2], out, err, want)
		}
	}
	for who, want := range map[string]int{"red": 1, "reader": 1, "nobody": 0, "blue": 0} {
		out := must(as(who, "red", "grants", "-o", "json"))
		if n := strings.Count(out, `"id"`); n != want || strings.Contains(out, red.Secret) {
			t.Errorf("%s sees of red's grants %s", who, out)
		}
	}
	if out := must(curl(login(red), red.WebDAV+"of")) + must(curl(login(blue), blue.WebDAV+"of")); out != "redblue" {
		t.Errorf("after that there is %q", out)
	}
	// A job reads what is in its own path without a policy.
	job := give("red", "--id", "job", "--variable", "nomad/jobs/uploads", "--read-only")
	s.Run(t, `
job "uploads" {
  namespace = "red"
  type      = "batch"
  group "g" {
    task "main" {
      driver = "raw_exec"
      config {
        command = "cat"
        args    = ["${NOMAD_SECRETS_DIR}/login"]
      }
      template {
        destination = "${NOMAD_ALLOC_DIR}/forged"
        data        = "{\"ID\":\"data\",\"Namespace\":\"red\",\"PluginID\":\"cradle\",\"ExternalID\":\"`+blue.Volume+`\"}"
      }
      template {
        destination = "${NOMAD_SECRETS_DIR}/login"
        data        = "{{ with nomadVar \"nomad/jobs/uploads\" }}{{ .user }}:{{ .secret }} {{ .webdav }} {{ .access }}{{ end }}"
      }
    }
  }
}`)
	in := &api.QueryOptions{Namespace: "red"}
	t.Cleanup(func() {
		if _, _, err := s.API.Jobs().Deregister("uploads", true, &api.WriteOptions{Namespace: "red"}); err != nil {
			t.Error(err)
		}
	})
	var alloc string
	s.eventually("the job's end", func() bool {
		all, _, err := s.API.Jobs().Allocations("uploads", false, in)
		if err != nil || len(all) == 0 {
			return false
		}
		alloc = all[0].ID
		return all[0].ClientStatus == api.AllocClientStatusComplete
	})
	got, err := s.node.Output(t.Context(), "cat", filepath.Join(s.node.Dir, "nomad/alloc", alloc, "alloc/logs/main.stdout.0"))
	if err != nil {
		t.Error(err)
	}
	if want := login(job) + " " + job.WebDAV + " read-only"; got != want {
		t.Errorf("the job has %q, not %q", got, want)
	}
	// What Nomad answers of anything else than a volume says nothing: a job's files are what who runs it wants.
	forged := "../../client/fs/cat/" + alloc + "?path=alloc/forged"
	for _, args := range [][]string{{"snapshots", forged}, {"snapshot", forged, "taken"}, {"grant", forged, "--id", "forged"}, {"diff", forged, "taken"}} {
		if out, err := as("files", "red", args...); err == nil || !strings.Contains(err.Error(), "not found") {
			t.Errorf("cradle-filer %q, of a file that says it is blue's: %s, %v", args, out, err)
		}
	}
	// Its end is that of the Variable, and of nothing else.
	must(as("red", "red", "revoke", "app", "job"))
	if out, err := curl(login(red), red.WebDAV+"of"); err == nil {
		t.Errorf("a grant that was revoked reads %q", out)
	}
	for path, namespace := range map[string]string{"cradle-filer/app": "red", "nomad/jobs/uploads": "red"} {
		if v, _, err := s.API.Variables().Peek(path, &api.QueryOptions{Namespace: namespace}); err != nil || v != nil {
			t.Errorf("Variable %s of %s is %+v, %v", path, namespace, v, err)
		}
	}
	if out := must(curl(login(blue), blue.WebDAV+"of")); out != "blue" {
		t.Errorf("then blue has %q", out)
	}
	must(as("blue", "blue", "revoke", "app"))
	audit, err := os.ReadFile(filepath.Join(s.node.Dir, "filer", "audit.log"))
	if err != nil || !strings.Contains(string(audit), `"what":"grant","who":"red `) || strings.Contains(string(audit), red.Secret) {
		t.Errorf("the audit log has %s, %v", audit, err)
	}
}
