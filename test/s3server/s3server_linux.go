// Package s3server runs a real S3 server for a test.
package s3server

import (
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/cradlestack/cradlestack/test/programs"
)

// What its only user logs in with.
const (
	AccessKey = "key"
	SecretKey = "secret"
)

var servers atomic.Int32

// Start starts one with an empty bucket and gives its URL. stop ends it before the test does.
func Start(t *testing.T, bucket string) (url string, stop func()) {
	t.Helper()
	program, err := programs.Tool("versitygw")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, bucket), 0o700); err != nil {
		t.Fatal(err)
	}
	// No other process's: a free port of 127.0.0.1 may be taken by somebody before the server has it.
	pid := os.Getpid()
	address := fmt.Sprintf("127.%d.%d.%d:%d", 64+pid>>16, pid>>8&255, pid&255, 7070+servers.Add(1))
	cmd := exec.Command(program, "--port", address, "posix", dir)
	cmd.Env = append(os.Environ(), "ROOT_ACCESS_KEY="+AccessKey, "ROOT_SECRET_KEY="+SecretKey)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	started, ended := make(chan error), make(chan struct{})
	go func() {
		defer close(ended)
		// Pdeathsig comes when the thread ends that has started the process.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		if started <- err; err == nil {
			_ = cmd.Wait()
		}
	}()
	if err := <-started; err != nil {
		t.Fatal(err)
	}
	stop = func() {
		_ = cmd.Process.Kill() // it may have ended
		<-ended
	}
	t.Cleanup(stop)
	url = "http://" + address
	for {
		if answer, err := http.Get(url); err == nil {
			answer.Body.Close()
			return url, stop
		}
		select {
		case <-ended:
			t.Fatalf("versitygw has ended: %v", cmd.ProcessState)
		case <-time.After(20 * time.Millisecond):
		}
	}
}
