package rpc

import (
	"context"
	"errors"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/cradlestack/cradlestack/csi-plugin/mount"
	"github.com/cradlestack/cradlestack/csi-plugin/volume"
)

// translate gives an error its gRPC code, here and nowhere else. Unavailable and ResourceExhausted are repeated by Nomad.
func translate(err error) error {
	if err == nil {
		return nil
	}
	if _, ok := status.FromError(err); ok {
		return err
	}
	for _, c := range []struct {
		is   error
		code codes.Code
	}{
		{volume.ErrNotFound, codes.NotFound},
		{volume.ErrExists, codes.AlreadyExists},
		{mount.ErrOccupied, codes.AlreadyExists},
		{volume.ErrBusy, codes.Aborted},
		{volume.ErrInUse, codes.FailedPrecondition},
		{volume.ErrForeign, codes.FailedPrecondition},
		{volume.ErrHost, codes.FailedPrecondition},
		{volume.ErrNoSpace, codes.ResourceExhausted},
		{volume.ErrRange, codes.OutOfRange},
		{volume.ErrInvalid, codes.InvalidArgument},
		{volume.ErrUnavailable, codes.Unavailable},
		{errors.ErrUnsupported, codes.Unimplemented},
		{context.DeadlineExceeded, codes.DeadlineExceeded},
		{context.Canceled, codes.Canceled},
	} {
		if errors.Is(err, c.is) {
			return status.Error(c.code, err.Error())
		}
	}
	return status.Error(codes.Internal, err.Error())
}
