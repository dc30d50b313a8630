package translate

import (
	"encoding/json"
	"errors"
	"testing"

	"github.com/moby/moby/api/types/container"

	"github.com/cradlestack/cradlestack/internal/dockerhttp"
)

// Limits of one that has joined another one's machine are within it.
func TestUpdateJoined(t *testing.T) {
	c, err := create(t, `{"Image": "x", "HostConfig": {"NetworkMode": "container:web", "RestartPolicy": {"Name": "always"}}}`, Rules{})
	if err != nil {
		t.Fatal(err)
	}
	var u container.UpdateConfig
	u.Memory, u.MemorySwap, u.NanoCPUs = 64<<20, -1, 5e8
	_, pod, _, err := Update(c.Host, c.Pod, &u)
	if err != nil {
		t.Fatal(err)
	}
	own := pod.Containers[0]
	if pod.Resources.Memory != 0 || pod.Resources.CPUs != 0 || own.Resources.Memory != 64<<20 || own.Resources.CPUs != 0.5 || own.Lifecycle.Critical || !own.Lifecycle.RestartOnSuccess {
		t.Errorf("%+v, %+v", pod.Resources, own)
	}
}

// Whatever docker update asks for is the client's mistake, or a pod that is valid; what was there stays as it was.
func FuzzUpdate(f *testing.F) {
	for _, seed := range []string{
		`{"Memory": 268435456, "MemorySwap": -1, "RestartPolicy": {"Name": "on-failure", "MaximumRetryCount": 3}}`, `{"NanoCpus": 1500000000, "PidsLimit": 10}`,
		`{"CpuQuota": 50000, "CpuPeriod": 100000}`, `{"PidsLimit": -5, "CpuShares": 9223372036854775807}`, `{"Memory": -1}`, `{"RestartPolicy": {"Name": "sometimes"}}`,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		var u container.UpdateConfig
		if json.Unmarshal(data, &u) != nil {
			return
		}
		c, err := create(t, `{"Image": "x", "HostConfig": {"Memory": 134217728}}`, Rules{})
		if err != nil {
			t.Fatal(err)
		}
		before, err := json.Marshal(c.Pod)
		if err != nil {
			t.Fatal(err)
		}
		_, pod, _, err := Update(c.Host, c.Pod, &u)
		if after, _ := json.Marshal(c.Pod); string(after) != string(before) {
			t.Errorf("the pod was %s and is %s", before, after)
		}
		if err != nil {
			var e dockerhttp.Error
			if !errors.As(err, &e) {
				t.Fatalf("an error without a status: %v", err)
			}
			return
		}
		if err := pod.Validate(); err != nil {
			t.Fatal(err)
		}
	})
}
