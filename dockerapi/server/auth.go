package server

import (
	"net/http"
	"strings"
	"time"

	registrytypes "github.com/moby/moby/api/types/registry"

	"github.com/cradlestack/cradlestack/dockerapi/registry"
	"github.com/cradlestack/cradlestack/internal/dockerhttp"
)

// loginTime is how long docker login to the embedded registry is good. It can't be called back: who is taken out of the list of clients can push until then.
const loginTime = 12 * time.Hour

// login checks credentials with the registry that they are for. The embedded one knows who asks by how they have come to this server, whatever user and
// password they give: it answers with a token of their namespace, which docker keeps in the password's place and shows wherever it pushes from.
func (s *Server) login(w http.ResponseWriter, r *http.Request, t *tenant) error {
	var a registrytypes.AuthConfig
	if err := dockerhttp.Decode(w, r, &a); err != nil {
		return err
	}
	if s.Registry == nil {
		return dockerhttp.NewError(http.StatusNotFound, noImages)
	}
	answer := registrytypes.AuthResponse{Status: "Login Succeeded"}
	host := registryHost(a.ServerAddress)
	var err error
	if host == s.RegistryHost {
		answer.IdentityToken, err = s.Registry.Token(registry.Grant{Namespace: t.Namespace, Push: true}, loginTime)
	} else {
		err = s.Registry.Login(r.Context(), host, a)
	}
	if err != nil {
		return imageError(err)
	}
	return dockerhttp.Answer(w, http.StatusOK, answer)
}

// registryHost is a registry's HOST[:PORT], which older clients write as an address. None is docker's own.
func registryHost(address string) string {
	address = strings.TrimPrefix(strings.TrimPrefix(address, "https://"), "http://")
	host, _, _ := strings.Cut(address, "/")
	return or(host, "index.docker.io")
}
