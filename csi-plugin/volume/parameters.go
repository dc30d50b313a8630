package volume

import (
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/cradlestack/cradlestack/spec"
)

// The classes.
const (
	NFS = "nfs" // files; the default
	LV2 = "lv2" // a local block volume
	GFS = "gfs" // files, on many hosts at once
)

// Parameters are what a volume's creator chooses.
type Parameters struct {
	Class       string        `json:"class"`
	Pool        string        `json:"pool,omitempty"`
	FS          string        `json:"fs,omitempty"`     // ext4, xfs; of a request, "" leaves it to the backend; of a volume, it is the storage's own
	Direct      bool          `json:"direct,omitempty"` // the guest attaches it itself: a block volume as a disk, a file volume from the filer
	Compression string        `json:"compression,omitempty"`
	BlockSize   spec.Bytes    `json:"volblocksize,omitempty"`
	Limits      spec.IOLimits `json:"limits,omitzero"`
	Snapshots   Retention     `json:"snapshots,omitzero"` // that are taken by schedule
	Cold        Retention     `json:"cold,omitzero"`      // copies in cold storage, one each hour
}

// Block says whether the class is of block volumes, one file system for one reader and writer.
func (p Parameters) Block() bool { return p.Class == LV2 }

// ParseParameters reads what a user writes into a volume's parameters. Every error is an ErrInvalid that names the parameter.
func ParseParameters(m map[string]string) (Parameters, error) {
	p := Parameters{Class: NFS}
	for _, name := range slices.Sorted(maps.Keys(m)) {
		read, ok := parameters[name]
		if !ok {
			return p, Invalid("parameter "+strconv.Quote(abbreviate(name)), "there is none; known are %s", strings.Join(slices.Sorted(maps.Keys(parameters)), ", "))
		}
		if problem := read(&p, m[name]); problem != "" {
			return p, Invalid("parameter "+name, "%q %s", abbreviate(m[name]), problem)
		}
	}
	if p.Limits != (spec.IOLimits{}) && !(p.Direct && p.Block()) {
		return p, Invalid("parameter iops, bandwidth", "are kept by the guest's machine, of its disks: set attach=direct and class=lv2, or leave them out")
	}
	if p.Cold != (Retention{}) && !p.Block() {
		return p, Invalid("parameter cold", "is for block volumes; set class=lv2, or leave it out")
	}
	return p, nil
}

// parameters by name; each says what is wrong with a value and what to write, or "".
var parameters = map[string]func(p *Parameters, value string) string{
	"class": func(p *Parameters, v string) string { return oneOf(&p.Class, v, NFS, LV2, GFS) },
	"pool": func(p *Parameters, v string) string {
		if p.Pool = v; !ValidName(v) {
			return "is no name of a pool"
		}
		return ""
	},
	"fs": func(p *Parameters, v string) string { return oneOf(&p.FS, v, "ext4", "xfs") },
	"attach": func(p *Parameters, v string) string {
		var attach string
		problem := oneOf(&attach, v, "host", "direct")
		p.Direct = attach == "direct"
		return problem
	},
	// zfsprops(7), compression.
	"compression": func(p *Parameters, v string) string { return oneOf(&p.Compression, v, "on", "off", "lz4", "zstd") },
	// zfsprops(7), volblocksize: a power of two, to 128 KiB. Less than a page is less than a file system's block.
	"volblocksize": func(p *Parameters, v string) string {
		n, err := spec.ParseBytes(v)
		if p.BlockSize = n; err != nil || n < 4096 || n > 128<<10 || n&(n-1) != 0 {
			return "is no block size; write a power of two from 4KiB to 128KiB"
		}
		return ""
	},
	"snapshots": func(p *Parameters, v string) string { return retention(&p.Snapshots, v) },
	"cold":      func(p *Parameters, v string) string { return retention(&p.Cold, v) },
	"iops": func(p *Parameters, v string) string {
		n, err := strconv.ParseInt(v, 10, 64)
		if p.Limits.IOPS = n; err != nil || n < 1 {
			return "is no number of operations in a second; write a whole number above 0"
		}
		return ""
	},
	"bandwidth": func(p *Parameters, v string) string {
		n, err := spec.ParseBytes(v)
		if p.Limits.Bandwidth = n; err != nil || n < 1 {
			return "is no number of bytes in a second; write 100MiB"
		}
		return ""
	},
}

func retention(into *Retention, value string) string {
	var err error
	if *into, err = ParseRetention(value); err != nil {
		return "will not do: " + err.Error()
	}
	return ""
}

func oneOf(into *string, value string, allowed ...string) string {
	if *into = value; !slices.Contains(allowed, value) {
		return "is none of " + strings.Join(allowed, ", ")
	}
	return ""
}

// Served says whether guests have the volume from the filer.
func (p Parameters) Served() bool { return p.Direct && !p.Block() }

// Map is the reverse of ParseParameters, without what has its default.
func (p Parameters) Map() map[string]string {
	m := map[string]string{"class": p.Class}
	for name, value := range map[string]string{"pool": p.Pool, "fs": p.FS, "compression": p.Compression} {
		if value != "" {
			m[name] = value
		}
	}
	if p.Direct {
		m["attach"] = "direct"
	}
	if p.BlockSize != 0 {
		m["volblocksize"] = p.BlockSize.String()
	}
	if p.Snapshots != (Retention{}) {
		m["snapshots"] = p.Snapshots.String()
	}
	if p.Cold != (Retention{}) {
		m["cold"] = p.Cold.String()
	}
	if p.Limits.IOPS != 0 {
		m["iops"] = strconv.FormatInt(p.Limits.IOPS, 10)
	}
	if p.Limits.Bandwidth != 0 {
		m["bandwidth"] = p.Limits.Bandwidth.String()
	}
	return m
}
