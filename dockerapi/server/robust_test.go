package server

import (
	"bufio"
	"compress/gzip"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// What makes no sense is refused with the status that says whose fault it is, in docker's shape.
func TestBadInput(t *testing.T) {
	ask := serve(t, Config{Nomad: emptyNomad(t), Registry: openRegistry(t)})
	long := strings.Repeat("x", 5<<20)
	for _, test := range []struct {
		method, path, body string
		status             int
		want               string
	}{
		{"POST", "/containers/create", `{"Image": `, 400, "invalid JSON"},
		{"POST", "/containers/create", `{"Image": 5}`, 400, "invalid JSON"},
		{"POST", "/containers/create", `{"Image": "x"} {}`, 400, "unexpected content after JSON"},
		{"POST", "/containers/create", strings.Repeat(`{"HostConfig":`, 20000), 400, "invalid JSON"},
		{"POST", "/containers/create", `{"Image": "` + long + `"}`, 413, "request body is larger than 4194304 bytes"},
		{"POST", "/containers/create?name=a/b", `{"Image": "x"}`, 400, "Invalid container name (a/b)"},
		{"POST", "/containers/create?platform=windows", `{"Image": "x"}`, 404, "no node runs containers of platform windows"},
		{"POST", "/containers/create", `{"Image": "x", "NoSuchField": 1}`, 404, "No such image: x:latest"}, // as dockerd, which knows what clients to come may send
		{"POST", "/containers/create", `{"Image": "UPPER"}`, 400, "must be lowercase"},
		{"POST", "/containers/create", ``, 400, "config cannot be empty"},
		{"POST", "/auth", `[]`, 400, "invalid JSON"},
		{"POST", "/commit?container=x", `nonsense`, 400, "invalid JSON"},
		{"POST", "/commit?container=x&repo=UPPER", ``, 400, "must be lowercase"},
		{"POST", "/commit?container=x&changes=FROM%20y", ``, 400, "FROM is not a valid change command"},
		{"GET", "/containers/json?filters={", "", 400, "invalid filters"},
		{"GET", "/containers/json?filters=" + `{"nonsense":["x"]}`, "", 400, "invalid filter 'nonsense'"},
		{"GET", "/containers/json?filters=" + `{"status":["asleep"]}`, "", 400, "asleep"},
		{"GET", "/containers/json?limit=many", "", 400, "is no number"},
		{"GET", "/v1.4000000000000000000000/containers/json", "", 404, "page not found"},
		{"GET", "/containers/" + strings.Repeat("x", 100000) + "/json", "", 404, "No such container"},
		{"GET", "/containers/%00/json", "", 404, "No such container"},
		{"GET", "/containers/..%2f..%2fnames/json", "", 404, "No such container"},
		{"POST", "/containers/missing/exec", `nonsense`, 400, "invalid JSON"},
		{"POST", "/exec/short/start", `nonsense`, 400, "invalid JSON"},
		{"GET", "/exec/short/json", "", 404, "No such exec instance: short"},
	} {
		status, body, _ := ask(test.method, test.path, test.body)
		var e struct{ Message string }
		if err := json.Unmarshal([]byte(body), &e); status != test.status || err != nil || !strings.Contains(e.Message, test.want) {
			t.Errorf("%s %.100s %.100s: %d %.300s; want %d %s", test.method, test.path, test.body, status, body, test.status, test.want)
		}
	}
}

// A header without an end is not read to its end.
func TestHugeHeader(t *testing.T) {
	conn, err := net.Dial("unix", startUnix(t, Config{Nomad: emptyNomad(t)}))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	go func() {
		_, _ = io.WriteString(conn, "GET /_ping HTTP/1.1\r\nHost: x\r\nX: ")
		for {
			if _, err := io.WriteString(conn, strings.Repeat("x", 64<<10)); err != nil {
				return
			}
		}
	}()
	answer, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatal(err)
	}
	answer.Body.Close()
	if answer.StatusCode != http.StatusRequestHeaderFieldsTooLarge {
		t.Errorf("%d", answer.StatusCode)
	}
}

// A server that was without Nomad, or whose Nomad was without a leader, says so, and answers as soon as that is over.
func TestNomadComesBack(t *testing.T) {
	var state atomic.Value
	state.Store("No cluster leader")
	ask := serve(t, Config{Nomad: nomadOf(t, func(w http.ResponseWriter, r *http.Request) {
		if text := state.Load().(string); text != "" {
			http.Error(w, text, http.StatusInternalServerError)
			return
		}
		answerNothing(w, r)
	})})
	if status, body, _ := ask("GET", "/containers/json", ""); status != http.StatusServiceUnavailable || !strings.Contains(body, "No cluster leader") {
		t.Errorf("without a leader: %d %s", status, body)
	}
	state.Store("")
	for begin := time.Now(); ; {
		status, body, _ := ask("GET", "/containers/json", "")
		if status == http.StatusOK {
			break
		}
		if time.Since(begin) > time.Minute {
			t.Fatalf("with a leader: %d %s", status, body)
		}
	}
}

// What a policy lacks is named; that a token is unknown is said as Nomad says it.
func TestDenied(t *testing.T) {
	for _, test := range []struct{ path, text, want string }{
		{"/v1/event/stream", "Permission denied", "capability read-job in namespace team is needed"},
		{"/v1/jobs", "Permission denied", "capability list-jobs in namespace team is needed"},
		{"/v1/vars", "Permission denied", "capability list of variables docker/containers/* in namespace team is needed"},
		{"/v1/vars", "ACL token not found", "Nomad does not allow it to this client's token: ACL token not found"},
	} {
		ask := serve(t, Config{Local: Access{Namespace: "team"}, Nomad: nomadOf(t, func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == test.path {
				w.Header().Set("Content-Encoding", "gzip") // as Nomad does when it is asked to
				w.WriteHeader(http.StatusForbidden)
				z := gzip.NewWriter(w)
				_, _ = io.WriteString(z, test.text)
				z.Close()
				return
			}
			answerNothing(w, r)
		})})
		if status, body, _ := ask("GET", "/containers/json", ""); status != http.StatusForbidden || !strings.Contains(body, test.want) {
			t.Errorf("%s: %d %s; want %s", test.path, status, body, test.want)
		}
	}
}
