package driver

import (
	"errors"
	"testing"
	"testing/synctest"

	"github.com/hashicorp/nomad/plugins/drivers"
	"github.com/hashicorp/nomad/plugins/drivers/proto"

	"github.com/cradlestack/cradlestack/spec"
)

// A talk is a stream whose input comes from the test.
type talk struct {
	input chan *drivers.ExecTaskStreamingRequestMsg
	said  []*drivers.ExecTaskStreamingResponseMsg
}

func (s *talk) Send(m *drivers.ExecTaskStreamingResponseMsg) error {
	s.said = append(s.said, m)
	return nil
}

func (s *talk) Recv() (*drivers.ExecTaskStreamingRequestMsg, error) {
	m, ok := <-s.input
	if !ok {
		return nil, errors.New("the stream has ended")
	}
	return m, nil
}

// Who is refused a tunnel is told so: Nomad's client loses the exit code if the stream ends before it has passed its input on.
func TestTunnelRefused(t *testing.T) {
	for name, end := range map[string]func(*talk){
		"the input ends": func(s *talk) {
			s.input <- &drivers.ExecTaskStreamingRequestMsg{TtySize: &proto.ExecTaskStreamingRequest_TerminalSize{Height: 1, Width: 1}}
			s.input <- &drivers.ExecTaskStreamingRequestMsg{Stdin: &proto.ExecTaskStreamingIOOperation{Data: []byte("typed")}}
			s.input <- &drivers.ExecTaskStreamingRequestMsg{Stdin: &proto.ExecTaskStreamingIOOperation{Close: true}}
		},
		"the client is gone": func(s *talk) { close(s.input); s.input = nil },
		"it never ends":      func(*talk) {},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := &talk{input: make(chan *drivers.ExecTaskStreamingRequestMsg)}
				ended := make(chan error, 1)
				go func() {
					ended <- (&Driver{}).ExecTaskStreamingRaw(t.Context(), "task", []string{spec.TunnelCommand}, true, s)
				}()
				synctest.Wait()
				if n := len(s.said); n == 0 || !s.said[n-1].Exited || s.said[n-1].Result.GetExitCode() != exitRefused {
					t.Errorf("said was %v", s.said)
				}
				select {
				case <-ended:
					t.Error("the stream has ended before its input")
				default:
				}
				end(s)
				if err := <-ended; err != nil {
					t.Error(err)
				}
				if s.input != nil {
					close(s.input)
				}
			})
		})
	}
}
