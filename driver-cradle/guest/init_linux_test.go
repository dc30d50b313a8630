package guest

import (
	"io"
	"os"
	"os/exec"
	"testing"

	"golang.org/x/sys/unix"
)

// init makes this program a container's init, as Main does.
func init() {
	if len(os.Args) > 2 && os.Args[0] == initName {
		os.Exit(runInit(os.Args[2:]))
	}
}

// A container with an init runs once its init passes signals on: none that comes at once ends the init itself, or is lost.
func TestEarlySignals(t *testing.T) {
	self, err := initExecutable()
	if err != nil {
		t.Fatal(err)
	}
	for range 20 {
		agent, socket, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command(self)
		cmd.Args = []string{initName, "--", "sleep", "1000"}
		cmd.ExtraFiles = []*os.File{socket} // stageSocket
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		socket.Close()
		if _, err := io.ReadAll(agent); err != nil {
			t.Error(err)
		}
		agent.Close()
		if err := cmd.Process.Signal(unix.SIGTERM); err != nil {
			t.Fatal(err)
		}
		_ = cmd.Wait()
		if code := cmd.ProcessState.ExitCode(); code != 128+int(unix.SIGTERM) {
			t.Errorf("it has ended with %d: %v", code, cmd.ProcessState)
		}
	}
}
