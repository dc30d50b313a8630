package fetch

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"strings"
	"sync"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"
)

// s3Source is s3://bucket/key. Endpoint, region and credentials come from where
// the AWS tools look: AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL, AWS_REGION, the
// AWS_ACCESS_KEY_ID pair, ~/.aws/credentials, a web identity or the container's
// role. Without any the bucket must be public.
type s3Source struct {
	url    *url.URL
	client *minio.Core

	mu   sync.Mutex
	etag string
}

func newS3(u *url.URL) (*s3Source, error) {
	if u.Host == "" || strings.Trim(u.Path, "/") == "" {
		return nil, fmt.Errorf("%s: want s3://bucket/key", redacted(u))
	}
	endpoint := "https://s3.amazonaws.com"
	for _, k := range []string{"AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"} {
		if v := os.Getenv(k); v != "" {
			endpoint = v
		}
	}
	e, err := url.Parse(endpoint)
	if err != nil || e.Host == "" {
		return nil, fmt.Errorf("AWS_ENDPOINT_URL %q is no URL: %w", endpoint, err)
	}
	region := os.Getenv("AWS_REGION")
	if region == "" {
		region = os.Getenv("AWS_DEFAULT_REGION")
	}
	c, err := minio.NewCore(e.Host, &minio.Options{
		Secure: e.Scheme == "https", Region: region, MaxRetries: 1,
		Creds: credentials.NewChainCredentials([]credentials.Provider{
			&credentials.EnvAWS{}, &credentials.FileAWSCredentials{}, role(),
		}),
	})
	if err != nil {
		return nil, err
	}
	return &s3Source{url: u, client: c}, nil
}

// role is asked for only where a container's or a web identity is configured:
// elsewhere the question hangs.
func role() credentials.Provider {
	for _, k := range []string{"AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_CREDENTIALS_FULL_URI"} {
		if os.Getenv(k) != "" {
			return &credentials.IAM{}
		}
	}
	return &credentials.Static{} // anonymous
}

func (s *s3Source) String() string { return redacted(s.url) }

func (s *s3Source) Open(ctx context.Context, offset int64) (Part, error) {
	var o minio.GetObjectOptions
	s.mu.Lock()
	etag := s.etag
	s.mu.Unlock()
	var err error
	switch {
	case offset > 0:
		err = o.SetRange(offset, 0)
		if etag != "" {
			err = errors.Join(err, o.SetMatchETag(etag))
		}
	case offset < 0:
		err = o.SetRange(0, offset)
	}
	if err != nil {
		return Part{}, permanent{err}
	}
	body, info, header, err := s.client.GetObject(ctx, s.url.Host, strings.TrimPrefix(s.url.Path, "/"), o)
	if err != nil {
		return Part{}, explainS3(err)
	}
	if offset == 0 {
		s.mu.Lock()
		s.etag = info.ETag
		s.mu.Unlock()
		return Part{body, 0, info.Size}, nil
	}
	start, size, err := partSize(header.Get("Content-Range"), offset)
	if err != nil {
		body.Close()
		return Part{}, err
	}
	return Part{body, start, size}, nil
}

func explainS3(err error) error {
	r := minio.ToErrorResponse(err)
	switch {
	case r.StatusCode == 412:
		return permanent{ErrChanged}
	case r.StatusCode == 403:
		return permanent{fmt.Errorf("access denied: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or check the bucket's policy: %w", err)}
	case r.StatusCode >= 400 && r.StatusCode < 500 && r.StatusCode != 429 && r.StatusCode != 408:
		return permanent{err}
	}
	return err
}
