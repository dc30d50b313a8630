package driver

import (
	"context"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cradlestack/cradlestack/driver-cradle/image"
)

// Users hear of a pull that takes its time, now and then, and that it is done; of what is there, nothing.
func TestProgress(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := New(hclogNull).(*Driver)
		defer d.Close()
		events, err := d.TaskEvents(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		told := func() (all []string) {
			for {
				synctest.Wait()
				select {
				case e := <-events:
					if e.TaskID != "alloc/t/1" || e.AllocID != "alloc" || e.TaskName != "t" {
						t.Errorf("the event is of %+v", e)
					}
					all = append(all, e.Message)
				default:
					return all
				}
			}
		}
		is := func(want ...string) {
			t.Helper()
			if got := told(); !slices.Equal(got, want) {
				t.Errorf("Nomad is told %q, want %q", got, want)
			}
		}
		p := d.newProgress(aTaskConfig("alloc/t/1", "alloc", "t"))
		p.report(image.Progress{Layer: "a", Phase: image.Ready})
		p.end()
		is()
		p = d.newProgress(aTaskConfig("alloc/t/1", "alloc", "t"))
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		go p.tell(ctx)
		time.Sleep(progressDelay - time.Second)
		is()
		time.Sleep(time.Second)
		is("Pulling images: waiting for an answer")
		p.report(image.Progress{Layer: "a", Phase: image.Ready}) // was there
		time.Sleep(progressPeriod)
		is()
		p.report(image.Progress{Layer: "b", Phase: image.Downloading, Done: 1 << 10, Total: 4 << 10})
		p.report(image.Progress{Layer: "c", Phase: image.Downloading, Done: 0, Total: 4 << 10})
		p.report(image.Progress{Layer: "d", Phase: image.Waiting})
		is()
		time.Sleep(progressPeriod)
		is("Pulling images: 0 of 3 layers are there, 1KiB of 8KiB of the others, 1 just being pulled for another task")
		p.report(image.Progress{Layer: "b", Phase: image.Ready})
		p.report(image.Progress{Layer: "c", Phase: image.Converting, Done: 1, Total: 2})
		p.report(image.Progress{Layer: "d", Phase: image.Ready})
		time.Sleep(progressPeriod)
		is("Pulling images: 2 of 3 layers are there")
		cancel()
		p.end()
		is("Pulled images in 1m32s")
	})
}
