package provider

import (
	"context"
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/hashicorp/terraform-plugin-framework/schema/validator"
	"github.com/hashicorp/terraform-plugin-framework/types"

	"github.com/cradlestack/cradlestack/csi-plugin/volume"
)

// A rule is a validator of texts: problem is what is wrong with one, "" for nothing.
type rule struct {
	describes string
	problem   func(string) string
}

func (r rule) Description(context.Context) string         { return r.describes }
func (r rule) MarkdownDescription(context.Context) string { return r.describes }

func (r rule) ValidateString(_ context.Context, req validator.StringRequest, resp *validator.StringResponse) {
	if req.ConfigValue.IsNull() || req.ConfigValue.IsUnknown() {
		return
	}
	if problem := r.problem(req.ConfigValue.ValueString()); problem != "" {
		resp.Diagnostics.AddAttributeError(req.Path, "Not possible", problem)
	}
}

// oneOf allows these texts.
func oneOf(allowed ...string) []validator.String {
	list := strings.Join(allowed, ", ")
	return []validator.String{rule{"one of " + list, func(s string) string {
		for _, a := range allowed {
			if s == a {
				return ""
			}
		}
		return fmt.Sprintf("%q is none of %s", s, list)
	}}}
}

// validName is that of volumes and snapshots.
var validName = []validator.String{rule{"letters, digits, _ . and -", func(s string) string {
	if !volume.ValidName(s) {
		return fmt.Sprintf("%q is no name: write letters, digits, _, . and -, a letter or digit first, at most %d", s, volume.MaxName)
	}
	return ""
}}}

// notEmpty is for what has a default: an empty text is none.
var notEmpty = []validator.String{rule{"not empty", func(s string) string {
	if s == "" {
		return "It is empty: leave it out (null) for the default."
	}
	return ""
}}}

// parameter is what the plugin has to say of one of its parameters.
func parameter(name string) []validator.String {
	return []validator.String{rule{"as the volumes' plugin reads it", func(s string) string { return parameterProblem(name, s) }}}
}

func parameterProblem(name, value string) string {
	m := map[string]string{name: value}
	// What these depend on are other attributes, which are looked at as a whole.
	switch name {
	case "iops", "bandwidth":
		m[attachParameter] = attachDirect
	case "cold":
		m[classParameter] = volume.LV2
	}
	if _, err := volume.ParseParameters(m); err != nil {
		return err.Error()
	}
	return ""
}

// pluginParameters validates a map of the plugin's parameters, each by its name.
var pluginParameters = []validator.Map{parameterMap{}}

type parameterMap struct{}

func (parameterMap) Description(context.Context) string { return "parameters of the volumes' plugin" }

func (p parameterMap) MarkdownDescription(ctx context.Context) string {
	return p.Description(ctx)
}

func (parameterMap) ValidateMap(_ context.Context, req validator.MapRequest, resp *validator.MapResponse) {
	for name, v := range req.ConfigValue.Elements() {
		at := req.Path.AtMapKey(name)
		if name == classParameter || name == attachParameter || name == snapshotsParameter {
			resp.Diagnostics.AddAttributeError(at, "Not here", "It is an attribute of the volume: write "+name+" = … beside parameters.")
			continue
		}
		s, ok := v.(types.String)
		if !ok || s.IsUnknown() {
			continue
		}
		if s.IsNull() {
			resp.Diagnostics.AddAttributeError(at, "Not possible", "A parameter has a value: leave it out where there is none.")
		} else if problem := parameterProblem(name, s.ValueString()); problem != "" {
			resp.Diagnostics.AddAttributeError(at, "Not possible", problem)
		}
	}
}

// envNames validates the names in an environment. What is wrong with one is said without its value, which may be a secret.
var envNames = []validator.Map{envMap{}}

type envMap struct{}

func (envMap) Description(context.Context) string               { return "names without =" }
func (e envMap) MarkdownDescription(ctx context.Context) string { return e.Description(ctx) }

func (envMap) ValidateMap(_ context.Context, req validator.MapRequest, resp *validator.MapResponse) {
	for name := range req.ConfigValue.Elements() {
		if name == "" || strings.ContainsAny(name, "=\x00") {
			resp.Diagnostics.AddAttributeError(req.Path.AtMapKey(name), "Not possible", fmt.Sprintf("%q is no name of a variable: write some characters, and no =.", name))
		}
	}
}

// between allows numbers from least to most.
type between struct{ least, most int64 }

func (b between) Description(context.Context) string {
	return fmt.Sprintf("from %d to %d", b.least, b.most)
}
func (b between) MarkdownDescription(ctx context.Context) string { return b.Description(ctx) }

func (b between) ValidateInt64(ctx context.Context, req validator.Int64Request, resp *validator.Int64Response) {
	if n := req.ConfigValue; !n.IsNull() && !n.IsUnknown() && (n.ValueInt64() < b.least || n.ValueInt64() > b.most) {
		resp.Diagnostics.AddAttributeError(req.Path, "Not possible", fmt.Sprintf("%d is not %s", n.ValueInt64(), b.Description(ctx)))
	}
}

// networkName is docker's.
var networkName = []validator.String{rule{"letters, digits, _ . and -", func(s string) string {
	switch {
	case slices.Contains([]string{"bridge", "default", "host", "none"}, s):
		return fmt.Sprintf("%q is a network that docker has for itself: choose another name", s)
	case !networkRule.MatchString(s) || len(s) > 100:
		return fmt.Sprintf("%q is no name: write letters, digits, _, . and -, a letter or digit first, at most 100", s)
	}
	return ""
}}}

var (
	networkRule = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.-]*$`)
	// aliasRule is what a resolver can be asked for.
	aliasRule = regexp.MustCompile(`^[a-zA-Z0-9_]([a-zA-Z0-9_.-]{0,251}[a-zA-Z0-9_])?$`)
)

// podName is a job's and a host's.
var podName = []validator.String{rule{"lower-case letters, digits, _ . and -", func(s string) string {
	for i, r := range s {
		alphanumeric := r >= 'a' && r <= 'z' || r >= '0' && r <= '9'
		if !alphanumeric && (i == 0 || !strings.ContainsRune("_.-", r)) {
			return fmt.Sprintf("%q is no name: write lower-case letters, digits, _, . and -, a letter or digit first", s)
		}
	}
	if s == "" || len(s) > maxPodName && !isDockerName(s) {
		return fmt.Sprintf("%q is no name: it has 1 to %d characters", s, maxPodName)
	}
	return ""
}}}

// maxPodName leaves room for what is put before and behind it.
const maxPodName = 63
