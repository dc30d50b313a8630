// Package dockerhttp is what all answers of docker's Engine API have in common, whoever gives them: versions in paths, parameters, filters,
// times, JSON bodies, errors in docker's shape.
//
// The pod's own API in the guest and the API server in front of Nomad both use it, so it has no dependency but docker's types, and imports
// nothing of ours.
package dockerhttp

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/moby/moby/api/types/common"
)

// MaxBody bounds a JSON body.
const MaxBody = 4 << 20

// An Error is one with the HTTP status that docker gives it.
type Error struct {
	Status  int
	Message string
}

func (e Error) Error() string { return e.Message }

// NewError makes an Error.
func NewError(status int, message string) error { return Error{status, message} }

// Errorf makes an Error.
func Errorf(status int, format string, args ...any) error {
	return Error{status, fmt.Sprintf(format, args...)}
}

// Invalid is what is wrong with a request.
func Invalid(format string, args ...any) error {
	return Errorf(http.StatusBadRequest, format, args...)
}

// Decode reads a JSON body; an empty one leaves v as it is.
func Decode(w http.ResponseWriter, r *http.Request, v any) error {
	d := json.NewDecoder(http.MaxBytesReader(w, r.Body, MaxBody))
	err := d.Decode(v)
	var large *http.MaxBytesError
	switch {
	case err == nil:
		if _, err := d.Token(); !errors.Is(err, io.EOF) {
			return Invalid("unexpected content after JSON")
		}
		return nil
	case errors.Is(err, io.EOF):
		return nil
	case errors.As(err, &large):
		return Errorf(http.StatusRequestEntityTooLarge, "request body is larger than %d bytes", large.Limit)
	}
	return Invalid("invalid JSON: %v", err)
}

// CheckJSON checks that a body is JSON, if there is one, and leaves it to be read.
func CheckJSON(w http.ResponseWriter, r *http.Request) error {
	kind := r.Header.Get("Content-Type")
	if kind == "" && r.ContentLength == 0 {
		return nil
	}
	media, _, err := mime.ParseMediaType(kind)
	if err != nil {
		return Invalid("malformed Content-Type header (%s): %v", kind, err)
	}
	if media != "application/json" {
		return Invalid("unsupported Content-Type header (%s): must be 'application/json'", kind)
	}
	var read bytes.Buffer
	body := r.Body
	r.Body = io.NopCloser(io.TeeReader(body, &read))
	var value json.RawMessage
	if err := Decode(w, r, &value); err != nil {
		return err
	}
	r.Body = struct {
		io.Reader
		io.Closer
	}{&read, body}
	return nil
}

// Answer writes v as JSON.
func Answer(w http.ResponseWriter, status int, v any) error {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(v) // the client has gone
	return nil
}

// AnswerError writes an error in docker's shape. 304 has no body.
func AnswerError(w http.ResponseWriter, status int, err error) {
	if status == http.StatusNotModified {
		w.WriteHeader(status)
		return
	}
	_ = Answer(w, status, common.ErrorResponse{Message: err.Error()})
}

// Parameter reads one of the URL's. The body is never taken for a form, whatever the client calls it: it may be an archive.
func Parameter(r *http.Request, name string) string { return r.URL.Query().Get(name) }

// Truth reads a boolean parameter as docker does: anything but nothing, 0, no, false and none.
func Truth(r *http.Request, name string) bool {
	switch strings.ToLower(strings.TrimSpace(Parameter(r, name))) {
	case "", "0", "no", "false", "none":
		return false
	}
	return true
}

// ParseTime reads a time as docker's API takes it: seconds since 1970 with a fraction, or RFC 3339; "" and 0 are none.
func ParseTime(s string) (time.Time, error) {
	if s == "" || s == "0" {
		return time.Time{}, nil
	}
	whole, fraction, _ := strings.Cut(s, ".")
	if seconds, err := strconv.ParseInt(whole, 10, 64); err == nil {
		fraction = (fraction + "000000000")[:9]
		nanos, err := strconv.ParseUint(fraction, 10, 32)
		if err != nil {
			return time.Time{}, Invalid("%q is no time", s)
		}
		return time.Unix(seconds, int64(nanos)), nil
	}
	t, err := time.Parse(time.RFC3339Nano, s)
	if err != nil {
		return time.Time{}, Invalid("%q is neither seconds since 1970 nor a time such as 2006-01-02T15:04:05Z", s)
	}
	return t, nil
}

// Versions are the minor numbers of API version 1 that are spoken.
type Versions struct {
	Min, Max int
	Server   string // the Server header
}

// String is a version as docker writes it.
func String(minor int) string { return "1." + strconv.Itoa(minor) }

// Handler takes the version off the path, /v1.43/containers/json, and checks it.
func (v Versions) Handler(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("Api-Version", String(v.Max))
		h.Set("Ostype", "linux")
		h.Set("Server", v.Server)
		rest, ok := strings.CutPrefix(r.URL.Path, "/v1.")
		if !ok {
			next.ServeHTTP(w, r)
			return
		}
		number, path, _ := strings.Cut(rest, "/")
		minor, err := strconv.ParseUint(number, 10, 16)
		switch {
		case err != nil:
			AnswerError(w, http.StatusNotFound, errors.New("page not found"))
			return
		case int(minor) < v.Min:
			AnswerError(w, http.StatusBadRequest, fmt.Errorf("client version 1.%d is too old. Minimum supported API version is %s, please upgrade your client to a newer version", minor, String(v.Min)))
			return
		case int(minor) > v.Max:
			AnswerError(w, http.StatusBadRequest, fmt.Errorf("client version 1.%d is too new. Maximum supported API version is %s", minor, String(v.Max)))
			return
		}
		r = r.Clone(r.Context())
		r.URL.Path, r.URL.RawPath = "/"+path, ""
		r.SetPathValue(versionValue, number)
		next.ServeHTTP(w, r)
	})
}

// Version is the minor number that the path asks for; the greatest where it names none.
func (v Versions) Version(r *http.Request) int {
	if minor, err := strconv.Atoi(r.PathValue(versionValue)); err == nil {
		return minor
	}
	return v.Max
}

// versionValue is the path value that tells the version asked for. ServeMux keeps path values that its patterns don't name.
const versionValue = "docker API version"
