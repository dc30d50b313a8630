//go:build vm

package cold

import (
	"errors"
	"strings"
	"testing"

	"github.com/cradlestack/cradlestack/csi-plugin/volume"
	"github.com/cradlestack/cradlestack/test/s3server"
)

// bucket is a bucket of a real S3 server. stop ends that before the test does.
func bucket(t *testing.T) (o S3, stop func()) {
	t.Helper()
	url, stop := s3server.Start(t, "copies")
	return S3{Endpoint: url, Region: "us-east-1", Bucket: "copies", Prefix: "some/prefix/", AccessKey: s3server.AccessKey, SecretKey: s3server.SecretKey}, stop
}

func openBucket(t *testing.T, o S3) *Bucket {
	t.Helper()
	b, err := OpenBucket(o)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestVMBucket does with a real S3 server what the other tests do with a folder.
func TestVMBucket(t *testing.T) {
	o, stop := bucket(t)
	t.Run("Store", func(t *testing.T) { testStore(t, openBucket(t, o)) })
	t.Run("Vault", func(t *testing.T) { testVault(t, openBucket(t, o)) })

	wrong := o
	wrong.SecretKey = "wrong"
	if _, err := NewVault(openBucket(t, wrong), testKey(t)).Copies(t.Context(), ""); err == nil || !strings.Contains(err.Error(), "s3: list copies/some/prefix/copies/") {
		t.Errorf("with a wrong key: %v", err)
	}
	wrong = o
	wrong.Bucket = "none"
	if _, err := NewVault(openBucket(t, wrong), testKey(t)).Find(t.Context(), "db"); err == nil || errors.Is(err, volume.ErrNotFound) {
		t.Errorf("a bucket that is not there is no empty one: %v", err)
	}
	stop()
	v := NewVault(openBucket(t, o), testKey(t))
	if _, _, err := v.Save(t.Context(), vol, snapshot(1), Order{Taken: snapshot(1).Created}, blocks(random(1, 5*chunkSize)), Copy{}); err == nil {
		t.Error("saved in a server that is not there")
	}
}

func TestS3Endpoints(t *testing.T) {
	for _, endpoint := range []string{"s3.example.org", "ftp://s3.example.org", "https://", "https://s3.example.org/path"} {
		if _, err := OpenBucket(S3{Endpoint: endpoint, Bucket: "copies"}); err == nil || !strings.Contains(err.Error(), "write https://s3.example.org") {
			t.Errorf("%s: %v", endpoint, err)
		}
	}
}
