package webdav

import (
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/net/webdav"
	"golang.org/x/sys/unix"
)

type unixStat = syscall.Stat_t

// attribute keeps the properties that clients have set. It is the file's own: it goes where the file goes, by whichever protocol, and is in
// its snapshots and copies.
const attribute = "user.cradle.webdav"

// A property as it is kept.
type property struct {
	Space string `json:"s,omitempty"`
	Name  string `json:"n"`
	Lang  string `json:"l,omitempty"`
	Value string `json:"v,omitempty"` // XML
}

// maxProperties bounds what one file's take, as the kernel does (xattr(7)).
const maxProperties = 64 << 10

// parseProperties reads what is kept. Pods can write it too, so that it can be anything.
func parseProperties(data []byte) (map[xml.Name]webdav.Property, error) {
	var all []property
	if err := json.Unmarshal(data, &all); err != nil {
		return nil, err
	}
	kept := map[xml.Name]webdav.Property{}
	for _, p := range all {
		name := xml.Name{Space: p.Space, Local: p.Name}
		// What would not be one element of the answer is left out.
		if p.Space == "DAV:" || !isName(p.Name) || !wellFormed(p.Value) {
			continue
		}
		kept[name] = webdav.Property{XMLName: name, Lang: p.Lang, InnerXML: []byte(p.Value)}
	}
	return kept, nil
}

// isName says whether a name is an element's, without its prefix.
func isName(name string) bool {
	return name != "" && !strings.ContainsAny(name, ":<>/&'\"= \t\r\n") && wellFormed("<"+name+"/>")
}

// wellFormed says whether text is XML that can be put inside of an element, and ends there.
func wellFormed(text string) bool {
	d := xml.NewDecoder(strings.NewReader("<x>" + text + "</x>"))
	for depth, first := 0, true; ; first = false {
		t, err := d.Token()
		if err != nil {
			return false
		}
		switch t.(type) {
		case xml.StartElement:
			depth++
		case xml.EndElement:
			if depth--; depth == 0 {
				return int(d.InputOffset()) == len(text)+len("<x></x>")
			}
		case xml.ProcInst, xml.Directive:
			return false
		}
		if depth == 0 && !first {
			return false
		}
	}
}

// stored are the properties that clients have set.
func (f *file) stored() (map[xml.Name]webdav.Property, error) {
	data, err := f.attribute()
	if err != nil || data == nil {
		return map[xml.Name]webdav.Property{}, err
	}
	kept, err := parseProperties(data)
	if err != nil {
		return map[xml.Name]webdav.Property{}, nil //nolint:nilerr // whoever wrote that has no properties
	}
	return kept, nil
}

// attribute is what is kept with the file, nil where nothing is.
func (f *file) attribute() ([]byte, error) {
	data := make([]byte, maxProperties)
	n, err := unix.Fgetxattr(int(f.Fd()), attribute, data)
	switch {
	case errors.Is(err, unix.ENODATA), errors.Is(err, unix.ENOTSUP), errors.Is(err, unix.ERANGE):
		return nil, nil
	case err != nil:
		return nil, fmt.Errorf("properties of %s: %w", f.name, err)
	}
	return data[:n], nil
}

func live(name, value string) webdav.Property {
	return webdav.Property{XMLName: xml.Name{Space: "DAV:", Local: name}, InnerXML: []byte(value)}
}

// supportedLock says that there are locks of both kinds (RFC 4918 §15.10).
const supportedLock = `<D:lockentry xmlns:D="DAV:"><D:lockscope><D:exclusive/></D:lockscope><D:locktype><D:write/></D:locktype></D:lockentry>` +
	`<D:lockentry xmlns:D="DAV:"><D:lockscope><D:shared/></D:lockscope><D:locktype><D:write/></D:locktype></D:lockentry>`

// DeadProps is webdav.DeadPropsHolder's, by which package webdav has all properties that it does not know better.
func (f *file) DeadProps() (map[xml.Name]webdav.Property, error) {
	all, err := f.stored()
	if err != nil {
		return nil, err
	}
	var active strings.Builder
	kinds := ""
	if f.volume.locks != nil {
		kinds = supportedLock
		for _, k := range f.volume.locks.on(f.name) {
			active.WriteString(k.active(f.prefix))
		}
	}
	more := []webdav.Property{live("lockdiscovery", active.String()), live("supportedlock", kinds)}
	var st unix.Statx_t
	if err := unix.Statx(int(f.Fd()), "", unix.AT_EMPTY_PATH, unix.STATX_BTIME, &st); err == nil && st.Mask&unix.STATX_BTIME != 0 {
		more = append(more, live("creationdate", time.Unix(st.Btime.Sec, 0).UTC().Format(time.RFC3339)))
	}
	if f.info.IsDir() { // RFC 4331
		var fs unix.Statfs_t
		if err := unix.Fstatfs(int(f.Fd()), &fs); err != nil {
			return nil, err
		}
		more = append(more, live("quota-available-bytes", strconv.FormatUint(fs.Bavail*uint64(fs.Frsize), 10)),
			live("quota-used-bytes", strconv.FormatUint((fs.Blocks-fs.Bfree)*uint64(fs.Frsize), 10)))
	}
	for _, p := range more {
		all[p.XMLName] = p
	}
	return all, nil
}

// Patch is webdav.DeadPropsHolder's: all is done, or nothing.
func (f *file) Patch(patches []webdav.Proppatch) ([]webdav.Propstat, error) {
	all, err := f.stored()
	if err != nil {
		return nil, err
	}
	var names, refused []webdav.Property
	for _, patch := range patches {
		for _, p := range patch.Props {
			names = append(names, webdav.Property{XMLName: p.XMLName})
			switch {
			case p.XMLName.Space == "DAV:":
				refused = append(refused, webdav.Property{XMLName: p.XMLName})
			case patch.Remove:
				delete(all, p.XMLName)
			default:
				all[p.XMLName] = p
			}
		}
	}
	if len(refused) > 0 {
		return outcome(names, refused, http.StatusForbidden, `<D:cannot-modify-protected-property xmlns:D="DAV:"/>`), nil
	}
	var kept []property
	for _, p := range all {
		kept = append(kept, property{p.XMLName.Space, p.XMLName.Local, p.Lang, string(p.InnerXML)})
	}
	switch err := f.keep(kept); {
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT), errors.Is(err, unix.E2BIG), errors.Is(err, unix.ERANGE):
		return []webdav.Propstat{{Props: names, Status: http.StatusInsufficientStorage}}, nil
	case errors.Is(err, unix.ENOTSUP):
		return []webdav.Propstat{{Props: names, Status: http.StatusForbidden}}, nil
	case err != nil:
		return nil, err
	}
	return []webdav.Propstat{{Props: names, Status: http.StatusOK}}, nil
}

// outcome is the answer to a patch of which a part is refused, and so all.
func outcome(names, refused []webdav.Property, code int, condition string) []webdav.Propstat {
	is := map[xml.Name]bool{}
	for _, p := range refused {
		is[p.XMLName] = true
	}
	out := []webdav.Propstat{{Props: refused, Status: code, XMLError: condition}}
	var others []webdav.Property
	for _, p := range names {
		if !is[p.XMLName] {
			others = append(others, p)
		}
	}
	if len(others) > 0 {
		out = append(out, webdav.Propstat{Props: others, Status: http.StatusFailedDependency})
	}
	return out
}

// keep stores properties with the file.
func (f *file) keep(all []property) error {
	if len(all) == 0 {
		err := unix.Fremovexattr(int(f.Fd()), attribute)
		if err == nil {
			err = f.Sync()
		}
		if errors.Is(err, unix.ENODATA) {
			return nil
		}
		return err
	}
	data, err := json.Marshal(all)
	if err != nil {
		return err
	}
	if len(data) > maxProperties {
		return unix.E2BIG
	}
	if err := unix.Fsetxattr(int(f.Fd()), attribute, data, 0); err != nil {
		return err
	}
	return f.Sync()
}
