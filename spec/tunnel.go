package spec

import "time"

// TunnelCommand is a command for Nomad's exec that no container executes: alone, and without a terminal, it makes the exec's stream
// a connection to docker's API in the guest, the pod's vdocker.sock. So whoever may execute commands in an allocation (alloc-exec)
// reaches that from anywhere, and no port is opened for it.
//
// Standard input and output are the two directions of the connection, and their ends those of the directions. What Nomad's client
// library does not tell of an exec's streams goes as these lines on standard error, in order with what is on standard output.
const TunnelCommand = "cradle:vdocker"

// TunnelAt begins a line on a tunnel's standard error, before TunnelReady: the path of vdocker.sock on the pod's node follows. Who is there, and has been let
// through by Nomad just now, may connect to that: the same bytes go through Nomad's agents at a tenth of the speed.
const TunnelAt = "cradle: at "

// AnsweringDir is the directory, below the task driver's state_dir, in which a file ALLOCATION.TASK comes and goes at the moment when the pod of a task answers: who is on its
// node and watches the directory (inotify(7)) knows it some tenths of a second before Nomad's servers do.
const AnsweringDir = "answering"

// Other lines on a tunnel's standard error. Any further text is for people: why there is no connection, or no longer one; the exit code is then
// not 0.
const (
	TunnelReady = "cradle: connected\n"     // the pod takes bytes
	TunnelEOF   = "cradle: end of output\n" // the pod has closed its direction
)

// Either side of a tunnel sends an empty message every TunnelHeartbeat, as nomad/api's Exec does, and takes one for gone from whom nothing has come for
// TunnelPatience: Nomad's agents do not pass on that a connection has broken.
const (
	TunnelHeartbeat = 10 * time.Second
	TunnelPatience  = 40 * time.Second
)

// A terminal size of 0 by 0, where there is no terminal, ends a tunnel at once: the client has closed both directions.
