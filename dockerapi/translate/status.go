package translate

import (
	"fmt"
	"time"

	"github.com/docker/go-units"
	"github.com/moby/moby/api/types/container"
)

// StatusText is what docker ps shows of a state (moby daemon/container/state.go, String).
func StatusText(s *container.State, now time.Time) string {
	since := func(text string) string {
		at, err := time.Parse(time.RFC3339Nano, text)
		if err != nil {
			return ""
		}
		return units.HumanDuration(now.Sub(at))
	}
	switch {
	case s.Restarting:
		return fmt.Sprintf("Restarting (%d) %s ago", s.ExitCode, since(s.FinishedAt))
	case s.Paused:
		return fmt.Sprintf("Up %s (Paused)", since(s.StartedAt))
	case s.Running:
		text := "Up " + since(s.StartedAt)
		if s.Health != nil {
			switch s.Health.Status {
			case container.NoHealthcheck, "":
			case container.Starting:
				text += " (health: starting)"
			default:
				text += fmt.Sprintf(" (%s)", s.Health.Status)
			}
		}
		return text
	case s.Dead:
		return "Dead"
	case s.Status == container.StateRemoving:
		return "Removal In Progress"
	case s.Status == container.StateCreated:
		return "Created"
	}
	return fmt.Sprintf("Exited (%d) %s ago", s.ExitCode, since(s.FinishedAt))
}
