package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/gob"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/nomad/api"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/csi-plugin/mount"
	"github.com/cradlestack/cradlestack/csi-plugin/rpc"
	"github.com/cradlestack/cradlestack/csi-plugin/tree"
	"github.com/cradlestack/cradlestack/csi-plugin/volume"
	"github.com/cradlestack/cradlestack/spec"
)

func (c *cli) copyCommand() *cobra.Command {
	m := &move{c: c}
	cmd := &cobra.Command{
		Use: "copy VOLUME --as NEW", Short: "copy a volume's files to a new volume, of another class or in another zone", Args: cobra.ExactArgs(1),
		Long: `Copy a volume's files to a new volume, which may be of another class, in another zone or on another node. What has arrived is read and compared until
nothing differs; then Nomad is told of the new volume. The former one stays as it is, and nobody may use it meanwhile.

Interrupted, the same command goes on where it was. Nomad's address and token are in NOMAD_ADDR, NOMAD_TOKEN and so on.`,
		RunE: func(cmd *cobra.Command, args []string) error { return m.run(cmd.Context(), args[0]) },
	}
	f := cmd.Flags()
	f.StringVar(&m.as, "as", "", "name of the new volume")
	f.StringVar(&m.class, "class", "", "its class: nfs, lv2, gfs (default: the volume's)")
	f.StringVar(&m.size, "size", "", "its size: 10GiB (default: the volume's)")
	f.StringVar(&m.zone, "zone", "", "the zone that it is to be in (default: the node that has the volume)")
	f.StringVar(&m.to, "to", "", "the node that it is to be on, by name")
	f.StringVar(&m.plugin, "plugin", "", "the plugin that is to have it, by its id in Nomad (default: the volume's, or any on the node)")
	f.StringVar(&m.namespace, "namespace", env("NOMAD_NAMESPACE", api.DefaultNamespace), "the namespace of both ($NOMAD_NAMESPACE)")
	_ = cmd.MarkFlagRequired("as")
	cmd.AddCommand(c.copyParts()...)
	return cmd
}

// A move of a volume's files to a new volume.
type move struct {
	c                                            *cli
	as, class, size, zone, to, plugin, namespace string
}

// passes is how often what has arrived is compared. Where nobody writes to the volume the second time nothing differs.
const passes = 5

func (m *move) run(ctx context.Context, id string) error {
	if err := volume.CheckName("--as", m.as); err != nil {
		return err
	}
	n, err := openNomad(m.c, m.namespace)
	if err != nil {
		return err
	}
	defer n.client.Close()
	v, err := n.registered(ctx, id)
	if err != nil {
		return err
	}
	if v == nil {
		return n.unknown(id)
	}
	if err := volume.CheckName("volume "+id+": what the plugin calls it", stored(v, id)); err != nil { // it becomes an argument
		return err
	}
	from, err := n.placeOf(ctx, v)
	if err != nil {
		return err
	}
	to := from
	if m.zone != "" && from.zone() != m.zone || m.to != "" || m.plugin != "" && m.plugin != from.plugin {
		if to, err = n.placeAt(ctx, m.to, m.zone, m.plugin); err != nil {
			return err
		}
	}
	if err := n.unused(ctx, v); err != nil {
		return err
	}
	c, err := m.creation(ctx, n, to, v)
	if err != nil {
		return err
	}
	if now, err := n.registered(ctx, m.as); err != nil {
		return err
	} else if now != nil {
		if err := n.unused(ctx, now); err != nil {
			return err
		}
		switch was, err := m.ask(ctx, n, to, "where"); {
		case err != nil:
			return err
		case was.Of != c.Of: // it may be on another node
			return noCopy(m.as)
		case was.Whole: // a call was interrupted just before its end; jobs may have written to the volume since, of which nothing is changed
			return m.done(ctx, n, to, v.ID, c, tree.Changes{})
		}
	}
	var sent tree.Changes
	for range passes {
		var differed tree.Changes
		err := n.unlessCut(ctx, func() (err error) {
			differed, err = m.pass(ctx, n, from, to, stored(v, id), c)
			return err
		})
		if err != nil {
			return err
		}
		sent.Entries, sent.Bytes = sent.Entries+differed.Entries, sent.Bytes+differed.Bytes
		if differed == (tree.Changes{}) {
			return m.end(ctx, n, to, v, c, sent)
		}
	}
	return fmt.Errorf("volume %s: after %d passes it still differs from %s: does somebody write to that?", m.as, passes, id)
}

// A creation is what the node has to know of the new volume.
type creation struct {
	Of         string            `json:"of"` // the volume whose files it gets
	Size       int64             `json:"size"`
	Generation int               `json:"generation"`
	Parameters map[string]string `json:"parameters"`
}

// creation is the new volume's: what the former one's creator chose, as far as the class has it.
func (m *move) creation(ctx context.Context, n *nomad, to *place, v *api.CSIVolume) (c creation, err error) {
	chosen := v.Context
	if len(chosen) == 0 {
		chosen = v.Parameters
	}
	p, err := volume.ParseParameters(chosen)
	if err != nil {
		return c, fmt.Errorf("volume %s: %w", v.ID, err)
	}
	if p.Direct {
		return c, fmt.Errorf("volume %s: its file system is a guest's, which no host mounts: copy its files in a pod that has both volumes", v.ID)
	}
	class := cmp.Or(m.class, p.Class)
	if class != p.Class {
		p = volume.Parameters{Class: class, Snapshots: p.Snapshots}
	}
	p.Pool = ""
	c = creation{Of: stored(v, v.ID), Size: v.Capacity, Parameters: p.Map()}
	if _, err := volume.ParseParameters(c.Parameters); err != nil {
		return c, err
	}
	if m.size != "" {
		size, err := spec.ParseBytes(m.size)
		if err != nil {
			return c, fmt.Errorf("--size: %w", err)
		}
		c.Size = int64(size)
	}
	if p.Block() && c.Size == 0 {
		return c, fmt.Errorf("volume %s has no size, and a block volume needs one: write --size", v.ID)
	}
	o, err := readOwner(ctx, n.client, to.alloc.Namespace, m.as)
	c.Generation = o.Generation
	return c, err
}

// pass makes the new volume like the former one, and tells in what it was not.
func (m *move) pass(ctx context.Context, n *nomad, from, to *place, id string, new creation) (c tree.Changes, err error) {
	text, err := json.Marshal(new)
	if err != nil {
		return c, err
	}
	var has, changes bytes.Buffer
	if err := n.exec(ctx, to, nil, &has, "copy", "list", m.as, "--new", string(text)); err != nil {
		return c, err
	}
	r, w := io.Pipe()
	received := make(chan error, 1)
	go func() {
		err := n.exec(ctx, to, r, &changes, "copy", "receive", m.as, "--of", new.Of)
		r.CloseWithError(cmp.Or(err, io.ErrClosedPipe)) // the sender need not go on
		received <- err
	}()
	err = n.exec(ctx, from, &has, w, "copy", "send", id)
	w.CloseWithError(err)
	if err = cmp.Or(<-received, err); err == nil {
		err = json.Unmarshal(changes.Bytes(), &c)
	}
	return c, err
}

// end tells Nomad of the volume, and then the volume that it is whole.
func (m *move) end(ctx context.Context, n *nomad, to *place, v *api.CSIVolume, c creation, sent tree.Changes) error {
	want := *v
	want.ID, want.Name, want.ExternalID, want.Capacity, want.RequestedCapacityMin, want.RequestedCapacityMax = m.as, m.as, m.as, c.Size, c.Size, 0
	if c.Parameters["class"] != v.Context["class"] {
		want.MountOptions, want.RequestedCapabilities = nil, capabilities(c.Parameters["class"])
	}
	at, err := m.ask(ctx, n, to, "whole", "--of", c.Of)
	want.Parameters, want.Context = c.has(at.Parameters)
	var now *api.CSIVolume
	if err == nil {
		now, err = n.registered(ctx, m.as)
	}
	if err == nil {
		err = n.register(ctx, now, to.knows(&want, at.Local))
	}
	if err == nil {
		err = m.done(ctx, n, to, v.ID, c, sent)
	}
	return err
}

// has is how Nomad is to know the new volume: what it was to be, without what its backend has not, and what it is.
func (c creation) has(is map[string]string) (parameters, context map[string]string) {
	if len(is) == 0 { // the plugin there is of before
		return c.Parameters, c.Parameters
	}
	parameters = maps.Clone(c.Parameters)
	maps.DeleteFunc(parameters, func(name, value string) bool { return is[name] != value })
	return parameters, is
}

// done lets go of a volume that Nomad knows, and that is whole.
func (m *move) done(ctx context.Context, n *nomad, to *place, from string, c creation, sent tree.Changes) error {
	if err := n.exec(ctx, to, nil, io.Discard, "copy", "end", m.as, "--of", c.Of); err != nil {
		return err
	}
	fmt.Fprintf(m.c.stdout, "volume %s on node %s has what %s has: %d files and directories, %v were sent\n", m.as, to.node.Name, from, sent.Entries, spec.Bytes(sent.Bytes))
	return nil
}

// ask runs a part that says how a volume is.
func (m *move) ask(ctx context.Context, n *nomad, to *place, part string, more ...string) (l located, err error) {
	var out bytes.Buffer
	err = n.exec(ctx, to, nil, &out, append([]string{"copy", part, m.as}, more...)...)
	if err == nil {
		err = json.Unmarshal(out.Bytes(), &l)
	}
	return l, err
}

// A located says where a volume can be used, and of which one it is a copy.
type located struct {
	Local bool   `json:"local"` // on its node alone
	Of    string `json:"of"`    // "" where no copy was begun, or the last one has come to its end
	Whole bool   `json:"whole"` // it has all that the other one had

	Parameters map[string]string `json:"parameters,omitempty"` // of one that is whole
}

// capabilities of a class whose files a host mounts.
func capabilities(class string) (all []*api.CSIVolumeCapability) {
	modes := []api.CSIVolumeAccessMode{api.CSIVolumeAccessModeSingleNodeWriter, api.CSIVolumeAccessModeSingleNodeReader}
	if class != volume.LV2 {
		modes = append(modes, api.CSIVolumeAccessModeMultiNodeReader, api.CSIVolumeAccessModeMultiNodeSingleWriter, api.CSIVolumeAccessModeMultiNodeMultiWriter)
	}
	for _, mode := range modes {
		all = append(all, &api.CSIVolumeCapability{AccessMode: mode, AttachmentMode: api.CSIVolumeAttachmentModeFilesystem})
	}
	return all
}

// copyParts are what copy runs on the nodes, each for one volume of the plugin's.
func (c *cli) copyParts() (all []*cobra.Command) {
	for _, part := range []struct {
		name, short string
		do          func(ctx context.Context, b volume.Backend, id, of string, stdin io.Reader) error
	}{
		{"send", "write what makes a volume like this one that has what is listed on standard input", c.copySend},
		{"receive", "make a volume like the one that is sent on standard input", c.copyReceive},
		{"where", "say where a volume can be used, and whether it is whole", c.copyWhere},
		{"whole", "a volume has all that is to be copied", c.copyWhole},
		{"end", "let go of a volume that is whole", c.copyEnd},
	} {
		var of string
		cmd := c.copyPart(part.name, part.short, func(ctx context.Context, b volume.Backend, id string, stdin io.Reader) error {
			return part.do(ctx, b, id, of, stdin)
		})
		cmd.Flags().StringVar(&of, "of", "", "the volume that is copied")
		all = append(all, cmd)
	}
	var text string
	list := c.copyPart("list", "make a new volume, should there be none, and list what is in it", func(ctx context.Context, b volume.Backend, id string, _ io.Reader) error {
		var n creation
		if err := json.Unmarshal([]byte(text), &n); err != nil {
			return fmt.Errorf("--new: %w", err)
		}
		return c.copyList(ctx, b, id, n)
	})
	list.Flags().StringVar(&text, "new", "", "what it is, JSON")
	return append(all, list)
}

func (c *cli) copyPart(name, short string, do func(ctx context.Context, b volume.Backend, id string, stdin io.Reader) error) *cobra.Command {
	var endpoint string
	cmd := &cobra.Command{
		Use: name + " VOLUME", Short: short, Args: cobra.ExactArgs(1), Hidden: true,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := c.as(endpoint); err != nil {
				return err
			}
			b, local, err := c.open(cmd.Context())
			if err != nil {
				return err
			}
			defer b.Close()
			c.local = local
			stop := keepAlive(c.stderr)
			defer stop()
			return do(cmd.Context(), b, args[0], cmd.InOrStdin())
		},
	}
	cmd.Flags().StringVar(&endpoint, "endpoint", defaultEndpoint(), "of the plugin")
	return cmd
}

// keepAlive lets Nomad see whether somebody still listens to a command: it looks when that writes, and ends it where nobody does.
func keepAlive(stderr io.Writer) (stop func()) {
	done := make(chan struct{})
	var g sync.WaitGroup
	g.Go(func() {
		t := time.NewTicker(time.Second)
		defer t.Stop()
		for {
			select {
			case <-t.C:
				_, _ = stderr.Write([]byte{alive})
			case <-done:
				return
			}
		}
	})
	return func() { close(done); g.Wait() }
}

// alive is what keepAlive writes, and exec takes out again.
const alive = 0

// unfinished is in a volume that copy has not completed, and that it may therefore change.
const unfinished = ".cradle-copy"

// without is what is not copied.
var without = []string{unfinished, "lost+found"}

// files opens the root directory of a volume.
func files(ctx context.Context, b volume.Backend, id string, readOnly bool, do func(*os.Root) error) (err error) {
	source, err := b.Stage(ctx, id, volume.Use{As: volume.AsFiles})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.Unstage(context.WithoutCancel(ctx), id)) }()
	var root *os.Root
	if source.Device != "" {
		var tree mount.Tree
		if tree, err = mount.Detached(source.Device, source.FSType, readOnly); err == nil {
			root, err = tree.Root()
		}
	} else {
		root, err = os.OpenRoot(source.Directory)
	}
	if err != nil {
		return err
	}
	return errors.Join(do(root), root.Close())
}

func (c *cli) copyList(ctx context.Context, b volume.Backend, id string, n creation) error {
	p, err := volume.ParseParameters(n.Parameters)
	if err != nil {
		return err
	}
	_, err = b.Get(ctx, id)
	if errors.Is(err, volume.ErrNotFound) {
		r := volume.Request{Name: id, Size: n.Size, Generation: n.Generation, Parameters: p}
		var storage string
		if storage, err = c.storage(ctx, b); err == nil {
			suit(storage, &r)
			err = c.keeps(b, r)
		}
		if err == nil {
			_, err = b.Create(ctx, r)
		}
	}
	if err != nil {
		return err
	}
	return files(ctx, b, id, false, func(root *os.Root) error {
		return alone(ctx, root, id, n.Of, true, func(*os.File) error {
			all, err := tree.List(ctx, root, ".", without...)
			if err != nil {
				return err
			}
			return gob.NewEncoder(c.stdout).Encode(all)
		})
	})
}

// keeps is what the plugin itself says of a volume that is to be made.
func (c *cli) keeps(b volume.Backend, r volume.Request) error {
	f, shared, err := c.filer.client()
	if err != nil {
		return err
	}
	plugin := rpc.Config{Backend: b, Filer: f, Shared: shared && c.backend != onFiler}
	if c.cold.where != "" {
		plugin.Cold = make(chan struct{})
	}
	return plugin.Keeps(r)
}

func noCopy(id string) error {
	return fmt.Errorf("volume %s: it is there, and no copy that was begun; choose another name with --as", id)
}

// nothing says whether a volume has no files yet.
func nothing(root *os.Root) (bool, error) {
	d, err := root.Open(".")
	if err != nil {
		return false, err
	}
	defer d.Close()
	names, err := d.Readdirnames(-1)
	return !slices.ContainsFunc(names, func(name string) bool { return !slices.Contains(without, name) }), err
}

// marked reads unfinished: of which volume it is a copy, and whether it is whole. A call that was killed may have left it without the end of its first line, and then nothing else.
func marked(text string) (of string, whole bool) {
	of, rest, _ := strings.Cut(text, "\n")
	return of, rest == wholeLine
}

// wholeLine is the second line of unfinished.
const wholeLine = "whole\n"

// alone runs do once no other part works on a volume: one whose command was killed is ended by Nomad a little later. of is the volume that is copied; one in which there is nothing
// is begun where begin says so.
func alone(ctx context.Context, root *os.Root, id, of string, begin bool, do func(mark *os.File) error) error {
	none := noCopy(id)
	flags := os.O_RDWR
	if begin {
		blank, err := nothing(root)
		if err != nil {
			return err
		}
		if blank {
			flags |= os.O_CREATE
		}
	}
	f, err := root.OpenFile(unfinished, flags, 0o600)
	if errors.Is(err, fs.ErrNotExist) {
		return none
	}
	if err != nil {
		return err
	}
	defer f.Close()
	for {
		err := unix.FcntlFlock(f.Fd(), unix.F_SETLK, &unix.Flock_t{Type: unix.F_WRLCK})
		if err == nil {
			break
		}
		if !errors.Is(err, unix.EAGAIN) {
			return fmt.Errorf("volume %s: lock %s: %w", id, unfinished, err)
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(10 * time.Millisecond):
		}
	}
	mine, err := f.Stat()
	if err != nil {
		return err
	}
	if now, err := root.Lstat(unfinished); errors.Is(err, fs.ErrNotExist) || err == nil && !os.SameFile(mine, now) {
		return none // it came to its end meanwhile
	} else if err != nil {
		return err
	}
	text, err := io.ReadAll(f)
	if err != nil {
		return err
	}
	if begin && !bytes.ContainsRune(text, '\n') {
		blank, err := nothing(root)
		switch {
		case err == nil && blank:
			text = []byte(of + "\n")
			err = start(root, f, text)
		case err == nil && len(text) == 0: // it came to its end as this was about to begin one
			err = root.Remove(unfinished)
		}
		if err != nil {
			return err
		}
	}
	switch was, _ := marked(string(text)); {
	case was == "":
		return none
	case was != of:
		return fmt.Errorf("volume %s: a copy of volume %s was begun; choose another name with --as", id, was)
	}
	return do(f)
}

// start marks a volume in which there is nothing. mkfs's directory goes: programs want a new volume to be empty.
func start(root *os.Root, mark *os.File, text []byte) error {
	if err := root.Remove("lost+found"); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := mark.Truncate(0); err != nil {
		return err
	}
	_, err := mark.WriteAt(text, 0)
	return err
}

func (c *cli) copySend(ctx context.Context, b volume.Backend, id, _ string, stdin io.Reader) error {
	var theirs []tree.Entry
	if err := gob.NewDecoder(stdin).Decode(&theirs); err != nil {
		return err
	}
	return files(ctx, b, id, true, func(root *os.Root) error {
		out := bufio.NewWriterSize(c.stdout, 64<<10)
		return errors.Join(tree.Send(ctx, root, ".", theirs, out, without...), out.Flush())
	})
}

func (c *cli) copyReceive(ctx context.Context, b volume.Backend, id, of string, stdin io.Reader) error {
	return files(ctx, b, id, false, func(root *os.Root) error {
		return alone(ctx, root, id, of, false, func(mark *os.File) error {
			_, err := mark.WriteAt([]byte("\n"), int64(len(of)))
			if err == nil {
				err = mark.Truncate(int64(len(of) + 1)) // it may be whole no more
			}
			var changes tree.Changes
			if err == nil {
				changes, err = tree.Receive(ctx, root, stdin)
			}
			if err == nil {
				err = mount.SyncRoot(root)
			}
			if err != nil {
				return fmt.Errorf("volume %s: %w", id, err)
			}
			return json.NewEncoder(c.stdout).Encode(changes)
		})
	})
}

func (c *cli) copyWhere(ctx context.Context, b volume.Backend, id, _ string, _ io.Reader) error {
	at := located{Local: c.local}
	err := files(ctx, b, id, true, func(root *os.Root) error {
		text, err := root.ReadFile(unfinished)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		at.Of, at.Whole = marked(string(text))
		return err
	})
	if err != nil && !errors.Is(err, volume.ErrNotFound) {
		return err
	}
	return json.NewEncoder(c.stdout).Encode(at)
}

func (c *cli) copyWhole(ctx context.Context, b volume.Backend, id, of string, _ io.Reader) error {
	err := files(ctx, b, id, false, func(root *os.Root) error {
		return alone(ctx, root, id, of, false, func(mark *os.File) error {
			_, err := mark.WriteAt([]byte(of+"\n"+wholeLine), 0)
			return errors.Join(err, mark.Sync())
		})
	})
	if err != nil {
		return err
	}
	v, err := b.Get(ctx, id)
	if err != nil {
		return err
	}
	return json.NewEncoder(c.stdout).Encode(located{Local: c.local, Of: of, Whole: true, Parameters: v.Map()})
}

func (c *cli) copyEnd(ctx context.Context, b volume.Backend, id, of string, _ io.Reader) error {
	return files(ctx, b, id, false, func(root *os.Root) error {
		return alone(ctx, root, id, of, false, func(*os.File) error {
			return errors.Join(root.Remove(unfinished), mount.SyncRoot(root))
		})
	})
}
