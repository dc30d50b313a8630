package registry

import (
	"context"
	"io"
	"log/slog"
	"sync"

	"github.com/sirupsen/logrus" //nolint:depguard // distribution logs through its standard logger; this file is where that ends
)

// A logHook passes what distribution has to say on. It tells of each request and of each error that a client has made: only the former's
// failures are of interest.
type logHook struct{ log *slog.Logger }

var forwardOnce sync.Once

// forwardLogs sends the standard logger of logrus to log: the first one, as there is only one of it in a process.
func forwardLogs(log *slog.Logger) {
	forwardOnce.Do(func() {
		logrus.SetOutput(io.Discard)
		logrus.SetLevel(logrus.WarnLevel)
		logrus.AddHook(logHook{log})
	})
}

func (logHook) Levels() []logrus.Level { return logrus.AllLevels[:logrus.WarnLevel+1] }

func (h logHook) Fire(e *logrus.Entry) error {
	level := slog.LevelDebug // a client's error, which its answer tells
	if status, ok := e.Data["http.response.status"].(int); ok && status >= 500 {
		level = slog.LevelError
	}
	attrs := make([]slog.Attr, 0, 4)
	for _, key := range []string{"err.code", "err.detail", "vars.name", "vars.digest"} {
		if v, ok := e.Data[key]; ok {
			attrs = append(attrs, slog.Any(key, v))
		}
	}
	h.log.LogAttrs(context.Background(), level, "registry: "+e.Message, attrs...)
	return nil
}
