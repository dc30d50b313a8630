package network

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// settings of a namespace that sharing its addresses changes. Their text is the name of a filter while they are changed, so whoever removes that
// can put them back.
type settings struct {
	first, last   int // ports that are given to sockets that ask for none
	routeLocalnet int // of lo: addresses in 127.0.0.0/8 are taken from packets that this host has not sent itself
	acceptLocal   int // of lo: the pod's own addresses likewise
}

const settingsFormat = "cradle ports=%d-%d route_localnet=%d accept_local=%d"

// Names under /proc/sys.
const (
	portsSysctl         = "net/ipv4/ip_local_port_range" // of IPv6, too
	routeLocalnetSysctl = "net/ipv4/conf/lo/route_localnet"
	acceptLocalSysctl   = "net/ipv4/conf/lo/accept_local"
)

func (s settings) String() string {
	return fmt.Sprintf(settingsFormat, s.first, s.last, s.routeLocalnet, s.acceptLocal)
}

func readSettings() (s settings, err error) {
	if err = readSysctl(portsSysctl, &s.first, &s.last); err == nil {
		if err = readSysctl(routeLocalnetSysctl, &s.routeLocalnet); err == nil {
			err = readSysctl(acceptLocalSysctl, &s.acceptLocal)
		}
	}
	return s, err
}

// middle is the first port of the upper half.
func (s settings) middle() int { return s.first + (s.last-s.first+1)/2 }

// change makes the settings such that addresses can be shared, and gives the guest's part of the ports: where both took them from one range, each
// would sooner or later use a port towards a peer that the other is using.
func (s settings) change() (guest [2]uint16, err error) {
	if s.last-s.first < 1 {
		return guest, fmt.Errorf("%s is %d to %d: there have to be ports for the guest and the namespace", portsSysctl, s.first, s.last)
	}
	if err = setSysctl(portsSysctl, fmt.Sprint(s.first, s.middle()-1)); err == nil {
		if err = setSysctl(routeLocalnetSysctl, "1"); err == nil {
			err = setSysctl(acceptLocalSysctl, "1")
		}
	}
	return [2]uint16{uint16(s.middle()), uint16(s.last)}, err
}

// restoreSettings puts back what text tells, if it is the text of settings, and if nobody has changed it since.
func restoreSettings(text string) error {
	var before settings
	if n, err := fmt.Sscanf(text, settingsFormat, &before.first, &before.last, &before.routeLocalnet, &before.acceptLocal); n != 4 || err != nil {
		return nil //nolint:nilerr // another filter's name
	}
	now, err := readSettings()
	if err != nil {
		return err
	}
	if now.first == before.first && now.last == before.middle()-1 {
		if err := setSysctl(portsSysctl, fmt.Sprint(before.first, before.last)); err != nil {
			return err
		}
	}
	for _, v := range []struct {
		name        string
		before, now int
	}{{routeLocalnetSysctl, before.routeLocalnet, now.routeLocalnet}, {acceptLocalSysctl, before.acceptLocal, now.acceptLocal}} {
		if v.now != v.before {
			if err := setSysctl(v.name, fmt.Sprint(v.before)); err != nil {
				return err
			}
		}
	}
	return nil
}

// readSysctl and setSysctl are about the network namespace of the calling thread.
func readSysctl(name string, values ...any) error {
	data, err := os.ReadFile(filepath.Join("/proc/sys", name))
	if err != nil {
		return err
	}
	if _, err := fmt.Sscan(strings.TrimSpace(string(data)), values...); err != nil {
		return fmt.Errorf("%s is %q: %w", name, data, err)
	}
	return nil
}

func setSysctl(name, value string) error {
	if err := os.WriteFile(filepath.Join("/proc/sys", name), []byte(value), 0); err != nil {
		return fmt.Errorf("set %s to %s: %w", name, value, err)
	}
	return nil
}
