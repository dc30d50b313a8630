package rpc

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/cradlestack/cradlestack/csi-plugin/filer/api"
	"github.com/cradlestack/cradlestack/csi-plugin/volume"
)

func TestTranslate(t *testing.T) {
	for _, c := range []struct {
		err  error
		want codes.Code
	}{
		{nil, codes.OK},
		{fmt.Errorf("volume v: %w", volume.ErrNotFound), codes.NotFound},
		{fmt.Errorf("volume v: %w", volume.ErrExists), codes.AlreadyExists},
		{fmt.Errorf("volume v: %w", volume.ErrInUse), codes.FailedPrecondition},
		{fmt.Errorf("volume v: %w", volume.ErrForeign), codes.FailedPrecondition},
		{fmt.Errorf("delete volume v: %w", volume.ErrBusy), codes.Aborted},
		{fmt.Errorf("volume v: %w", volume.ErrNoSpace), codes.ResourceExhausted},
		{fmt.Errorf("volume v: %w", volume.ErrRange), codes.OutOfRange},
		{volume.Invalid("parameter fs", "no"), codes.InvalidArgument},
		{fmt.Errorf("pool p: %w", volume.ErrUnavailable), codes.Unavailable},
		{errors.ErrUnsupported, codes.Unimplemented},
		{context.DeadlineExceeded, codes.DeadlineExceeded},
		{context.Canceled, codes.Canceled},
		{errors.New("else"), codes.Internal},
		{status.Error(codes.Aborted, "already one"), codes.Aborted},
	} {
		if got := status.Code(translate(c.err)); got != c.want {
			t.Errorf("%v: %v; want %v", c.err, got, c.want)
		}
	}
}

func TestPage(t *testing.T) {
	all := []string{"a", "b", "c", "d"}
	id := func(s string) string { return s }
	var got []string
	token := ""
	for range 10 {
		some, next, err := page(all, id, token, 2)
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, some...)
		if token = next; token == "" {
			break
		}
		all = append([]string{"aa"}, all[2:]...) // what is on a page that was read goes, and another comes
	}
	if strings.Join(got, "") != "abcd" {
		t.Errorf("the pages are %v", got)
	}
	if _, _, err := page(all, id, "b", 2); status.Code(err) != codes.Aborted {
		t.Errorf("a token of somebody else's: %v", err)
	}
	if _, _, err := page(all, id, "", -1); status.Code(err) != codes.InvalidArgument {
		t.Errorf("-1 entries: %v", err)
	}
}

// A block volume is on its host; what all hosts of a zone have can be made by any of them, whichever it is for.
func TestReachable(t *testing.T) {
	type at = map[string]string
	for _, c := range []struct {
		wants        at
		local, zonal bool // whether a volume of this host alone, and one of its zone, is reachable there
	}{
		{at{TopologyHost: "a", TopologyZone: "east"}, true, true},
		{at{TopologyHost: "a"}, true, true},
		{at{TopologyZone: "east"}, true, true},
		{at{TopologyHost: "b", TopologyZone: "east"}, false, true},
		{at{TopologyHost: "b"}, false, true},
		{at{TopologyHost: "a", TopologyZone: "west"}, false, false},
		{at{TopologyHost: "b", TopologyZone: "west"}, false, false},
		{at{"topology.example.org/rack": "1"}, false, false},
	} {
		for local, want := range map[bool]bool{true: c.local, false: c.zonal} {
			s := &controller{Server: &Server{config: Config{Backend: fixed{}, NodeID: "a", Zone: "east", Local: local}}}
			wants := &csi.Topology{Segments: c.wants}
			err := s.reachable(&csi.TopologyRequirement{Requisite: []*csi.Topology{{Segments: at{TopologyZone: "north"}}, wants}})
			if got := status.Code(err); got != map[bool]codes.Code{true: codes.OK, false: codes.ResourceExhausted}[want] {
				t.Errorf("%v, on this host alone %t: %v", c.wants, local, err)
			}
			free, err := s.GetCapacity(t.Context(), &csi.GetCapacityRequest{AccessibleTopology: wants, Parameters: at{"pool": "default"}})
			if err != nil || free.GetAvailableCapacity() > 0 != want {
				t.Errorf("%v, on this host alone %t: %v free, %v", c.wants, local, free, err)
			}
		}
	}
}

// What takes longer than its call is done once, and who asks again gets it; the server's end ends it.
func TestComplete(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &Server{config: Config{Log: slog.New(slog.DiscardHandler)}}
		s.lasting, s.end = context.WithCancelCause(t.Context())
		defer s.work.Wait()
		defer s.end(errEnds)
		unlock, err := s.busy.Lock(t.Context(), "v")
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		goOn, first := make(chan struct{}), make(chan error)
		go func() {
			first <- s.complete(ctx, "volume v", unlock, func(ctx context.Context) error {
				select {
				case <-goOn:
				case <-ctx.Done():
				}
				return context.Cause(ctx)
			})
		}()
		cancel()
		if err := <-first; !errors.Is(err, context.Canceled) || status.Code(translate(err)) != codes.Canceled {
			t.Errorf("the first call: %v", err)
		}
		second := make(chan error)
		go func() {
			unlock, err := s.busy.Lock(t.Context(), "v")
			if err == nil {
				err = s.complete(t.Context(), "volume v", unlock, func(ctx context.Context) error {
					<-ctx.Done()
					return context.Cause(ctx)
				})
			}
			second <- err
		}()
		synctest.Wait()
		select {
		case err := <-second:
			t.Errorf("the second call did not wait: %v", err)
		default:
		}
		close(goOn)
		synctest.Wait()
		s.end(errEnds)
		if err := <-second; !errors.Is(err, errEnds) {
			t.Errorf("the server has ended: %v", err)
		}
		synctest.Wait()
		unlock, err = s.busy.Lock(t.Context(), "v") // as both have let go of it
		if err != nil {
			t.Fatal(err)
		}
		unlock()
	})
}

func TestKeeps(t *testing.T) {
	cold := volume.Parameters{Class: volume.LV2, Cold: volume.Retention{Hourly: 24}}
	direct := volume.Parameters{Class: volume.NFS, Direct: true}
	files := volume.Parameters{Class: volume.NFS}
	for _, c := range []struct {
		what string
		c    Config
		r    volume.Request
		want string // "" is kept
	}{
		{"cold", Config{Cold: make(chan struct{})}, volume.Request{Parameters: cold}, ""},
		{"no cold storage", Config{}, volume.Request{Parameters: cold}, "start it with --cold"},
		{"served", Config{Filer: &api.Client{}}, volume.Request{Parameters: direct}, ""},
		{"no filer", Config{}, volume.Request{Parameters: direct}, "start it with --filer"},
		{"from the storage itself", Config{Backend: struct {
			volume.Backend
			volume.Attacher
		}{}}, volume.Request{Parameters: direct}, ""},
		{"a set's", Config{Shared: true}, volume.Request{Parameters: files}, ""},
		{"a set's, with a size", Config{Shared: true}, volume.Request{Size: 1, Parameters: files}, "without a size"},
		{"a set's, with a limit", Config{Shared: true}, volume.Request{Limit: 1, Parameters: files}, "without a size"},
		{"a set's, of blocks", Config{Shared: true}, volume.Request{Parameters: volume.Parameters{Class: volume.LV2}}, "of class nfs or gfs"},
	} {
		err := c.c.Keeps(c.r)
		if (err == nil) != (c.want == "") || err != nil && (!errors.Is(err, volume.ErrInvalid) || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%s: %v; want %q", c.what, err, c.want)
		}
	}
}

func TestMutableParameters(t *testing.T) {
	s := &controller{Server: New(Config{})}
	_, err := s.CreateVolume(t.Context(), &csi.CreateVolumeRequest{Name: "v", MutableParameters: map[string]string{"iops": "5"}})
	if status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), `mutable parameter "iops": volumes have none`) {
		t.Errorf("%v", err)
	}
}

func TestCapabilities(t *testing.T) {
	mounted := func(m mode, fs string, flags ...string) *csi.VolumeCapability {
		return &csi.VolumeCapability{
			AccessMode: &csi.VolumeCapability_AccessMode{Mode: m},
			AccessType: &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{FsType: fs, MountFlags: flags}},
		}
	}
	raw := &csi.VolumeCapability{
		AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER},
		AccessType: &csi.VolumeCapability_Block{Block: &csi.VolumeCapability_BlockVolume{}},
	}
	const (
		one  = csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER
		read = csi.VolumeCapability_AccessMode_MULTI_NODE_READER_ONLY
		many = csi.VolumeCapability_AccessMode_MULTI_NODE_MULTI_WRITER
	)
	block := volume.Volume{ID: "v", Parameters: volume.Parameters{Class: volume.LV2, FS: "ext4"}}
	files := volume.Volume{ID: "v", Parameters: volume.Parameters{Class: volume.NFS}}
	for _, c := range []struct {
		c        *csi.VolumeCapability
		v        volume.Volume
		want     string // "" is accepted
		readOnly bool
	}{
		{mounted(one, ""), block, "", false},
		{mounted(one, "ext4", "noatime"), block, "", false},
		{mounted(one, "ext4", "ro"), block, "", true},
		{mounted(csi.VolumeCapability_AccessMode_SINGLE_NODE_READER_ONLY, ""), block, "", true},
		{raw, block, "", false},
		{mounted(one, "xfs"), block, "its file system is ext4, not xfs", false},
		{mounted(many, ""), block, "class lv2 has no access mode MULTI_NODE_MULTI_WRITER", false},
		{mounted(many, ""), files, "", false},
		{mounted(read, ""), files, "", true},
		{raw, files, "class nfs is of file volumes", false},
		{mounted(one, "", "suid"), block, `mount flag "suid" is not allowed`, false},
		{mounted(one, "", "dev"), block, `mount flag "dev" is not allowed`, false},
		{mounted(one, "", "context=x,ro"), block, `mount flag "context=x,ro" is not allowed`, false},
		{mounted(csi.VolumeCapability_AccessMode_UNKNOWN, ""), block, "it has no access mode", false},
		{&csi.VolumeCapability{AccessMode: raw.AccessMode}, block, "it has no access type", false},
	} {
		w, err := wishFor(c.c, c.v)
		switch {
		case c.want == "" && (err != nil || w.readOnly != c.readOnly):
			t.Errorf("%v: %+v, %v", c.c, w, err)
		case c.want != "" && (status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), c.want)):
			t.Errorf("%v: %v; want %s", c.c, err, c.want)
		}
	}
}

// A socket that nobody serves is replaced, one that somebody does is not, and nothing else is removed.
func TestListen(t *testing.T) {
	path := filepath.Join(t.TempDir(), "cradle", "s")
	l, err := Listen("unix://" + path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(path); err == nil || !strings.Contains(err.Error(), "another program serves it") {
		t.Errorf("a socket in use: %v", err)
	}
	l.Close()
	for _, endpoint := range []string{"", "unix://", "tcp://127.0.0.1:1"} {
		if _, err := Listen(endpoint); err == nil || !strings.Contains(err.Error(), "is no unix socket") {
			t.Errorf("%q: %v", endpoint, err)
		}
	}
}
