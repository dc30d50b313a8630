package driver

import (
	"context"
	"log/slog"
	"slices"
	"time"

	"github.com/hashicorp/go-hclog"
)

func now() time.Time { return time.Now() }

// A hclogHandler writes log/slog's records, which all other packages make, to Nomad's logger.
type hclogHandler struct {
	log    hclog.Logger
	prefix string
	attrs  []any
}

func (h *hclogHandler) Enabled(_ context.Context, l slog.Level) bool {
	return h.log.GetLevel() <= levelOf(l)
}

func levelOf(l slog.Level) hclog.Level {
	switch {
	case l < slog.LevelInfo:
		return hclog.Debug
	case l < slog.LevelWarn:
		return hclog.Info
	case l < slog.LevelError:
		return hclog.Warn
	}
	return hclog.Error
}

func (h *hclogHandler) Handle(_ context.Context, r slog.Record) error {
	args := slices.Clone(h.attrs)
	r.Attrs(func(a slog.Attr) bool {
		args = h.add(args, a)
		return true
	})
	h.log.Log(levelOf(r.Level), r.Message, args...)
	return nil
}

func (h *hclogHandler) add(args []any, a slog.Attr) []any {
	v := a.Value.Resolve()
	if v.Kind() == slog.KindGroup {
		for _, inner := range v.Group() {
			inner.Key = a.Key + "." + inner.Key
			args = h.add(args, inner)
		}
		return args
	}
	value := v.Any()
	if v.Kind() == slog.KindDuration {
		value = v.Duration().String() // JSON would make it a number
	}
	return append(args, h.prefix+a.Key, value)
}

func (h *hclogHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	out := *h
	out.attrs = slices.Clone(h.attrs)
	for _, a := range attrs {
		out.attrs = h.add(out.attrs, a)
	}
	return &out
}

func (h *hclogHandler) WithGroup(name string) slog.Handler {
	if name == "" {
		return h
	}
	out := *h
	out.prefix += name + "."
	return &out
}
