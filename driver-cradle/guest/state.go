package guest

import (
	"time"
)

// State of a container, as docker's inspect shows it.
type State struct {
	Status       string // wire.StateCreated and so on
	Running      bool   // also while paused
	Paused       bool
	Restarting   bool
	OOMKilled    bool
	Dead         bool
	Pid          int // in the guest
	ExitCode     int
	Error        string
	StartedAt    time.Time
	FinishedAt   time.Time
	RestartCount int
	Health       *Health // nil without a healthcheck

	oomBefore uint64 // OOM kills in the cgroup before this start
}

// States of health, docker's words.
const (
	HealthStarting  = "starting"
	HealthHealthy   = "healthy"
	HealthUnhealthy = "unhealthy"
)

// Health of a container with a healthcheck.
type Health struct {
	Status        string
	FailingStreak int
	Log           []Probe // the last five, oldest first
}

// A Probe is one run of a healthcheck.
type Probe struct {
	Start    time.Time
	End      time.Time
	ExitCode int // 0 healthy, 1 unhealthy, -1 the probe itself failed
	Output   string
}

// Conditions of Wait, docker's words.
const (
	WaitNotRunning = "not-running"
	WaitNextExit   = "next-exit"
	WaitRemoved    = "removed"
)

// ExecConfig is a command to run in a running container.
type ExecConfig struct {
	Args       []string
	Env        []string // added to the container's
	User       string   // default: the container's
	WorkingDir string   // default: the container's
	TTY        bool
	OpenStdin  bool
	Privileged bool
	Rows, Cols uint16 // of the tty, where known

	// What the client that made it wants of it: kept for vdocker.
	AttachStdout, AttachStderr bool
	DetachKeys                 string
}

// ExecState is an Exec's part of docker's inspect.
type ExecState struct {
	Running  bool
	Started  bool
	ExitCode int // meaningful once it has ended
	Pid      int // in the guest
}
