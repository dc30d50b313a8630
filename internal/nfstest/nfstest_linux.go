// Package nfstest serves a directory over NFS to tests: by a real server, NFS-Ganesha with a portmapper beside it, in a network namespace of its
// own, where it has the usual ports. This host reaches it, and so do guests whose network goes through this host. It needs root.
package nfstest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/cradlestack/cradlestack/internal/locked"
	"github.com/cradlestack/cradlestack/internal/netnstest"
)

// Export is the path that the directory is served at, by all versions of the protocol.
const Export = "/data"

// A Server is running until Close.
type Server struct {
	Host string // its address; NFS is at port 2049, the portmapper at 111

	namespace *netnstest.Namespace
	work      string
	cmd       *exec.Cmd
	log       locked.Buffer
}

// Serve serves dir, which must not be below /run, and returns when the server answers.
func Serve(ctx context.Context, dir string) (_ *Server, err error) {
	for _, program := range []string{"ganesha.nfsd", "rpcbind"} {
		if _, err := exec.LookPath(program); err != nil {
			return nil, fmt.Errorf("no %s: apt-get install nfs-ganesha nfs-ganesha-vfs rpcbind", program)
		}
	}
	namespace, err := netnstest.New("nfs")
	if err != nil {
		return nil, err
	}
	s := &Server{Host: namespace.Host, namespace: namespace}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Close())
		}
	}()
	if s.work, err = os.MkdirTemp("", "nfstest-"); err != nil {
		return nil, err
	}
	config := filepath.Join(s.work, "ganesha.conf")
	if err := os.WriteFile(config, fmt.Appendf(nil, `
NFS_CORE_PARAM { Protocols = 3, 4; MNT_Port = 20048; Enable_NLM = false; Enable_RQUOTA = false; mount_path_pseudo = true; }
NFSV4 { Graceless = true; RecoveryRoot = %q; Only_Numeric_Owners = true; }
EXPORT { Export_Id = 1; Path = %q; Pseudo = %q; Access_Type = RW; Squash = No_Root_Squash; SecType = sys; Protocols = 3, 4; Transports = TCP; FSAL { Name = VFS; } }
LOG { Default_Log_Level = WARN; }
`, s.work, dir, Export), 0o600); err != nil {
		return nil, err
	}
	// The sockets below /run are the namespace's own: ip has made a mount namespace as well.
	const script = `mount -t tmpfs tmpfs /run && { rpcbind -f & } && until [ -S /run/rpcbind.sock ]; do sleep 0.05; done && exec ganesha.nfsd -F -f "$0" -L STDOUT -p /run/ganesha.pid`
	cmd := s.namespace.Command(context.WithoutCancel(ctx), "sh", "-c", script, config)
	cmd.Stdout, cmd.Stderr = &s.log, &s.log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.WaitDelay = 10 * time.Second
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	s.cmd = cmd
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	for {
		conn, err := new(net.Dialer).DialContext(ctx, "tcp", net.JoinHostPort(s.Host, "2049"))
		if err == nil {
			return s, conn.Close()
		}
		if ctx.Err() != nil {
			return nil, fmt.Errorf("the NFS server does not listen: %w\n%s", err, s.Log())
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// Log is what the server has said.
func (s *Server) Log() string {
	var kept strings.Builder
	for line := range strings.Lines(s.log.String()) {
		if !strings.Contains(line, " SetComponentLogLevel ") { // dozens of them, whatever the level
			kept.WriteString(line)
		}
	}
	return kept.String()
}

// Close ends the server and removes the namespace.
func (s *Server) Close() error {
	if s.cmd != nil {
		_ = syscall.Kill(-s.cmd.Process.Pid, syscall.SIGKILL) // the portmapper as well
		_ = s.cmd.Wait()
	}
	os.RemoveAll(s.work)
	return s.namespace.Close()
}
