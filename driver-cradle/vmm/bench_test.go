//go:build vm

package vmm

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cradlestack/cradlestack/driver-cradle/boot"
)

// BenchmarkVMStart measures the time from Start to the agent's hello, cold and from a template in turns.
func BenchmarkVMStart(b *testing.B) {
	took := map[string][]time.Duration{}
	warm := fromTemplate(b)
	start(b, warm) // makes the template and holds its memory
	for b.Loop() {
		for _, how := range []string{Cold, Template} {
			c := again(b, config(b))
			c.Start = how
			began := time.Now()
			m, err := Start(b.Context(), c)
			if err != nil {
				b.Fatal(err)
			}
			took[how] = append(took[how], time.Since(began))
			m.Kill()
			m.Close()
		}
	}
	for how, d := range took {
		slices.Sort(d)
		b.ReportMetric(float64(d[len(d)/2].Microseconds())/1000, "ms/"+how)
	}
	b.ReportMetric(0, "ns/op")
}

// BenchmarkVMTemplate measures making a template and filling a memory from its file.
func BenchmarkVMTemplate(b *testing.B) {
	var made, hashed, filled time.Duration
	var bytes int64
	n := 0
	for b.Loop() {
		c := ownTemplates(b, fromTemplate(b))
		ts := OpenTemplates(c.CacheDir, c.Log)
		began := time.Now()
		info, err := ts.Build(b.Context(), c)
		if err != nil {
			b.Fatal(err)
		}
		made += time.Since(began)
		os.Remove(filepath.Join(ts.Dir, info.Name, checkedFile)) // Build has filled one already
		for _, sum := range []*time.Duration{&hashed, &filled} {
			began = time.Now()
			f, finish, err := ts.fill(filepath.Join(ts.Dir, info.Name), info)
			if err == nil {
				err = finish()
			}
			if err != nil {
				b.Fatal(err)
			}
			*sum += time.Since(began)
			f.Close()
		}
		bytes = info.RAMBytes
		n++
	}
	b.ReportMetric(float64(made.Milliseconds())/float64(n), "ms/make")
	b.ReportMetric(float64(filled.Microseconds())/1000/float64(n), "ms/fill")
	b.ReportMetric(float64(hashed.Microseconds())/1000/float64(n), "ms/fill-hashed")
	b.ReportMetric(float64(bytes)/(1<<20), "MiB")
	b.ReportMetric(0, "ns/op")
}

// BenchmarkVMIdle measures what an idle machine costs over half a minute: restored in the 256 MiB class, beside a bare QEMU whose
// guest sleeps.
func BenchmarkVMIdle(b *testing.B) {
	const period = 30 * time.Second
	c := fromTemplate(b)
	c.Memory = 180 << 20
	if class(c.Memory) != 256<<20 {
		b.Fatal(class(c.Memory))
	}
	m, second := start(b, again(b, c)), start(b, again(b, c))
	bare := bareQEMU(b)
	pids := map[string]int{"restored": m.Info().PID, "second": second.Info().PID, "bare": bare}
	for b.Loop() {
		time.Sleep(3 * time.Second)
		before := map[string]time.Duration{}
		for name, pid := range pids {
			before[name], _ = cpuTime(pid)
		}
		time.Sleep(period)
		for name, pid := range pids {
			now, err := cpuTime(pid)
			if err != nil {
				b.Fatal(err)
			}
			_, pss, err := residentMemory(pid)
			if err != nil {
				b.Fatal(err)
			}
			b.ReportMetric(float64(now-before[name])/float64(period)*100, "%core/"+name)
			b.ReportMetric(float64(pss)/(1<<20), "MiB/"+name)
		}
	}
	b.ReportMetric(0, "ns/op")
}

// bareQEMU runs the same kernel on the least of a machine, with an agent that sleeps.
func bareQEMU(b *testing.B) (pid int) {
	dir := b.TempDir()
	if err := boot.Build(b.Context(), boot.BuildOptions{
		Kernel: shared.pkg.Kernel(), Agent: shared.dir + "/agent", Variant: boot.VariantDefault, Out: dir + "/boot", Args: []string{"agent=hang"},
	}); err != nil {
		b.Fatal(err)
	}
	p, err := boot.Open(dir + "/boot")
	if err != nil {
		b.Fatal(err)
	}
	khz, err := tscKHz()
	if err != nil {
		b.Fatal(err)
	}
	m := p.Manifest.Machine
	cmd := exec.Command(qemuName, "-nodefaults", "-no-user-config", "-display", "none", "-M", m.Type+","+strings.Join(m.Options, ","),
		"-accel", TCG, "-cpu", cpuModel(TCG), "-m", "256M", "-kernel", p.Kernel(), "-initrd", p.Initramfs(),
		"-append", kernelArgs(p.Manifest.Args, TCG, khz))
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	return cmd.Process.Pid
}
