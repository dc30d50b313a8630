package driver

import (
	"fmt"
	"os"

	docker "github.com/docker/cli/cli/config"
	"github.com/docker/cli/cli/config/configfile"
	"github.com/docker/cli/cli/config/types"
	"github.com/google/go-containerregistry/pkg/authn"
)

// keychain is where credentials for registries come from: the task's, then the plugin's helper, then docker's configuration.
func (c *config) keychain(a *taskAuth) (authn.Keychain, error) {
	var chain []authn.Keychain
	if a != nil {
		chain = append(chain, a)
	}
	if c.Auth.Helper != "" {
		f := configfile.New("")
		f.CredentialsStore = c.Auth.Helper
		chain = append(chain, dockerConfig{f})
	}
	if c.Auth.Config == "" {
		return authn.NewMultiKeychain(append(chain, authn.DefaultKeychain)...), nil
	}
	// Read each time: credentials change.
	f, err := os.Open(c.Auth.Config)
	if err != nil {
		return nil, fmt.Errorf("plugin's auth.config: %w", err)
	}
	defer f.Close()
	parsed, err := docker.LoadFromReader(f)
	if err != nil {
		return nil, fmt.Errorf("plugin's auth.config %s: %w", c.Auth.Config, err)
	}
	return authn.NewMultiKeychain(append(chain, dockerConfig{parsed})...), nil
}

// Resolve makes a task's credentials a keychain.
func (a *taskAuth) Resolve(r authn.Resource) (authn.Authenticator, error) {
	if a.Server != "" && a.Server != r.RegistryStr() && a.Server != hubKey(r.RegistryStr()) {
		return authn.Anonymous, nil
	}
	return &authn.Basic{Username: a.Username, Password: a.Password}, nil
}

// hubKey is what docker calls a registry where it keeps credentials: its own by a URL.
func hubKey(registry string) string {
	if registry == "index.docker.io" {
		return authn.DefaultAuthKey
	}
	return registry
}

// A dockerConfig is docker's configuration as a keychain, with its credential helpers.
type dockerConfig struct{ file *configfile.ConfigFile }

// Resolve looks for a repository's own credentials first, as podman's users write them, then for the registry's.
func (d dockerConfig) Resolve(r authn.Resource) (authn.Authenticator, error) {
	for _, key := range []string{r.String(), hubKey(r.RegistryStr())} {
		a, err := d.file.GetAuthConfig(key)
		if err != nil {
			return nil, fmt.Errorf("credentials for %s: %w", key, err)
		}
		a.ServerAddress = "" // it is always there
		if a != (types.AuthConfig{}) {
			return authn.FromConfig(authn.AuthConfig{
				Username: a.Username, Password: a.Password, Auth: a.Auth, IdentityToken: a.IdentityToken, RegistryToken: a.RegistryToken,
			}), nil
		}
	}
	return authn.Anonymous, nil
}
