//go:build vm && soak

package main

import (
	"encoding/json"
	"net/http"
	"regexp"
	"testing"

	"github.com/cradlestack/cradlestack/internal/nomadtest"
)

// A server of Nomad's loses its peers: it is there and can't act. Clients are told so, with 503, what runs goes on, and all is as it was, by itself, when one of the peers is
// back: who waited still waits, and what has ended meanwhile is known with its exit code.
func TestVMSoakQuorum(t *testing.T) {
	o := nomadtest.Options{ACL: true, Peers: 2, Keep: []string{"cradle"}, Agent: "autopilot {\n  server_stabilization_time = \"1s\"\n}"}
	if err := o.Cradle(""); err != nil {
		t.Fatal(err)
	}
	h := openHostOn(t, nomadtest.Start(t, o))
	h.run("run", "-d", "--name", "works", "busybox", "sh", "-c", "while ! test -e /end; do sleep 0.2; done; exit 3")
	h.run("run", "-d", "--name", "ends", "busybox", "sh", "-c", "while ! test -e /end; do sleep 0.2; done; sleep 20; exit 4")
	h.run("exec", "ends", "touch", "/end")
	waiting := h.send("POST", "/containers/works/wait", "")
	defer waiting.Body.Close()
	for _, n := range h.c.Peers() {
		if err := n.KillServer(); err != nil {
			t.Fatal(err)
		}
	}
	const lost = "Nomad can't act at the moment .*(No cluster leader|leadership)"
	h.until("the loss to be told", func() bool {
		_, err := h.try("", "ps")
		return err != nil && regexp.MustCompile(lost).MatchString(err.Error())
	})
	for _, args := range [][]string{{"create", "busybox"}, {"logs", "works"}, {"stop", "works"}, {"inspect", "--type", "container", "works"}, {"network", "ls"}, {"volume", "ls"}} {
		h.wantError(1, lost, args...)
	}
	h.wantError(125, lost, "run", "--rm", "busybox", "true")
	for _, path := range []string{"/containers/json", "/containers/works/json", "/networks", "/volumes"} {
		if status := h.ask("GET", path, "", nil); status != http.StatusServiceUnavailable {
			t.Errorf("%s without a quorum: %d", path, status)
		}
	}
	if status := h.ask("GET", "/_ping", "", nil); status != http.StatusOK {
		t.Errorf("ping without a quorum: %d", status)
	}
	if err := h.c.Peers()[0].StartAgents(); err != nil {
		t.Fatal(err)
	}
	h.until("Nomad to be back", func() bool { _, err := h.try("", "ps"); return err == nil })
	h.until("the end of what has ended", func() bool {
		out, err := h.try("", "inspect", "-f", "{{.State.Status}} {{.State.ExitCode}}", "ends")
		return err == nil && out == "exited 4\n"
	})
	h.want("works", "ps", "--format", "{{.Names}}")
	h.until("the pod to be reached", func() bool { _, err := h.try("", "exec", "works", "true"); return err == nil })
	h.try("", "exec", "works", "touch", "/end") // the container may end first
	var end struct{ StatusCode int }
	if err := json.NewDecoder(waiting.Body).Decode(&end); err != nil || end.StatusCode != 3 {
		t.Errorf("wait: %+v, %v", end, err)
	}
	h.want("0", "run", "--rm", "busybox", "sh", "-c", "echo 0")
	h.run("rm", "works", "ends")
	h.want("", "ps", "-aq")
}
