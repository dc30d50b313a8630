//go:build vm

package vdocker_test

import (
	"archive/tar"
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/moby/moby/client"
)

// BenchmarkVMCopy moves 256 MB through the bare control stream, through vdocker's archive calls, and with docker cp, one after the
// other in each round. The last two are told as a share of the first's speed (median of the rounds), and what each costs the VM's
// process is told in processor seconds.
func BenchmarkVMCopy(b *testing.B) {
	const size = 256 << 20
	p := thePod(b)
	c := dockerClient(b, p)
	file := filepath.Join(b.TempDir(), "file")
	data := make([]byte, size)
	for i := range data {
		data[i] = byte(i*7 + i>>8 + 1)
	}
	if err := os.WriteFile(file, data, 0o644); err != nil {
		b.Fatal(err)
	}
	ways := map[string][3]func() error{
		"in": {
			func() error { return rawStream(b, p, data, size, 0) },
			func() error {
				r, w := io.Pipe()
				go func() {
					t := tar.NewWriter(w)
					t.WriteHeader(&tar.Header{Name: "file", Typeflag: tar.TypeReg, Size: size, Mode: 0o644})
					t.Write(data)
					w.CloseWithError(t.Close())
				}()
				_, err := c.CopyToContainer(b.Context(), "more", client.CopyToContainerOptions{DestinationPath: "/root", Content: r})
				return err
			},
			func() error { return cli(b, p, "cp", file, "more:/root/file") },
		},
		"out": {
			func() error { return rawStream(b, p, data, 0, size) },
			func() error {
				r, err := c.CopyFromContainer(b.Context(), "more", client.CopyFromContainerOptions{SourcePath: "/root/file"})
				if err != nil {
					return err
				}
				defer r.Content.Close()
				n, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, r.Content, make([]byte, 1<<20))
				if n < size {
					return fmt.Errorf("%d bytes: %w", n, err)
				}
				return err
			},
			func() error { return cli(b, p, "cp", "more:/root/file", file) },
		},
	}
	for _, direction := range []string{"in", "out"} {
		b.Run(direction, func(b *testing.B) {
			var ratios [3][]float64
			var cost [3]float64
			for b.Loop() {
				var took [3]time.Duration
				for i, f := range ways[direction] {
					cpu, begin := processorTime(b, p.Info().PID), time.Now()
					if err := f(); err != nil {
						b.Fatal(err)
					}
					took[i] = time.Since(begin)
					cost[i] += processorTime(b, p.Info().PID) - cpu
					ratios[i] = append(ratios[i], took[0].Seconds()/took[i].Seconds())
				}
				b.Logf("raw %v, archive %v, docker cp %v", took[0], took[1], took[2])
			}
			for i, name := range []string{"raw", "archive", "docker"} {
				slices.Sort(ratios[i])
				b.ReportMetric(ratios[i][len(ratios[i])/2], name+"-ratio")
				b.ReportMetric(cost[i]/float64(b.N), name+"-cpu-s/op")
			}
		})
	}
	docker(b, p, nil, "exec", "more", "rm", "/root/file")
}

// processorTime is what a process has used, in seconds.
func processorTime(b *testing.B, pid int) float64 {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		b.Fatal(err)
	}
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	user, _ := strconv.ParseFloat(fields[11], 64)
	system, _ := strconv.ParseFloat(fields[12], 64)
	return (user + system) / 100
}

func cli(b *testing.B, p *pod, args ...string) error {
	if _, stderr, code := docker(b, p, nil, args...); code != 0 {
		return fmt.Errorf("docker %q: %s", args, stderr)
	}
	return nil
}

func rawStream(b *testing.B, p *pod, data []byte, in, out int64) error {
	conn, err := p.Open(b.Context())
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(2 * time.Minute)); err != nil {
		return err
	}
	fmt.Fprintf(conn, "POST /raw?in=%d&out=%d HTTP/1.1\r\nHost: guest\r\n\r\n", in, out)
	r := bufio.NewReader(conn)
	resp, err := http.ReadResponse(r, nil)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if _, err := conn.Write(data[:in]); err != nil {
		return err
	}
	n, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, io.LimitReader(r, out+1), make([]byte, 1<<20))
	if n != out+1 {
		return fmt.Errorf("%d of %d bytes: %w", n, out+1, err)
	}
	return nil
}

// BenchmarkVMExec runs a command that does nothing.
func BenchmarkVMExec(b *testing.B) {
	p := thePod(b)
	c := dockerClient(b, p)
	b.Run("api", func(b *testing.B) {
		for b.Loop() {
			e, err := c.ExecCreate(b.Context(), "idle", client.ExecCreateOptions{AttachStdout: true, AttachStderr: true, Cmd: []string{"true"}})
			if err != nil {
				b.Fatal(err)
			}
			a, err := c.ExecAttach(b.Context(), e.ID, client.ExecAttachOptions{})
			if err != nil {
				b.Fatal(err)
			}
			if _, err := io.Copy(io.Discard, a.Reader); err != nil {
				b.Fatal(err)
			}
			a.Close()
		}
	})
	b.Run("docker", func(b *testing.B) {
		for b.Loop() {
			if err := cli(b, p, "exec", "idle", "true"); err != nil {
				b.Fatal(err)
			}
		}
	})
}
