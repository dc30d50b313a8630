package driver

import (
	"context"
	"fmt"
	"os"
	"time"

	"github.com/hashicorp/nomad/plugins/drivers"
	"github.com/hashicorp/nomad/plugins/shared/structs"

	"github.com/cradlestack/cradlestack/driver-cradle/vmm"
)

// fingerprintPeriod is how often the host is looked at.
const fingerprintPeriod = 30 * time.Second

// Fingerprint tells, now and then, whether this host can run pods, and what they get here. A client asks as long as it is there.
func (d *Driver) Fingerprint(ctx context.Context) (<-chan *drivers.Fingerprint, error) {
	ch := make(chan *drivers.Fingerprint)
	begun := now()
	d.mu.Lock()
	d.client = begun
	d.mu.Unlock()
	d.work.Go(func() {
		defer func() {
			d.mu.Lock()
			defer d.mu.Unlock()
			if d.client.Equal(begun) { // else another client has come
				d.client = time.Time{}
			}
		}()
		defer close(ch)
		timer := time.NewTimer(0)
		defer timer.Stop()
		for {
			select {
			case <-timer.C:
				timer.Reset(fingerprintPeriod)
			case <-ctx.Done():
				return
			case <-d.ctx.Done():
				return
			}
			select {
			case ch <- d.fingerprint(ctx):
			case <-ctx.Done():
				return
			case <-d.ctx.Done():
				return
			}
		}
	})
	return ch, nil
}

func (d *Driver) fingerprint(ctx context.Context) *drivers.Fingerprint {
	attributes, err := d.examineHost(ctx)
	fp := &drivers.Fingerprint{Attributes: attributes, Health: drivers.HealthStateHealthy, HealthDescription: drivers.DriverHealthy}
	if err != nil {
		fp.Health, fp.HealthDescription = drivers.HealthStateUnhealthy, err.Error()
	}
	return fp
}

// examineHost tells what pods get on this host; the error is what keeps them from running.
func (d *Driver) examineHost(ctx context.Context) (map[string]*structs.Attribute, error) {
	attributes := map[string]*structs.Attribute{}
	text := func(name, value string) {
		if value != "" {
			attributes["driver.cradle."+name] = structs.NewStringAttribute(value)
		}
	}
	attributes["driver.cradle"] = structs.NewBoolAttribute(true)
	text("version", Version)
	if os.Geteuid() != 0 {
		return attributes, fmt.Errorf("the Nomad client does not run as root: pods need namespaces, taps and disks")
	}
	c, _, err := d.open()
	if err != nil {
		return attributes, err
	}
	attributes["driver.cradle.volumes.enabled"] = structs.NewBoolAttribute(c.Volumes.Enabled)
	_, version, err := vmm.FindQEMU(ctx, c.CacheDir)
	if err != nil {
		return attributes, err
	}
	text("qemu.version", version)
	accel, why, err := vmm.Accelerator(c.Accelerator, c.CacheDir)
	if err != nil {
		return attributes, err
	}
	text("accelerator", accel)
	text("accelerator.reason", why)
	pkg, err := c.boot()
	if err != nil {
		return attributes, err
	}
	text("boot.digest", pkg.Digest)
	text("boot.variant", pkg.Manifest.Variant)
	return attributes, nil
}
