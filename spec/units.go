package spec

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"time"
)

// Bytes is a size. In JSON it is a number of bytes or a string with a unit; it is written with the largest binary unit
// that divides it.
type Bytes int64

var units = []struct {
	name string
	size Bytes
}{
	{"EiB", 1 << 60}, {"PiB", 1 << 50}, {"TiB", 1 << 40}, {"GiB", 1 << 30}, {"MiB", 1 << 20}, {"KiB", 1 << 10},
}

// ParseBytes reads a size the way docker and Kubernetes users write one. Units are case-insensitive: K, KB and KiB (and so on up to E)
// are powers of 1024 when written as docker's single letter or with an i, and powers of 1000 when written as KB.
func ParseBytes(s string) (Bytes, error) {
	t := strings.TrimSpace(s)
	i := strings.IndexFunc(t, func(r rune) bool { return (r < '0' || r > '9') && r != '.' })
	if i < 0 {
		i = len(t)
	}
	number, unit := t[:i], strings.ToLower(strings.TrimSpace(t[i:]))
	factor := int64(1)
	switch unit {
	case "", "b":
	default:
		exp := strings.IndexByte("kmgtpe", unit[0])
		if exp < 0 {
			return 0, fmt.Errorf("size %q: unit %q is none of B KB KiB MB MiB GB GiB TB TiB PB PiB", s, unit)
		}
		base := int64(1024)
		switch unit[1:] {
		case "", "i", "ib":
		case "b":
			base = 1000
		default:
			return 0, fmt.Errorf("size %q: unit %q is none of B KB KiB MB MiB GB GiB TB TiB PB PiB", s, unit)
		}
		for ; exp >= 0; exp-- {
			factor *= base
		}
	}
	if n, err := strconv.ParseInt(number, 10, 64); err == nil {
		if n > (1<<63-1)/factor {
			return 0, fmt.Errorf("size %q is too large", s)
		}
		return Bytes(n * factor), nil
	}
	f, err := strconv.ParseFloat(number, 64)
	if err != nil {
		return 0, fmt.Errorf("size %q is no number with a unit, such as 512MiB or 10GB", s)
	}
	if f *= float64(factor); f >= 1<<63 {
		return 0, fmt.Errorf("size %q is too large", s)
	}
	return Bytes(f), nil
}

// String gives the size with the largest binary unit that divides it: 256MiB, 1000B.
func (b Bytes) String() string {
	for _, u := range units {
		if b >= u.size && b%u.size == 0 {
			return strconv.FormatInt(int64(b/u.size), 10) + u.name
		}
	}
	return strconv.FormatInt(int64(b), 10) + "B"
}

// MarshalJSON writes the size as String does.
func (b Bytes) MarshalJSON() ([]byte, error) { return json.Marshal(b.String()) }

// UnmarshalJSON takes a number of bytes or what ParseBytes takes.
func (b *Bytes) UnmarshalJSON(data []byte) error {
	var s string
	if len(data) > 0 && data[0] == '"' {
		if err := json.Unmarshal(data, &s); err != nil {
			return err
		}
	} else {
		s = string(bytes.TrimSpace(data))
	}
	v, err := ParseBytes(s)
	if err != nil {
		return err
	}
	*b = v
	return nil
}

// Duration is a time.Duration that reads and writes as "1m30s" in JSON.
type Duration time.Duration

// String is time.Duration's.
func (d Duration) String() string { return time.Duration(d).String() }

// MarshalJSON writes the duration as String does.
func (d Duration) MarshalJSON() ([]byte, error) { return json.Marshal(d.String()) }

// UnmarshalJSON takes what time.ParseDuration takes.
func (d *Duration) UnmarshalJSON(data []byte) error {
	var s string
	if err := json.Unmarshal(data, &s); err != nil {
		return fmt.Errorf("duration %s is no string such as \"1m30s\"", data)
	}
	v, err := time.ParseDuration(s)
	if err != nil {
		return fmt.Errorf("duration %q is not such as 1m30s", s)
	}
	*d = Duration(v)
	return nil
}
