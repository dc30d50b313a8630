package dockerhttp

import (
	"bufio"
	"io"
	"net"
	"net/http"
	"time"

	"github.com/moby/moby/api/types/container"
)

// Ping answers GET and HEAD /_ping.
func Ping(w http.ResponseWriter, r *http.Request) error {
	h := w.Header()
	h.Set("Builder-Version", "")
	h.Set("Docker-Experimental", "false")
	h.Set("Swarm", "inactive")
	h.Set("Cache-Control", "no-cache, no-store, must-revalidate")
	h.Set("Pragma", "no-cache")
	h.Set("Content-Type", "text/plain; charset=utf-8")
	if r.Method == http.MethodHead {
		h.Set("Content-Length", "0")
		return nil
	}
	_, _ = io.WriteString(w, "OK") // the client has gone
	return nil
}

// InspectedContainer is docker's answer with what versions before 1.52 have in addition and scripts go on asking for.
type InspectedContainer struct {
	container.InspectResponse
	NetworkSettings NetworkSettings
}

// Waited is docker's answer to who waits for a container's end, with how it has ended: who asks a pod afterwards may find it gone.
type Waited struct {
	container.WaitResponse
	State        *container.State `json:",omitempty"`
	RestartCount int              `json:",omitempty"`
}

// NetworkSettings are those of an InspectedContainer.
type NetworkSettings struct {
	container.NetworkSettings
	Bridge                 string
	HairpinMode            bool
	LinkLocalIPv6Address   string
	LinkLocalIPv6PrefixLen int
	SecondaryIPAddresses   []string
	SecondaryIPv6Addresses []string
	EndpointID             string
	Gateway                string
	GlobalIPv6Address      string
	GlobalIPv6PrefixLen    int
	IPAddress              string
	IPPrefixLen            int
	IPv6Gateway            string
	MacAddress             string
}

// Hijack takes a client's connection over from HTTP. The stream has not begun: BeginStream does that. The reader has what was read ahead.
func Hijack(w http.ResponseWriter) (net.Conn, *bufio.Reader, error) {
	conn, rw, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return nil, nil, err
	}
	if err := conn.SetDeadline(time.Time{}); err != nil {
		conn.Close()
		return nil, nil, err
	}
	return conn, rw.Reader, nil
}

// BeginStream answers on a connection that was taken over (moby api/swagger.yaml, ContainerAttach); mediaType is the stream's.
func BeginStream(conn net.Conn, h http.Header, mediaType string, upgrade bool) error {
	head := "HTTP/1.1 200 OK\r\nContent-Type: " + mediaType + "\r\n"
	if upgrade {
		head = "HTTP/1.1 101 UPGRADED\r\nContent-Type: " + mediaType + "\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n"
	}
	_, err := io.WriteString(conn, head+"Api-Version: "+h.Get("Api-Version")+"\r\n\r\n")
	return err
}
