package command

import (
	"net"
	"strings"
	"testing"
)

func TestListenMetrics(t *testing.T) {
	for _, address := range []string{":0", "127.0.0.1:0"} {
		l, err := ListenMetrics(address)
		if err != nil {
			t.Fatal(err)
		}
		l.Close()
		if host, _, err := net.SplitHostPort(l.Addr().String()); err != nil || host != "127.0.0.1" {
			t.Errorf("%s is %v, %v", address, l.Addr(), err)
		}
	}
	if _, err := ListenMetrics("9809"); err == nil || !strings.Contains(err.Error(), "--metrics 9809: ") || !strings.Contains(err.Error(), "write 127.0.0.1:PORT") {
		t.Errorf("a port alone: %v", err)
	}
}
