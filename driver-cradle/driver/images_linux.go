package driver

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/cyphar/filepath-securejoin"
	"github.com/docker/go-units"
	"github.com/hashicorp/nomad/plugins/drivers"
	"golang.org/x/sys/unix"

	"github.com/cradlestack/cradlestack/driver-cradle/image"
	"github.com/cradlestack/cradlestack/driver-cradle/pod"
	"github.com/cradlestack/cradlestack/spec"
)

// summon pulls the pod's images and makes its directory.
func (d *Driver) summon(ctx context.Context, t *drivers.TaskConfig, cfg *taskConfig, p *spec.Pod, o starting) (*pod.Dir, error) {
	timeout, err := parseDuration(cfg.PullTimeout, o.config.pullTimeout)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, timeout, fmt.Errorf("the images were not there within %v (image_pull_timeout)", timeout))
	defer cancel()
	keys, err := o.config.keychain(cfg.Auth)
	if err != nil {
		return nil, err
	}
	disk := ""
	if cfg.DiskID != "" {
		disk = o.state.disks.path(diskOf(t, cfg.DiskID))
	}
	progress := d.newProgress(t)
	telling, told := context.WithCancel(ctx)
	var teller sync.WaitGroup
	teller.Go(func() { progress.tell(telling) })
	owner := ""
	if cfg.Auth != nil {
		owner = t.Namespace
	}
	made, err := pod.Summon(ctx, filepath.Join(o.dir, podDir), p, pod.SummonOptions{
		Images: o.state.images, Boot: o.boot, Log: d.log, ID: cfg.ID, Disk: disk,
		Pull: image.PullOptions{
			Keychain: keys, Insecure: o.config.Insecure, Mirrors: o.config.mirrors(), Force: cfg.ForcePull, Owner: owner, Progress: progress.report,
		},
	})
	told()
	teller.Wait()
	if err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		if errors.Is(err, image.ErrUnauthorized) {
			err = fmt.Errorf("%w on the client, or name them in the task's auth {} block", err)
		}
		if invalid := (*spec.Error)(nil); errors.As(err, &invalid) { // the image lacks what the task does not say
			return nil, fmt.Errorf("config: %w", translate(p, err))
		}
		err = fmt.Errorf("prepare the pod: %w", err)
		if transient(err) {
			err = recoverable(err)
		}
		return nil, err
	}
	progress.end()
	return made, nil
}

// joining is where containers that join a task's pod while it runs have their images from, as the task's own: what they bring for the registry comes first.
func joining(t *drivers.TaskConfig, c *config, s *state) *pod.Joining {
	return &pod.Joining{Images: s.images, Pull: func(a *spec.JoinAuth) (image.PullOptions, error) {
		var auth *taskAuth
		owner := ""
		if a != nil {
			auth, owner = &taskAuth{Username: a.Username, Password: a.Password}, t.Namespace
		}
		keys, err := c.keychain(auth)
		return image.PullOptions{Keychain: keys, Insecure: c.Insecure, Mirrors: c.mirrors(), Owner: owner}, err
	}}
}

// transient says whether trying again may help without anybody doing something: it is on Nomad's restart policy then.
func transient(err error) bool {
	return !errors.Is(err, image.ErrPlatform) && !errors.Is(err, pod.ErrUnfit) && !errors.Is(err, image.ErrRefused) && !errors.Is(err, image.ErrTooLarge)
}

// A progress tells Nomad's users how a pull goes that takes a while: that it began, how far it is now and then, that it is done.
type progress struct {
	d     *Driver
	task  *drivers.TaskConfig
	begun time.Time

	mu       sync.Mutex
	answered bool                      // whether it is known which layers there are
	layers   map[string]image.Progress // those that were not there at once
}

func (d *Driver) newProgress(t *drivers.TaskConfig) *progress {
	return &progress{d: d, task: t, begun: now(), layers: map[string]image.Progress{}}
}

// When users hear of a pull, and how often. Nomad keeps only ten events of a task.
const (
	progressDelay  = 2 * time.Second
	progressPeriod = 30 * time.Second
)

func (p *progress) report(l image.Progress) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.answered = true
	if _, known := p.layers[l.Layer]; known || l.Phase != image.Ready {
		p.layers[l.Layer] = l
	}
}

// tell tells how far the pull is, also where nothing comes, until ctx ends.
func (p *progress) tell(ctx context.Context) {
	for wait := progressDelay; ; wait = progressPeriod {
		select {
		case <-time.After(wait):
			if text := p.text(); text != "" {
				p.d.emit(p.task, "Pulling images: "+text)
			}
		case <-ctx.Done():
			return
		}
	}
}

// text sums up what is known, "" where there is nothing to wait for.
func (p *progress) text() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case !p.answered:
		return "waiting for an answer"
	case len(p.layers) == 0:
		return ""
	}
	var ready, elsewhere int
	var done, total int64
	for _, l := range p.layers {
		switch l.Phase {
		case image.Ready:
			ready++
		case image.Waiting:
			elsewhere++
		case image.Downloading:
			done, total = done+l.Done, total+l.Total
		}
	}
	text := fmt.Sprintf("%d of %d layers are there", ready, len(p.layers))
	if total > 0 {
		text += fmt.Sprintf(", %s of %s of the others", units.BytesSize(float64(done)), units.BytesSize(float64(total)))
	}
	if elsewhere > 0 {
		text += fmt.Sprintf(", %d just being pulled for another task", elsewhere)
	}
	return text
}

// end tells that everything is there, if there was something to wait for.
func (p *progress) end() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.layers) > 0 {
		p.d.emit(p.task, fmt.Sprintf("Pulled images in %v", now().Sub(p.begun).Round(100*time.Millisecond)))
	}
}

// collectPeriod is how often images are looked at.
const collectPeriod = 10 * time.Minute

// collectImages removes images that were not used for long, or do not fit into what they may take. Those of pods stay.
func (d *Driver) collectImages(c *config, s *state) {
	if !enabled(c.GC.Image, true) {
		return
	}
	period := min(collectPeriod, max(c.imageDelay, time.Second))
	for {
		select {
		case <-time.After(period):
		case <-d.ctx.Done():
			return
		}
		d.collect(c, s)
	}
}

// collect does so once.
func (d *Driver) collect(c *config, s *state) {
	report, err := s.images.GC(d.ctx, image.GCOptions{MaxAge: max(c.imageDelay, 1), MaxSize: int64(c.imageSize)})
	if err != nil && d.ctx.Err() == nil {
		d.log.Error("collect images", "error", err)
	}
	if len(report.Images) > 0 {
		d.log.Info("removed images that no task uses", "images", report.Images, "freed", units.BytesSize(float64(report.Freed)))
	}
}

// examine tells what is at a path of the host.
func examine(path string) (pathKind, error) {
	fi, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return 0, fmt.Errorf("%s does not exist on this client", path)
	case err != nil:
		return 0, err
	case fi.IsDir():
		return aDirectory, nil
	case fi.Mode().IsRegular():
		return aFile, nil
	case fi.Mode()&os.ModeDevice != 0 && fi.Mode()&os.ModeCharDevice == 0:
		return aBlockDevice, nil
	}
	return 0, fmt.Errorf("%s is neither a directory nor a file nor a block device", path)
}

// maxEnv bounds a file of environment variables: the kernel takes no more for a program (execve(2)).
const maxEnv = 2 << 20

// readEnv reads a JSON list of variables. Tasks may have put anything there.
func readEnv(root, path string) ([]string, error) {
	dir, err := os.OpenRoot(root)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	f, err := dir.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxEnv+1))
	if err != nil {
		return nil, err
	}
	if len(data) > maxEnv {
		return nil, fmt.Errorf("%s has more than %s", path, units.BytesSize(maxEnv))
	}
	var env []string
	if err := json.Unmarshal(data, &env); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return env, nil
}

// within finds path below root, where tasks write: symbolic links do not lead out of it.
func within(root, path string) (string, error) {
	found, err := securejoin.SecureJoin(root, path)
	if err == nil {
		_, err = examine(found)
	}
	return found, err
}
