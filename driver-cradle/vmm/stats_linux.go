package vmm

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"
)

// Stats are what a machine costs its host.
type Stats struct {
	CPU   time.Duration `json:"cpu"`   // used by QEMU, guest included
	RSS   int64         `json:"rss"`   // bytes resident, those shared with other pods of the template as well
	PSS   int64         `json:"pss"`   // bytes, each shared page counted in parts
	Disks []DiskStats   `json:"disks"` // by LUN
}

// DiskStats count a disk's traffic since the machine's start.
type DiskStats struct {
	LUN        int    `json:"lun"`
	Key        string `json:"key"`
	ReadBytes  int64  `json:"readBytes"`
	ReadOps    int64  `json:"readOps"`
	WriteBytes int64  `json:"writeBytes"`
	WriteOps   int64  `json:"writeOps"`
}

// Stats asks the host's kernel and QEMU.
func (m *Machine) Stats(ctx context.Context) (Stats, error) {
	var s Stats
	var err error
	if s.CPU, err = cpuTime(m.process.pid); err != nil {
		return Stats{}, fmt.Errorf("machine statistics: %w", err)
	}
	if s.RSS, s.PSS, err = residentMemory(m.process.pid); err != nil {
		return Stats{}, fmt.Errorf("machine statistics: %w", err)
	}
	var devices []struct {
		QDev  string `json:"qdev"`
		Stats struct {
			ReadBytes  int64 `json:"rd_bytes"`
			ReadOps    int64 `json:"rd_operations"`
			WriteBytes int64 `json:"wr_bytes"`
			WriteOps   int64 `json:"wr_operations"`
		} `json:"stats"`
	}
	if err := m.QMP(ctx, "query-blockstats", nil, &devices); err != nil {
		return Stats{}, fmt.Errorf("machine statistics: %w", err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, d := range devices {
		// /machine/peripheral/lun3, or with a device's class behind it
		for part := range strings.SplitSeq(d.QDev, "/") {
			number, ok := strings.CutPrefix(part, "lun")
			lun, err := strconv.Atoi(number)
			if !ok || err != nil {
				continue
			}
			if _, used := m.state.Disks[lun]; !used { // an empty place
				continue
			}
			s.Disks = append(s.Disks, DiskStats{
				LUN: lun, Key: m.state.Disks[lun].Key, ReadBytes: d.Stats.ReadBytes, ReadOps: d.Stats.ReadOps,
				WriteBytes: d.Stats.WriteBytes, WriteOps: d.Stats.WriteOps,
			})
		}
	}
	return s, nil
}

// residentMemory reads /proc/PID/smaps_rollup, in bytes.
func residentMemory(pid int) (rss, pss int64, err error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		return 0, 0, err
	}
	for s := bufio.NewScanner(bytes.NewReader(data)); s.Scan(); {
		name, value, _ := strings.Cut(s.Text(), ":")
		kib, err := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(value), " kB"), 10, 64)
		if err != nil {
			continue
		}
		switch name {
		case "Rss":
			rss = kib << 10
		case "Pss":
			pss = kib << 10
		}
	}
	return rss, pss, nil
}
