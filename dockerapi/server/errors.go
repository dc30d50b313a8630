package server

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"strings"

	"github.com/hashicorp/nomad/api"

	"github.com/cradlestack/cradlestack/internal/dockerhttp"
)

// answerError writes an error in docker's shape. Where an answer has begun already, or the client has gone, it does nothing visible.
func answerError(w http.ResponseWriter, r *http.Request, err error) {
	if r.Context().Err() != nil && errors.Is(err, context.Canceled) {
		return
	}
	status, message := statusOf(err)
	dockerhttp.AnswerError(w, status, errors.New(message))
}

// statusOf is the HTTP status of an error, and what a client is told. What Nomad refuses is the client's to know; what keeps Nomad from answering is
// not the client's fault.
func statusOf(err error) (int, string) {
	var (
		docker   dockerhttp.Error
		refused  api.UnexpectedResponseError
		network  *net.OpError
		endpoint *url.Error
	)
	switch {
	case errors.As(err, &docker):
		return docker.Status, err.Error()
	case errors.As(err, &refused) && refused.HasStatusCode():
		text := strings.TrimSpace(refused.Body())
		switch {
		case refused.StatusCode() == http.StatusForbidden:
			return http.StatusForbidden, fmt.Sprintf("Nomad does not allow it to this client's token: %s", or(text, "permission denied"))
		case strings.Contains(text, "No cluster leader"), strings.Contains(text, "No path to region"), strings.Contains(text, "leadership"):
			return http.StatusServiceUnavailable, fmt.Sprintf("Nomad can't act at the moment (%s): try again", text)
		}
		return http.StatusInternalServerError, fmt.Sprintf("Nomad: %s", or(text, err.Error()))
	case errors.As(err, &network), errors.As(err, &endpoint):
		return http.StatusServiceUnavailable, fmt.Sprintf("Nomad does not answer: %v", err)
	case errors.Is(err, context.DeadlineExceeded):
		return http.StatusGatewayTimeout, err.Error()
	}
	return http.StatusInternalServerError, err.Error()
}

// isStatus tells whether Nomad has answered with a status.
func isStatus(err error, status int) bool {
	var refused api.UnexpectedResponseError
	return errors.As(err, &refused) && refused.HasStatusCode() && refused.StatusCode() == status
}

func or(a, b string) string {
	if a != "" {
		return a
	}
	return b
}
