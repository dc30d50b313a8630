package pod

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"github.com/cradlestack/cradlestack/driver-cradle/wire"
)

// listen answers on the pod's vdocker.sock.
func (r *Running) listen() error {
	if err := r.bind(); err != nil {
		return err
	}
	r.proxies.Go(r.serve)
	return nil
}

func (r *Running) bind() error {
	path := r.dir.join(SocketFile)
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	short, done, err := shorten(path)
	if err != nil {
		return err
	}
	defer func() { _ = done() }() // a directory that is only read
	r.listener, err = net.ListenUnix("unix", &net.UnixAddr{Name: short, Net: "unix"})
	if err != nil {
		return fmt.Errorf("listen on %s: %w", path, err)
	}
	r.listener.SetUnlinkOnClose(false) // its name is only good here
	if err := os.Chmod(path, 0o600); err != nil {
		r.unlisten()
		return err
	}
	return nil
}

// Dial connects to the vdocker.sock of a pod that some process attends to.
func (d *Dir) Dial(ctx context.Context) (net.Conn, error) {
	path := d.join(SocketFile)
	short, done, err := shorten(path)
	if err != nil {
		return nil, err
	}
	defer func() { _ = done() }() // a directory that is only read
	c, err := new(net.Dialer).DialContext(ctx, "unix", short)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, errors.Unwrap(err))
	}
	return c, nil
}

// shorten gives a name for path that fits into a socket's address (108 bytes), valid until done is called.
func shorten(path string) (short string, done func() error, err error) {
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return "", nil, err
	}
	return fmt.Sprintf("/proc/self/fd/%d/%s", dir.Fd(), filepath.Base(path)), dir.Close, nil
}

func (r *Running) unlisten() {
	r.listener.Close()
	os.Remove(r.dir.join(SocketFile))
}

func (r *Running) serve() {
	for {
		c, err := r.listener.Accept()
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return
			}
			time.Sleep(10 * time.Millisecond) // out of file descriptors
			continue
		}
		r.proxies.Go(func() { r.proxy(c) })
	}
}

// openTimeout bounds how long a client waits for a guest that does not answer: one of fifty on two processors that emulate them takes its time.
const openTimeout = time.Minute

func (r *Running) proxy(client net.Conn) {
	defer client.Close()
	if !r.keep(client) {
		return
	}
	defer r.drop(client)
	in := bufio.NewReaderSize(client, 4<<10)
	host, err := isHostCall(in)
	switch {
	case err != nil && in.Buffered() == 0:
		return
	case host:
		r.answerCall(client, in)
		return
	}
	ctx, cancel := context.WithTimeoutCause(r.ctx, openTimeout, fmt.Errorf("the guest does not answer within %v: kcradle kill %s ends it", openTimeout, r.dir.path))
	defer cancel()
	// A stream to a guest that hangs opens, and then nothing comes of it.
	err = r.call(ctx, http.MethodGet, "/_ping", nil, nil, nil)
	var stream net.Conn
	if err == nil {
		stream, err = r.machine.Open(ctx)
	}
	if err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		body := fmt.Sprintf("{\"message\":%q}\n", "pod "+r.spec.Name+": "+err.Error())
		fmt.Fprintf(client, "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s", len(body), body)
		return
	}
	if !r.keep(stream) {
		stream.Close()
		return
	}
	defer r.drop(stream)
	begun, _ := in.Peek(in.Buffered())
	if _, err := stream.Write(begun); err != nil {
		stream.Close()
		return
	}
	wire.Proxy(client, stream)
}

// keep notes connections for closeConns, unless that was called already.
func (r *Running) keep(conns ...net.Conn) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.conns == nil {
		return false
	}
	for _, c := range conns {
		r.conns[c] = true
	}
	return true
}

func (r *Running) drop(conns ...net.Conn) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, c := range conns {
		delete(r.conns, c)
	}
}

func (r *Running) closeConns() {
	r.mu.Lock()
	conns := r.conns
	r.conns = nil
	r.mu.Unlock()
	for c := range conns {
		c.Close()
	}
}
