package registry

import (
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/distribution/distribution/v3/registry/auth"
	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
)

// Service is what tokens are for, and what the registry calls itself in docker's token protocol (distribution docs/spec/auth/token).
const Service = "cradlestack-registry"

const (
	issuer         = "cradle-dockerapi"
	loginAudience  = Service + ":token" // of tokens that /token takes, and nothing else does
	controllerName = "cradlestack"

	// bearerTime is how long what /token gives is good. It is asked for again when it is over.
	bearerTime = 5 * time.Minute
	// maxToken bounds what is looked at as a token.
	maxToken = 8 << 10
	// leeway is how much clocks may differ.
	leeway = 30 * time.Second
)

// A Grant is what the owner of a token may do: pull from and, with Push, push to repositories of one namespace.
type Grant struct {
	Namespace    string
	Push         bool
	Repositories []string // without the namespace, docker.io/library/busybox; nil are all of it
}

// claims are a token's. Whatever has no namespace is no token of ours.
type claims struct {
	jwt.Claims
	Namespace    string   `json:"namespace"`
	Push         bool     `json:"push,omitempty"`
	Repositories []string `json:"repositories,omitempty"`
}

// keyID tells keys apart.
func keyID(key ed25519.PublicKey) string {
	sum := sha256.Sum256(key)
	return base64.RawURLEncoding.EncodeToString(sum[:12])
}

// Token makes a token: the password (with any user's name) of docker login, and of what asks the registry with ordinary credentials.
func (r *Registry) Token(g Grant, valid time.Duration) (string, error) {
	return r.sign(g, valid, loginAudience)
}

func (r *Registry) sign(g Grant, valid time.Duration, audience string) (string, error) {
	if _, err := root(g.Namespace); err != nil {
		return "", err
	}
	public := r.Key.Public().(ed25519.PublicKey)
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.EdDSA, Key: jose.JSONWebKey{Key: r.Key, KeyID: keyID(public)}}, new(jose.SignerOptions).WithType("JWT"))
	if err != nil {
		return "", err
	}
	now := time.Now()
	return jwt.Signed(signer).Claims(claims{
		Claims: jwt.Claims{
			Issuer: issuer, Subject: g.Namespace, Audience: jwt.Audience{audience},
			IssuedAt: jwt.NewNumericDate(now), NotBefore: jwt.NewNumericDate(now), Expiry: jwt.NewNumericDate(now.Add(valid)),
		},
		Namespace: g.Namespace, Push: g.Push, Repositories: g.Repositories,
	}).Serialize()
}

var errToken = errors.New("the token is not valid")

// grantOf verifies a token of ours for an audience.
func (r *Registry) grantOf(token, audience string) (Grant, error) {
	if len(token) > maxToken {
		return Grant{}, errToken
	}
	t, err := jwt.ParseSigned(token, []jose.SignatureAlgorithm{jose.EdDSA})
	if err != nil {
		return Grant{}, errToken
	}
	public := r.Key.Public().(ed25519.PublicKey)
	var c claims
	if len(t.Headers) != 1 || t.Headers[0].KeyID != keyID(public) || t.Claims(public, &c) != nil {
		return Grant{}, errToken
	}
	if err := valid(c.Claims, jwt.Expected{Issuer: issuer, AnyAudience: jwt.Audience{audience}}); err != nil {
		return Grant{}, err
	}
	return Grant{Namespace: c.Namespace, Push: c.Push, Repositories: c.Repositories}, nil
}

// valid checks times and the rest of what is expected. A token without an end is none.
func valid(c jwt.Claims, want jwt.Expected) error {
	want.Time = time.Now()
	if c.Expiry == nil || c.ValidateWithLeeway(want, leeway) != nil {
		return errToken
	}
	return nil
}

// workloadGrant verifies a workload identity of Nomad's: a JWT that Nomad gives to a task and renews. Its audience says what it is for,
// cradlestack-registry/REPOSITORY for each one that the task pulls from; that it is the task's namespace is Nomad's word.
func (r *Registry) workloadGrant(ctx context.Context, token string) (Grant, error) {
	if r.WorkloadKeys == nil || len(token) > maxToken {
		return Grant{}, errToken
	}
	t, err := jwt.ParseSigned(token, []jose.SignatureAlgorithm{jose.RS256, jose.EdDSA})
	if err != nil || len(t.Headers) != 1 || t.Headers[0].KeyID == "" {
		return Grant{}, errToken
	}
	keys, err := r.WorkloadKeys(ctx)
	if err != nil {
		return Grant{}, fmt.Errorf("the keys of Nomad's workload identities: %w", err)
	}
	var c struct {
		jwt.Claims
		Namespace string `json:"nomad_namespace"`
	}
	found := keys.Key(t.Headers[0].KeyID)
	if len(found) != 1 || t.Claims(found[0].Key, &c) != nil || c.Namespace == "" {
		return Grant{}, errToken
	}
	if err := valid(c.Claims, jwt.Expected{}); err != nil {
		return Grant{}, err
	}
	g := Grant{Namespace: c.Namespace}
	for _, a := range c.Audience {
		if repo, ok := strings.CutPrefix(a, Service+"/"); ok {
			g.Repositories = append(g.Repositories, repo)
		}
	}
	if g.Repositories == nil { // it is for somebody else
		return Grant{}, errToken
	}
	return g, nil
}

// allows tells whether the grant covers what a request does.
func (g Grant) allows(a auth.Access) bool {
	top, err := root(g.Namespace)
	if err != nil || a.Type != "repository" || a.Action != "pull" && (a.Action != "push" || !g.Push) {
		return false
	}
	below, ok := strings.CutPrefix(a.Name, top+"/")
	if !ok {
		return false
	}
	return g.Repositories == nil || slices.Contains(g.Repositories, below)
}

func init() {
	if err := auth.Register(controllerName, func(options map[string]any) (auth.AccessController, error) {
		r, ok := options["registry"].(*Registry)
		if !ok {
			return nil, errors.New("an option registry is needed")
		}
		return controller{r}, nil
	}); err != nil {
		panic(err)
	}
}

// A controller decides about each request to the registry.
type controller struct{ registry *Registry }

func (c controller) Authorized(r *http.Request, accesses ...auth.Access) (*auth.Grant, error) {
	challenge := &challenge{registry: c.registry, accesses: accesses}
	kind, token, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	if !strings.EqualFold(kind, "bearer") || token == "" {
		return nil, challenge
	}
	g, err := c.registry.grantOf(token, Service)
	if err != nil {
		challenge.code = "invalid_token"
		return nil, challenge
	}
	grant := &auth.Grant{User: auth.UserInfo{Name: g.Namespace}}
	for _, a := range accesses {
		if !g.allows(a) {
			challenge.code = "insufficient_scope"
			return nil, challenge
		}
		grant.Resources = append(grant.Resources, a.Resource)
	}
	return grant, nil
}

// A challenge says where a token is to be had.
type challenge struct {
	registry *Registry
	accesses []auth.Access
	code     string
}

func (c *challenge) Error() string {
	if c.code != "" {
		return strings.ReplaceAll(c.code, "_", " ")
	}
	return "a token is needed"
}

func (c *challenge) SetHeaders(r *http.Request, w http.ResponseWriter) {
	h := fmt.Sprintf("Bearer realm=%q,service=%q", c.registry.realm(r), Service)
	var scopes []string
	for _, a := range c.accesses {
		scopes = append(scopes, fmt.Sprintf("%s:%s:%s", a.Type, a.Name, a.Action))
	}
	if scopes != nil {
		h += fmt.Sprintf(",scope=%q", strings.Join(scopes, " "))
	}
	if c.code != "" {
		h += fmt.Sprintf(",error=%q", c.code)
	}
	w.Header().Set("WWW-Authenticate", h)
}

// realm is where the client that has sent the request finds /token.
func (r *Registry) realm(req *http.Request) string {
	if r.URL != "" {
		return strings.TrimSuffix(r.URL, "/") + "/token"
	}
	if req.TLS != nil {
		return "https://" + req.Host + "/token"
	}
	return "http://" + req.Host + "/token"
}

// serveToken exchanges a token or a workload identity for one that the registry takes and that is good for minutes. That one allows as much, but can't be
// exchanged again. It is given as a password (GET), or as clients do that keep the token of a login: as a refresh token (POST, OAuth 2.0, RFC 6749 §6).
func (r *Registry) serveToken(w http.ResponseWriter, req *http.Request) {
	var password string
	switch req.Method {
	case http.MethodGet:
		_, password, _ = req.BasicAuth()
	case http.MethodPost:
		req.Body = http.MaxBytesReader(w, req.Body, 2*maxToken)
		password = req.PostFormValue("refresh_token")
		if req.PostFormValue("grant_type") == "password" {
			password = req.PostFormValue("password")
		}
	default:
		w.Header().Set("Allow", "GET, POST")
		http.Error(w, "tokens are had by GET and POST", http.StatusMethodNotAllowed)
		return
	}
	g, err := r.grantOf(password, loginAudience)
	if err != nil {
		g, err = r.workloadGrant(req.Context(), password)
	}
	if err != nil {
		if !errors.Is(err, errToken) {
			r.Log.Error("registry: token", "error", err)
			http.Error(w, "tokens can't be verified at the moment: try again", http.StatusServiceUnavailable)
			return
		}
		w.Header().Set("WWW-Authenticate", fmt.Sprintf("Basic realm=%q", Service))
		http.Error(w, "give a token of your namespace as the password", http.StatusUnauthorized)
		return
	}
	token, err := r.sign(g, bearerTime, Service)
	if err != nil {
		r.Log.Error("registry: token", "error", err)
		http.Error(w, "no token can be made", http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	_ = json.NewEncoder(w).Encode(map[string]any{ // the client has gone
		"token": token, "access_token": token, "expires_in": int(bearerTime.Seconds()), "issued_at": time.Now().UTC().Format(time.RFC3339),
	})
}

// handler guards distribution's own: bodies are bounded, and what makes something refer to blobs waits while garbage is collected.
func (r *Registry) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/token", r.serveToken)
	mux.HandleFunc("/v2/", func(w http.ResponseWriter, req *http.Request) {
		switch req.Method {
		case http.MethodPost, http.MethodPut:
			r.gate.RLock()
			defer r.gate.RUnlock()
		case http.MethodDelete:
			http.Error(w, "images are removed by docker rmi", http.StatusMethodNotAllowed)
			return
		}
		req.Body = http.MaxBytesReader(w, req.Body, r.MaxLayer)
		r.app.ServeHTTP(w, req)
	})
	return mux
}
