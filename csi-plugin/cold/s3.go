package cold

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"
)

// A Bucket is a Store in an S3 bucket.
type Bucket struct {
	client *minio.Client
	bucket string
	prefix string
}

// S3 says which bucket.
type S3 struct {
	Endpoint  string // https://s3.example.org; "" is Amazon's
	Region    string
	Bucket    string
	Prefix    string // of all names; "" or with / at its end
	AccessKey string
	SecretKey string

	patience time.Duration // default patience
}

// patience is how long a server may neither take nor give a byte. It is longer than minio waits for an answer's beginning.
const patience = 2 * time.Minute

// A patient connection is one that ends when nothing has gone on in it for a time.
type patient struct {
	net.Conn
	patience time.Duration
}

// Read is net.Conn's. What is sent meanwhile is a sign of life as well.
func (c patient) Read(b []byte) (int, error) {
	if err := c.SetDeadline(time.Now().Add(c.patience)); err != nil {
		return 0, err
	}
	return c.Conn.Read(b)
}

// Write is net.Conn's.
func (c patient) Write(b []byte) (int, error) {
	if err := c.SetDeadline(time.Now().Add(c.patience)); err != nil {
		return 0, err
	}
	return c.Conn.Write(b)
}

// OpenBucket connects nowhere yet.
func OpenBucket(o S3) (*Bucket, error) {
	endpoint := o.Endpoint
	if endpoint == "" {
		endpoint = "https://s3.amazonaws.com"
	}
	u, err := url.Parse(endpoint)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" || strings.Trim(u.Path, "/") != "" {
		return nil, fmt.Errorf("s3: %q is no server; write https://s3.example.org", o.Endpoint)
	}
	transport, err := minio.DefaultTransport(u.Scheme == "https")
	if err != nil {
		return nil, fmt.Errorf("s3: %w", err)
	}
	dial := transport.DialContext
	transport.DialContext = func(ctx context.Context, network, address string) (net.Conn, error) {
		c, err := dial(ctx, network, address)
		if err != nil {
			return nil, err
		}
		return patient{c, cmp.Or(o.patience, patience)}, nil
	}
	client, err := minio.New(u.Host, &minio.Options{
		Creds: credentials.NewStaticV4(o.AccessKey, o.SecretKey, ""), Secure: u.Scheme == "https", Region: o.Region, Transport: transport,
	})
	if err != nil {
		return nil, fmt.Errorf("s3: %w", err)
	}
	return &Bucket{client, o.Bucket, o.Prefix}, nil
}

// Put is Store's.
func (b *Bucket) Put(ctx context.Context, name string, data []byte) error {
	_, err := b.client.PutObject(ctx, b.bucket, b.prefix+name, bytes.NewReader(data), int64(len(data)), minio.PutObjectOptions{
		ContentType: "application/octet-stream", DisableMultipart: int64(len(data)) < maxPut,
	})
	return b.error("put", name, err)
}

// maxPut is how large an object may be that is not sent in parts.
const maxPut = 64 << 20

// Get is Store's.
func (b *Bucket) Get(ctx context.Context, name string, most int64) ([]byte, error) {
	o, err := b.client.GetObject(ctx, b.bucket, b.prefix+name, minio.GetObjectOptions{})
	if err != nil {
		return nil, b.error("get", name, err)
	}
	defer o.Close()
	data, err := readMost(o, most)
	return data, b.error("get", name, err)
}

// List is Store's.
func (b *Bucket) List(ctx context.Context, prefix string, each func(string) error) error {
	ctx, cancel := context.WithCancel(ctx) // ends what lists, should each fail
	defer cancel()
	for o := range b.client.ListObjects(ctx, b.bucket, minio.ListObjectsOptions{Prefix: b.prefix + prefix, Recursive: true}) {
		if o.Err != nil {
			return b.error("list", prefix, o.Err)
		}
		if err := each(strings.TrimPrefix(o.Key, b.prefix)); err != nil {
			return err
		}
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return nil
}

// Delete is Store's.
func (b *Bucket) Delete(ctx context.Context, name string) error {
	err := b.error("delete", name, b.client.RemoveObject(ctx, b.bucket, b.prefix+name, minio.RemoveObjectOptions{}))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

func (b *Bucket) error(verb, name string, err error) error {
	if err == nil {
		return nil
	}
	if r := minio.ToErrorResponse(err); r.StatusCode == http.StatusNotFound && r.Code == minio.NoSuchKey {
		err = fs.ErrNotExist
	}
	return fmt.Errorf("s3: %s %s/%s%s: %w", verb, b.bucket, b.prefix, name, err)
}
