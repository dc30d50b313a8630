package command

import (
	"fmt"
	"net"
)

// ListenMetrics opens the address of a flag --metrics. One without a host is 127.0.0.1's: nobody is asked who he is, so that another network has to be said.
func ListenMetrics(address string) (net.Listener, error) {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return nil, fmt.Errorf("--metrics %s: %w; write 127.0.0.1:PORT", address, err)
	}
	if host == "" {
		host = "127.0.0.1"
	}
	l, err := net.Listen("tcp", net.JoinHostPort(host, port))
	if err != nil {
		return nil, fmt.Errorf("--metrics: %w", err)
	}
	return l, nil
}
