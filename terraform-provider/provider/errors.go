package provider

import (
	"errors"
	"net/http"
	"net/url"
	"strings"

	"github.com/hashicorp/nomad/api"
	"github.com/hashicorp/terraform-plugin-framework/diag"
)

// failed makes Nomad's answer a diagnostic: what was done, to what, and why it did not work.
func failed(what, object string, err error) diag.Diagnostic {
	text := reason(err)
	switch {
	case isStatus(err, http.StatusForbidden):
		text += "\nThe provider's token lacks a capability for this; docs/terraform.md lists what is needed."
	case strings.Contains(text, "no CSI plugin") || strings.Contains(text, "plugin not found") || strings.Contains(text, "no such plugin"):
		text += "\nThe cluster's operator has to run the plugin (docs/csi.md), or the resource to name another one."
	}
	return diag.NewErrorDiagnostic(what, object+": "+text)
}

// reason is an error in the words of who found it: Nomad wraps a plugin's in its own layers.
func reason(err error) string {
	text := err.Error()
	var answer api.UnexpectedResponseError
	if errors.As(err, &answer) && answer.HasBody() {
		text = answer.Body()
	}
	if i := strings.LastIndex(text, "desc = "); i >= 0 {
		text = text[i+len("desc = "):]
	}
	return strings.TrimSpace(text)
}

func isStatus(err error, status int) bool {
	var answer api.UnexpectedResponseError
	return errors.As(err, &answer) && answer.StatusCode() == status
}

// isAway says whether Nomad could not be asked, or could not answer: another time it may.
func isAway(err error) bool {
	var answer api.UnexpectedResponseError
	if errors.As(err, &answer) {
		return answer.StatusCode() >= http.StatusInternalServerError
	}
	return errors.As(err, new(*url.Error))
}

func isNotFound(err error) bool { return isStatus(err, http.StatusNotFound) }

func saysACLsOff(err error) bool { return strings.Contains(err.Error(), "ACL support disabled") }

// isAnswer says whether an error is Nomad's, and not about what it has said.
func isAnswer(err error) bool { return errors.As(err, new(api.UnexpectedResponseError)) }
