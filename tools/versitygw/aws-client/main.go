// Command aws-client does with a bucket what programs with the AWS SDK for Go do, and fails where it is not as S3 has it. Tests of cradle-filer run it:
//
//	AWS_ACCESS_KEY_ID=… AWS_SECRET_ACCESS_KEY=… aws-client ENDPOINT BUCKET
//
// The bucket has a snapshot "first", in which there is an object "before" with the content "then" and nothing else.
package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"
	"github.com/aws/smithy-go"
)

func main() {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintf(os.Stderr, "aws-client: %v\n", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	if len(args) != 2 {
		return errors.New("usage: aws-client ENDPOINT BUCKET")
	}
	c := client{bucket: args[1], S3: s3.New(s3.Options{
		BaseEndpoint: aws.String(args[0]), Region: "us-east-1", UsePathStyle: true,
		Credentials: credentials.NewStaticCredentialsProvider(os.Getenv("AWS_ACCESS_KEY_ID"), os.Getenv("AWS_SECRET_ACCESS_KEY"), ""),
	})}
	for _, step := range []struct {
		name string
		do   func(context.Context) error
	}{{"objects", c.objects}, {"an object in parts", c.parts}, {"presigned URLs", c.presigned}, {"lists", c.lists}, {"errors", c.errors}, {"snapshots", c.snapshots}} {
		if err := step.do(ctx); err != nil {
			return fmt.Errorf("%s: %w", step.name, err)
		}
	}
	return nil
}

type client struct {
	S3     *s3.Client
	bucket string
}

// put uploads with the SDK's own checksum, which is in a trailer where the body can't be read twice.
func (c client) put(ctx context.Context, key string, body io.Reader) (*s3.PutObjectOutput, error) {
	return c.S3.PutObject(ctx, &s3.PutObjectInput{Bucket: &c.bucket, Key: &key, Body: body, ContentType: aws.String("text/x-letter"), Metadata: map[string]string{"colour": "red"}})
}

func (c client) want(ctx context.Context, in *s3.GetObjectInput, want []byte) (*s3.GetObjectOutput, error) {
	in.Bucket = &c.bucket
	in.ChecksumMode = types.ChecksumModeEnabled
	out, err := c.S3.GetObject(ctx, in)
	if err != nil {
		return nil, err
	}
	defer out.Body.Close()
	got, err := io.ReadAll(out.Body)
	if err == nil && !bytes.Equal(got, want) {
		err = fmt.Errorf("%s has %d bytes %.40q, not %d", *in.Key, len(got), got, len(want))
	}
	return out, err
}

func (c client) objects(ctx context.Context) error {
	content := bytes.Repeat([]byte("0123456789abcdef"), 100_000)
	put, err := c.put(ctx, "aws/ü +%", bytes.NewReader(content))
	if err != nil {
		return err
	}
	got, err := c.want(ctx, &s3.GetObjectInput{Key: aws.String("aws/ü +%")}, content)
	if err != nil {
		return err
	}
	if *got.ETag != *put.ETag || *got.ContentType != "text/x-letter" || got.Metadata["colour"] != "red" {
		return fmt.Errorf("it was put as %s, and is %s, %s, %v", *put.ETag, *got.ETag, *got.ContentType, got.Metadata)
	}
	if _, err := c.want(ctx, &s3.GetObjectInput{Key: aws.String("aws/ü +%"), Range: aws.String("bytes=16-31")}, content[:16]); err != nil {
		return err
	}
	if _, err := c.S3.CopyObject(ctx, &s3.CopyObjectInput{Bucket: &c.bucket, Key: aws.String("aws/copy"), CopySource: aws.String(c.bucket + "/aws/%C3%BC%20%2B%25")}); err != nil {
		return err
	}
	_, err = c.want(ctx, &s3.GetObjectInput{Key: aws.String("aws/copy")}, content)
	return err
}

func (c client) parts(ctx context.Context) error {
	key := aws.String("aws/parts")
	begun, err := c.S3.CreateMultipartUpload(ctx, &s3.CreateMultipartUploadInput{Bucket: &c.bucket, Key: key})
	if err != nil {
		return err
	}
	var whole []byte
	var done []types.CompletedPart
	for n := int32(1); n <= 3; n++ {
		part := bytes.Repeat([]byte{byte('a' + n)}, 5<<20)
		out, err := c.S3.UploadPart(ctx, &s3.UploadPartInput{Bucket: &c.bucket, Key: key, UploadId: begun.UploadId, PartNumber: &n, Body: bytes.NewReader(part)})
		if err != nil {
			return fmt.Errorf("part %d: %w", n, err)
		}
		whole = append(whole, part...)
		done = append(done, types.CompletedPart{ETag: out.ETag, PartNumber: aws.Int32(n), ChecksumCRC32: out.ChecksumCRC32})
	}
	if _, err := c.S3.CompleteMultipartUpload(ctx, &s3.CompleteMultipartUploadInput{
		Bucket: &c.bucket, Key: key, UploadId: begun.UploadId, MultipartUpload: &types.CompletedMultipartUpload{Parts: done},
	}); err != nil {
		return err
	}
	_, err = c.want(ctx, &s3.GetObjectInput{Key: key}, whole)
	return err
}

func (c client) presigned(ctx context.Context) error {
	p := s3.NewPresignClient(c.S3)
	key := aws.String("aws/presigned")
	put, err := p.PresignPutObject(ctx, &s3.PutObjectInput{Bucket: &c.bucket, Key: key})
	if err != nil {
		return err
	}
	get, err := p.PresignGetObject(ctx, &s3.GetObjectInput{Bucket: &c.bucket, Key: key})
	if err != nil {
		return err
	}
	for _, r := range []struct {
		method, url, body, want string
	}{{http.MethodPut, put.URL, "content", ""}, {http.MethodGet, get.URL, "", "content"}} {
		if err := answers(ctx, r.method, r.url, r.body, r.want); err != nil {
			return err
		}
	}
	return nil
}

// answers asks for a presigned URL, and wants this answer.
func answers(ctx context.Context, method, url, body, want string) error {
	req, err := http.NewRequestWithContext(ctx, method, url, bytes.NewReader([]byte(body)))
	if err != nil {
		return err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	text, err := io.ReadAll(resp.Body)
	resp.Body.Close()
	if err != nil || resp.StatusCode != http.StatusOK || string(text) != want {
		return fmt.Errorf("%s: %s %.200q, %v", method, resp.Status, text, err)
	}
	return nil
}

func (c client) lists(ctx context.Context) error {
	var keys []string
	pages := s3.NewListObjectsV2Paginator(c.S3, &s3.ListObjectsV2Input{Bucket: &c.bucket, Prefix: aws.String("aws/"), MaxKeys: aws.Int32(1)})
	for pages.HasMorePages() {
		page, err := pages.NextPage(ctx)
		if err != nil {
			return err
		}
		for _, o := range page.Contents {
			keys = append(keys, *o.Key)
		}
	}
	if fmt.Sprint(keys) != "[aws/copy aws/parts aws/presigned aws/ü +%]" {
		return fmt.Errorf("there are %q", keys)
	}
	var all []types.ObjectIdentifier
	for _, key := range keys {
		all = append(all, types.ObjectIdentifier{Key: aws.String(key)})
	}
	gone, err := c.S3.DeleteObjects(ctx, &s3.DeleteObjectsInput{Bucket: &c.bucket, Delete: &types.Delete{Objects: all}})
	if err == nil && (len(gone.Errors) > 0 || len(gone.Deleted) != len(all)) {
		err = fmt.Errorf("removed %d, %+v", len(gone.Deleted), gone.Errors)
	}
	return err
}

// errors are those that programs decide by.
func (c client) errors(ctx context.Context) error {
	_, err := c.S3.GetObject(ctx, &s3.GetObjectInput{Bucket: &c.bucket, Key: aws.String("aws/copy")})
	if !errors.As(err, new(*types.NoSuchKey)) {
		return fmt.Errorf("what was removed: %w", err)
	}
	_, err = c.S3.HeadObject(ctx, &s3.HeadObjectInput{Bucket: &c.bucket, Key: aws.String("aws/copy")})
	if !errors.As(err, new(*types.NotFound)) {
		return fmt.Errorf("head of what was removed: %w", err)
	}
	if _, err := c.put(ctx, "aws-once", bytes.NewReader([]byte("one"))); err != nil {
		return err
	}
	_, err = c.S3.PutObject(ctx, &s3.PutObjectInput{Bucket: &c.bucket, Key: aws.String("aws-once"), Body: bytes.NewReader([]byte("two")), IfNoneMatch: aws.String("*")})
	var refused smithy.APIError
	if !errors.As(err, &refused) || refused.ErrorCode() != "PreconditionFailed" {
		return fmt.Errorf("what is there was to be put once more: %w", err)
	}
	if _, err := c.want(ctx, &s3.GetObjectInput{Key: aws.String("aws-once")}, []byte("one")); err != nil {
		return err
	}
	_, err = c.S3.DeleteObject(ctx, &s3.DeleteObjectInput{Bucket: &c.bucket, Key: aws.String("aws-once")})
	return err
}

// snapshots are read, and copied out of, as the SDK does it, and not changed.
func (c client) snapshots(ctx context.Context) error {
	var found []string
	for _, prefix := range []string{".snapshots/", ".snapshots/first/", ""} {
		list, err := c.S3.ListObjectsV2(ctx, &s3.ListObjectsV2Input{Bucket: &c.bucket, Prefix: &prefix, Delimiter: aws.String("/")})
		if err != nil {
			return err
		}
		for _, p := range list.CommonPrefixes {
			found = append(found, *p.Prefix)
		}
		for _, o := range list.Contents {
			found = append(found, *o.Key)
		}
	}
	const key = ".snapshots/first/before"
	if fmt.Sprint(found) != "[.snapshots/first/ "+key+"]" {
		return fmt.Errorf("there are %q", found)
	}
	if _, err := c.want(ctx, &s3.GetObjectInput{Key: aws.String(key)}, []byte("then")); err != nil {
		return err
	}
	if _, err := c.want(ctx, &s3.GetObjectInput{Key: aws.String(key), Range: aws.String("bytes=1-2")}, []byte("he")); err != nil {
		return err
	}
	if head, err := c.S3.HeadObject(ctx, &s3.HeadObjectInput{Bucket: &c.bucket, Key: aws.String(key)}); err != nil || *head.ContentLength != 4 {
		return fmt.Errorf("head: %+v, %w", head, err)
	}
	get, err := s3.NewPresignClient(c.S3).PresignGetObject(ctx, &s3.GetObjectInput{Bucket: &c.bucket, Key: aws.String(key)})
	if err != nil {
		return err
	}
	if err := answers(ctx, http.MethodGet, get.URL, "", "then"); err != nil {
		return fmt.Errorf("by a presigned URL: %w", err)
	}
	if _, err := c.S3.CopyObject(ctx, &s3.CopyObjectInput{Bucket: &c.bucket, Key: aws.String("aws-back"), CopySource: aws.String(c.bucket + "/" + key)}); err != nil {
		return err
	}
	if _, err := c.want(ctx, &s3.GetObjectInput{Key: aws.String("aws-back")}, []byte("then")); err != nil {
		return err
	}
	_, put := c.put(ctx, key, bytes.NewReader([]byte("now")))
	_, del := c.S3.DeleteObject(ctx, &s3.DeleteObjectInput{Bucket: &c.bucket, Key: aws.String(key)})
	_, into := c.S3.CopyObject(ctx, &s3.CopyObjectInput{Bucket: &c.bucket, Key: aws.String(key), CopySource: aws.String(c.bucket + "/aws-back")})
	_, parts := c.S3.CreateMultipartUpload(ctx, &s3.CreateMultipartUploadInput{Bucket: &c.bucket, Key: aws.String(key)})
	for what, err := range map[string]error{"put": put, "delete": del, "copy": into, "parts": parts} {
		var refused smithy.APIError
		if !errors.As(err, &refused) || refused.ErrorCode() != "AccessDenied" {
			return fmt.Errorf("a snapshot was to be changed by %s: %w", what, err)
		}
	}
	_, err = c.S3.DeleteObject(ctx, &s3.DeleteObjectInput{Bucket: &c.bucket, Key: aws.String("aws-back")})
	return err
}
