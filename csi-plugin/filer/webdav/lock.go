package webdav

import (
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/cradlestack/cradlestack/internal/durable"
)

// A lock is one of RFC 4918 §6. It is of a resource, or of all below it as well.
type lock struct {
	Token   string    `json:"token"`
	Path    string    `json:"path"`
	Deep    bool      `json:"deep,omitempty"`
	Shared  bool      `json:"shared,omitempty"`
	Owner   string    `json:"owner,omitempty"` // XML that says for its client whose it is
	User    string    `json:"user"`
	Seconds int64     `json:"seconds"` // that it was asked for
	Expires time.Time `json:"expires"`
}

// below says whether path is root or is in it.
func below(path, root string) bool {
	return path == root || root == "/" || strings.HasPrefix(path, root+"/")
}

func (l *lock) covers(path string) bool { return path == l.Path || l.Deep && below(path, l.Path) }

// Bounds of locks. A client that goes on with its work asks again in time.
const (
	usualLock = 30 * time.Minute
	longLock  = 24 * time.Hour
	maxLocks  = 10_000  // of a volume
	maxLocked = 4 << 20 // bytes of their paths and owners: all are written with each change
	maxShared = 100     // of one place: who lists it, or what is in it, is told them all
	maxOwner  = 4 << 10
)

// Locks of a volume. They are kept in a file, so that they outlast the process.
type locks struct {
	file   string
	prefix string // of the volume's URLs

	mu  sync.Mutex
	all []*lock
}

func openLocks(file string) (*locks, error) {
	l := &locks{file: file}
	data, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return l, nil
	}
	if err == nil {
		err = json.Unmarshal(data, &l.all)
	}
	if err != nil {
		return nil, fmt.Errorf("locks in %s: %w; remove it, and clients lose their locks", file, err)
	}
	// None lasts longer from now on than it was asked for, whatever the clock has been since.
	for _, k := range l.all {
		if last := time.Now().Add(time.Duration(k.Seconds) * time.Second); k.Expires.After(last) {
			k.Expires = last
		}
	}
	return l, nil
}

// change writes what f makes of the locks, which is what they are once it is on stable storage.
func (l *locks) change(f func(all []*lock) []*lock) error {
	changed := f(slices.Clone(l.all))
	if len(changed) == 0 {
		err := os.Remove(l.file)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	} else {
		data, err := json.Marshal(changed)
		if err == nil {
			err = durable.WriteFile(l.file, data)
		}
		if err != nil {
			return err
		}
	}
	l.all = changed
	return nil
}

// expire forgets, in memory, what has expired. The file follows with the next change.
func (l *locks) expire() {
	now := time.Now()
	l.all = slices.DeleteFunc(l.all, func(k *lock) bool { return now.After(k.Expires) })
}

// on are the locks that cover a path.
func (l *locks) on(path string) []lock {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.expire()
	var on []lock
	for _, k := range l.all {
		if k.covers(path) {
			on = append(on, *k)
		}
	}
	return on
}

// errTooManyLocks is an answer that says so.
var errTooManyLocks = &refusal{code: http.StatusInsufficientStorage, err: errors.New("the volume has as many locks as there is room for; end some")}

// take makes a lock, or says whose is in the way.
func (l *locks) take(k lock) (lock, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.expire()
	size, shared := len(k.Path)+len(k.Owner), 0
	for _, o := range l.all {
		size += len(o.Path) + len(o.Owner)
		if o.covers(k.Path) {
			shared++
		}
		if (o.covers(k.Path) || k.covers(o.Path)) && !(o.Shared && k.Shared) {
			return k, l.locked("no-conflicting-lock", o.Path)
		}
	}
	if len(l.all) >= maxLocks || size > maxLocked || shared >= maxShared {
		return k, errTooManyLocks
	}
	var id [16]byte
	rand.Read(id[:])
	id[6], id[8] = id[6]&0x0f|0x40, id[8]&0x3f|0x80 // RFC 9562 §5.4
	h := hex.EncodeToString(id[:])
	k.Token = "urn:uuid:" + h[:8] + "-" + h[8:12] + "-" + h[12:16] + "-" + h[16:20] + "-" + h[20:]
	k.Expires = time.Now().Add(time.Duration(k.Seconds) * time.Second)
	return k, l.change(func(all []*lock) []*lock { return append(all, &k) })
}

// refresh lets one of the user's locks on a path, which one of the tokens names, begin anew.
func (l *locks) refresh(path, user string, tokens []string, seconds int64) (lock, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.expire()
	i := slices.IndexFunc(l.all, func(k *lock) bool { return k.covers(path) && k.User == user && slices.Contains(tokens, k.Token) })
	if i < 0 {
		return lock{}, &refusal{code: http.StatusPreconditionFailed, condition: `<D:lock-token-matches-request-uri/>`, err: errors.New("no such lock")}
	}
	fresh := *l.all[i]
	fresh.Seconds, fresh.Expires = seconds, time.Now().Add(time.Duration(seconds)*time.Second)
	return fresh, l.change(func(all []*lock) []*lock { all[i] = &fresh; return all })
}

// release ends one of the user's locks on a path.
func (l *locks) release(path, user, token string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.expire()
	i := slices.IndexFunc(l.all, func(k *lock) bool { return k.covers(path) && k.Token == token })
	switch {
	case i < 0:
		return &refusal{code: http.StatusConflict, condition: `<D:lock-token-matches-request-uri/>`, err: errors.New("no such lock")}
	case l.all[i].User != user:
		return &refusal{code: http.StatusForbidden, err: errors.New("the lock is somebody else's")}
	}
	return l.change(func(all []*lock) []*lock { return slices.Delete(all, i, i+1) })
}

// forget ends the locks of what is no more: they do not move with it (RFC 4918 §7.6).
func (l *locks) forget(path string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	gone := func(k *lock) bool { return below(k.Path, path) }
	if !slices.ContainsFunc(l.all, gone) {
		return nil
	}
	return l.change(func(all []*lock) []*lock { return slices.DeleteFunc(all, gone) })
}

// allows says whether a request with these tokens may change a path and, where tree says so, all below it. There a lock is in the way unless one of
// those that cover the same was named by the user who has it.
func (l *locks) allows(user string, tokens []string, path string, tree bool) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.expire()
	affected := []string{path}
	for _, k := range l.all {
		if tree && below(k.Path, path) {
			affected = append(affected, k.Path)
		}
	}
	for _, a := range affected {
		var in *lock
		named := false
		for _, k := range l.all {
			if k.covers(a) {
				in = k
				named = named || k.User == user && slices.Contains(tokens, k.Token)
			}
		}
		if in != nil && !named {
			return l.locked("lock-token-submitted", in.Path)
		}
	}
	return nil
}

// locked is the answer for who has not the lock of a path.
func (l *locks) locked(condition, path string) error {
	return &refusal{
		code:      http.StatusLocked,
		condition: "<D:" + condition + "><D:href>" + escape(href(l.prefix+path)) + "</D:href></D:" + condition + ">",
		err:       fmt.Errorf("%s is locked", path),
	}
}

func escape(s string) string {
	var b bytes.Buffer
	_ = xml.EscapeText(&b, []byte(s)) // a buffer takes all
	return b.String()
}

// active is the lock as the property lockdiscovery has it; prefix is of the volume's URLs.
func (l lock) active(prefix string) string {
	depth, scope := "0", "exclusive"
	if l.Deep {
		depth = "infinity"
	}
	if l.Shared {
		scope = "shared"
	}
	owner := ""
	if l.Owner != "" {
		owner = `<D:owner>` + l.Owner + `</D:owner>`
	}
	left := max(0, int64(time.Until(l.Expires).Round(time.Second)/time.Second))
	return `<D:activelock xmlns:D="DAV:"><D:locktype><D:write/></D:locktype><D:lockscope><D:` + scope + `/></D:lockscope><D:depth>` + depth + `</D:depth>` + owner +
		`<D:timeout>Second-` + strconv.FormatInt(left, 10) + `</D:timeout><D:locktoken><D:href>` + escape(l.Token) + `</D:href></D:locktoken>` +
		`<D:lockroot><D:href>` + escape(href(prefix+l.Path)) + `</D:href></D:lockroot></D:activelock>`
}

// parseTimeout reads the header Timeout (RFC 4918 §10.7): the first that is understood counts, within bounds.
func parseTimeout(header string) (seconds int64) {
	for _, t := range strings.Split(header, ",") {
		t = strings.TrimSpace(t)
		if t == "Infinite" {
			return int64(longLock / time.Second)
		}
		if digits, ok := strings.CutPrefix(t, "Second-"); ok {
			if n, err := strconv.ParseUint(digits, 10, 32); err == nil {
				return min(max(int64(n), 1), int64(longLock/time.Second))
			}
		}
	}
	return int64(usualLock / time.Second)
}

// parseLockInfo reads the body of a LOCK request. An empty one is a refresh.
func parseLockInfo(r io.Reader) (k lock, refresh bool, err error) {
	var in struct {
		XMLName xml.Name `xml:"DAV: lockinfo"`
		Scope   struct {
			Exclusive *struct{} `xml:"DAV: exclusive"`
			Shared    *struct{} `xml:"DAV: shared"`
		} `xml:"DAV: lockscope"`
		Type struct {
			Write *struct{} `xml:"DAV: write"`
		} `xml:"DAV: locktype"`
		Owner *content `xml:"DAV: owner"`
	}
	data, err := io.ReadAll(r)
	if err != nil {
		return k, false, err
	}
	if len(bytes.TrimSpace(data)) == 0 {
		return k, true, nil
	}
	if err := checkXML(data); err != nil {
		return k, false, err
	}
	if err := xml.Unmarshal(data, &in); err != nil {
		return k, false, bad("lock: %w", err)
	}
	if in.Type.Write == nil || (in.Scope.Exclusive == nil) == (in.Scope.Shared == nil) {
		return k, false, &refusal{code: http.StatusUnprocessableEntity, err: errors.New("lock: it is neither an exclusive nor a shared one for writing")}
	}
	k.Shared = in.Scope.Shared != nil
	if in.Owner != nil {
		k.Owner = string(*in.Owner)
	}
	if len(k.Owner) > maxOwner {
		return k, false, &refusal{code: http.StatusRequestEntityTooLarge, err: fmt.Errorf("lock: its owner has more than %d bytes", maxOwner)}
	}
	return k, false, nil
}

// checkXML refuses a body that is no XML, or whose elements are too deep in each other, or which takes a prefix back that it has declared (XML names §5): the
// library does not mind. No body is none of these.
func checkXML(data []byte) error {
	d := xml.NewDecoder(bytes.NewReader(data))
	for depth := 0; ; {
		t, err := d.Token()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return bad("the body is no XML: %w", err)
		}
		switch t := t.(type) {
		case xml.StartElement:
			if depth++; depth > 100 {
				return bad("the body has elements in each other, more than 100 deep")
			}
			for _, a := range t.Attr {
				if a.Name.Space == "xmlns" && a.Value == "" {
					return bad("the body declares prefix %.40q as nothing", a.Name.Local)
				}
			}
		case xml.EndElement:
			depth--
		}
	}
}

// content is what is in an element, as XML that needs no namespace declared around it.
type content string

// UnmarshalXML is for package xml.
func (c *content) UnmarshalXML(d *xml.Decoder, _ xml.StartElement) error {
	var b strings.Builder
	e := xml.NewEncoder(&b)
	for depth := 0; ; {
		t, err := d.Token()
		if err != nil {
			return err
		}
		switch t := t.(type) {
		case xml.EndElement:
			if depth--; depth < 0 {
				if err := e.Flush(); err != nil {
					return err
				}
				*c = content(b.String())
				return nil
			}
			err = e.EncodeToken(t)
		case xml.StartElement:
			depth++
			// Declarations are made anew, where they are needed.
			t.Attr = slices.DeleteFunc(slices.Clone(t.Attr), func(a xml.Attr) bool { return a.Name.Space == "xmlns" || a.Name.Local == "xmlns" })
			err = e.EncodeToken(t)
		case xml.CharData:
			err = e.EncodeToken(t)
		}
		if err != nil {
			return err
		}
	}
}
