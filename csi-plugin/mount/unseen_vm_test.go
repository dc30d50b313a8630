//go:build vm

package mount

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
)

// TestRootUnseen asks from processes in mount namespaces of their own, and from one in that of its parent.
func TestRootUnseen(t *testing.T) {
	const asked = "MOUNT_TEST_UNSEEN"
	if dir := os.Getenv(asked); dir != "" {
		unseen, err := Unseen(dir)
		fmt.Printf("unseen: %v, %v\n", unseen, err)
		return
	}
	self := []string{os.Args[0], "-test.run", "^TestRootUnseen$"}
	for name, c := range map[string]struct {
		args []string
		want string
	}{
		"of its parent": {nil, "false"}, "shared": {[]string{"unshare", "--mount", "--propagation", "shared"}, "false"},
		"private": {[]string{"unshare", "--mount", "--propagation", "private"}, "true"}, "slave": {[]string{"unshare", "--mount", "--propagation", "slave"}, "true"},
		"a container's, shared": {[]string{"unshare", "--pid", "--fork", "--kill-child", "--mount", "--propagation", "shared"}, "false"},
		"a container's":         {[]string{"unshare", "--pid", "--fork", "--kill-child", "--mount", "--propagation", "private"}, "true"},
	} {
		t.Run(name, func(t *testing.T) {
			args := append(c.args, self...)
			cmd := exec.CommandContext(t.Context(), args[0], args[1:]...)
			cmd.Env = append(os.Environ(), asked+"="+t.TempDir())
			out, err := cmd.CombinedOutput()
			if err != nil || !strings.HasPrefix(string(out), "unseen: "+c.want+", <nil>\n") {
				t.Errorf("%s, %v; wanted %s", out, err, c.want)
			}
		})
	}
}
