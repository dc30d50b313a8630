package launch

import (
	"fmt"
	"strings"
	"testing"
)

func TestCallerDirs(t *testing.T) {
	env := []string{
		"STATE_DIRECTORY=/var/lib/a:/var/lib/b", "RUNTIME_DIRECTORY=/run/a", "CREDENTIALS_DIRECTORY=/run/credentials/a",
		"NOMAD_ALLOC_DIR=/nomad/1/alloc", "NOMAD_TASK_DIR=/nomad/1/task/local", "NOTIFY_SOCKET=@abstract",
		"CACHE_DIRECTORY=/data/cache", "LOGS_DIRECTORY=/wrong", "LOGS_DIRECTORY=/var/log/a",
	}
	var got []string
	for _, v := range callerDirs(env, []Volume{{Host: "/srv", Target: "/data"}}) {
		got = append(got, fmt.Sprintf("%s:%s:%s", v.Host, v.Target, v.Propagation))
	}
	const want = "/var/lib/a:/var/lib/a:rshared /var/lib/b:/var/lib/b:rshared /var/log/a:/var/log/a:rshared " +
		"/nomad/1/alloc:/nomad/1/alloc:rshared /nomad/1/task/local:/nomad/1/task/local:rshared"
	if s := strings.Join(got, " "); s != want {
		t.Errorf("got  %s\nwant %s", s, want)
	}
}
