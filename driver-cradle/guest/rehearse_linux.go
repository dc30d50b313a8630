package guest

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/driver-cradle/wire"
	"github.com/cradlestack/cradlestack/spec"
)

// rehearse has the agent do in the template what it does first in every pod, as far as that goes with nothing to run: code that runs for
// the first time learns what types look like, makes room, starts threads. A machine that is emulated gains most by it.
func (p *Pod) rehearse(handler func(*Pod) http.Handler) error {
	p.uevents.known = findDisks()
	for lun := range p.uevents.known {
		if err := os.MkdirAll(layerDir(lun), 0o755); err != nil {
			return err
		}
	}
	if err := p.rehearseCalls(handler); err != nil {
		return err
	}
	for _, v := range []any{&wire.Launch{}, &stageConfig{}, &stageError{}, &record{}} {
		data, err := json.Marshal(v)
		if err == nil {
			err = json.Unmarshal(data, v)
		}
		if err != nil {
			return err
		}
	}
	startThreads()
	return nil // without collecting garbage: the runtime would spend the next seconds on giving memory back
}

// startThreads makes the runtime start the threads that mounting disks at the same time needs. They stay.
func startThreads() {
	var sleepers sync.WaitGroup
	for range 4 {
		sleepers.Go(func() {
			t := unix.NsecToTimespec((100 * time.Millisecond).Nanoseconds())
			_ = unix.Nanosleep(&t, nil) // the runtime does not see it coming, unlike its own Sleep
		})
	}
	sleepers.Wait()
}

// rehearseCalls plays host and guest over a socket, with a pod that is thrown away.
func (p *Pod) rehearseCalls(handler func(*Pod) http.Handler) error {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return fmt.Errorf("make socket: %w", err)
	}
	port, err := wire.NewPort(os.NewFile(uintptr(fds[0]), "rehearsal"))
	if err != nil {
		return err
	}
	defer port.File.Close()
	host, err := unixConn(fds[1])
	if err != nil {
		return err
	}
	defer host.Close()
	served := make(chan error, 1)
	go func() {
		err := port.Wait()
		var session *wire.Session
		if err == nil {
			session, err = wire.Accept(port, func(*wire.Birth) error { return nil })
		}
		if err == nil {
			pod := newPod(slog.New(slog.DiscardHandler), p.children, p.uevents)
			_ = pod.server(handler).Serve(session)
			err = session.Close()
		}
		served <- err
	}()
	err = callWithNothing(host)
	host.Close()
	if serr := <-served; err == nil {
		err = serr
	}
	return err
}

// callWithNothing is a host that has nothing to run.
func callWithNothing(conn net.Conn) error {
	session, err := wire.Dial(context.Background(), conn, func() *wire.Birth { return new(wire.Birth) })
	if err != nil {
		return err
	}
	defer session.Close()
	launch, err := json.Marshal(wire.Launch{Launch: spec.Launch{Containers: []spec.Container{}}})
	if err != nil {
		return err
	}
	for _, request := range []string{
		"POST " + wire.PathLaunch + "?attach=none&stdout=1&since=1.5 HTTP/1.1\r\nHost: guest\r\nContent-Type: application/json\r\n" +
			"Connection: Upgrade\r\nUpgrade: tcp\r\nContent-Length: " + strconv.Itoa(len(launch)) + "\r\n\r\n" + string(launch),
		"GET " + wire.PathStatus + " HTTP/1.1\r\nHost: guest\r\nConnection: close\r\n\r\n",
	} {
		stream, err := session.Open(context.Background())
		if err != nil {
			return err
		}
		_, err = io.WriteString(stream, request)
		if err == nil {
			_, err = stream.Read(make([]byte, 4<<10))
		}
		stream.Close()
		if err != nil {
			return err
		}
	}
	return nil
}

// layerDir is where the layer with a LUN is mounted. It is short: an overlay's options have to fit into one page.
func layerDir(lun int) string { return filepath.Join(runDir, "l", strconv.Itoa(lun)) }
