package main

import (
	"context"
	"errors"
	"io"

	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/versity/versitygw/backend"
	"github.com/versity/versitygw/s3response"
)

// whole refuses an object or part whose client went before all of it was there: versitygw takes what has come for all, unless the request is signed with its digest.
type whole struct{ backend.Backend }

// PutObject is backend.Backend's.
func (w whole) PutObject(ctx context.Context, in s3response.PutObjectInput) (s3response.PutObjectOutput, error) {
	in.Body = all(in.Body, in.ContentLength)
	return w.Backend.PutObject(ctx, in)
}

// UploadPart is backend.Backend's.
func (w whole) UploadPart(ctx context.Context, in *s3.UploadPartInput) (*s3.UploadPartOutput, error) {
	there := *in
	there.Body = all(in.Body, in.ContentLength)
	return w.Backend.UploadPart(ctx, &there)
}

// errCutOff is not io.ErrUnexpectedEOF, which versitygw takes for an end.
var errCutOff = errors.New("the client has gone before it had sent all")

// all is an error at a body's end where that comes before its length.
func all(body io.Reader, length *int64) io.Reader {
	if body == nil || length == nil {
		return body
	}
	return &counted{body, *length}
}

type counted struct {
	io.Reader
	left int64
}

func (c *counted) Read(p []byte) (int, error) {
	n, err := c.Reader.Read(p)
	c.left -= int64(n)
	if errors.Is(err, io.EOF) && c.left > 0 {
		err = errCutOff
	}
	return n, err
}
