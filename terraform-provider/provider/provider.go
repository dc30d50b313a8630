// Package provider is the Terraform provider cradle: pods, volumes and snapshots of a Nomad cluster as resources and data sources. It keeps nothing of
// its own: what it knows it has from Nomad, by the same translation of pods into jobs that docker's API uses (internal/nomadjob).
package provider

import (
	"context"
	"os"
	"time"

	"github.com/hashicorp/nomad/api"
	"github.com/hashicorp/terraform-plugin-framework/datasource"
	"github.com/hashicorp/terraform-plugin-framework/diag"
	"github.com/hashicorp/terraform-plugin-framework/function"
	"github.com/hashicorp/terraform-plugin-framework/path"
	"github.com/hashicorp/terraform-plugin-framework/provider"
	"github.com/hashicorp/terraform-plugin-framework/provider/schema"
	"github.com/hashicorp/terraform-plugin-framework/resource"
	"github.com/hashicorp/terraform-plugin-framework/types"
)

// Address is the provider's in required_providers.
const Address = "registry.terraform.io/cradlestack/cradle"

const (
	// reachTimeout is how long Nomad may take to say that it is there.
	reachTimeout = 15 * time.Second
	// volumePlugin is the plugin's id where nothing else is said.
	volumePlugin = "cradle"
)

// New makes providers of a version, one for each of Terraform's connections.
func New(version string) func() provider.Provider {
	return func() provider.Provider { return &cradle{version: version} }
}

type cradle struct {
	version string
	cluster *cluster // once it is configured
}

// A cluster is what a configured provider hands to its resources and data sources.
type cluster struct {
	nomad        *api.Client
	config       *api.Config // the client's
	namespace    string
	volumePlugin string
	filer        string // URL of its API, "" for none
}

type config struct {
	Address      types.String `tfsdk:"address"`
	Namespace    types.String `tfsdk:"namespace"`
	Region       types.String `tfsdk:"region"`
	Token        types.String `tfsdk:"token"`
	CAFile       types.String `tfsdk:"ca_file"`
	CertFile     types.String `tfsdk:"cert_file"`
	KeyFile      types.String `tfsdk:"key_file"`
	VolumePlugin types.String `tfsdk:"volume_plugin"`
	Filer        types.String `tfsdk:"filer"`
}

func (p *cradle) Metadata(_ context.Context, _ provider.MetadataRequest, resp *provider.MetadataResponse) {
	resp.TypeName, resp.Version = "cradle", p.version
}

func (p *cradle) Schema(_ context.Context, _ provider.SchemaRequest, resp *provider.SchemaResponse) {
	resp.Schema = schema.Schema{
		MarkdownDescription: "Pods, volumes and snapshots of a Nomad cluster with the driver and the volumes' plugin of cradlestack.",
		Attributes: map[string]schema.Attribute{
			"address":       schema.StringAttribute{Optional: true, MarkdownDescription: "Nomad's URL. Default: `$NOMAD_ADDR`, else `http://127.0.0.1:4646`."},
			"namespace":     schema.StringAttribute{Optional: true, MarkdownDescription: "Where resources are that name no other. Default: `$NOMAD_NAMESPACE`, else `default`."},
			"region":        schema.StringAttribute{Optional: true, MarkdownDescription: "Default: `$NOMAD_REGION`, else the agent's own."},
			"token":         schema.StringAttribute{Optional: true, Sensitive: true, MarkdownDescription: "The secret of an ACL token. Default: `$NOMAD_TOKEN`."},
			"ca_file":       schema.StringAttribute{Optional: true, MarkdownDescription: "A PEM file with the authority of Nomad's certificate. Default: `$NOMAD_CACERT`, else the system's authorities."},
			"cert_file":     schema.StringAttribute{Optional: true, MarkdownDescription: "A PEM file with the client's certificate. Default: `$NOMAD_CLIENT_CERT`."},
			"key_file":      schema.StringAttribute{Optional: true, MarkdownDescription: "A PEM file with its key. Default: `$NOMAD_CLIENT_KEY`."},
			"filer":         schema.StringAttribute{Optional: true, MarkdownDescription: "The URL of the API of cradle-filer (docs/nfs.md), by which volumes are rolled back: `https://filer.example.org:2050`. The token is sent there. Default: `$" + filerVariable + "`."},
			"volume_plugin": schema.StringAttribute{Optional: true, MarkdownDescription: "The CSI plugin of volumes that name no other. Default: `" + volumePlugin + "`."},
		},
	}
}

func (p *cradle) Configure(ctx context.Context, req provider.ConfigureRequest, resp *provider.ConfigureResponse) {
	var c config
	resp.Diagnostics.Append(req.Config.Get(ctx, &c)...)
	if resp.Diagnostics.HasError() {
		return
	}
	settings := api.DefaultConfig() // reads NOMAD_*
	plugin, filer := volumePlugin, os.Getenv(filerVariable)
	for _, s := range []struct {
		name  string
		value types.String
		into  *string
	}{
		{"address", c.Address, &settings.Address},
		{"namespace", c.Namespace, &settings.Namespace},
		{"region", c.Region, &settings.Region},
		{"token", c.Token, &settings.SecretID},
		{"ca_file", c.CAFile, &settings.TLSConfig.CACert},
		{"cert_file", c.CertFile, &settings.TLSConfig.ClientCert},
		{"key_file", c.KeyFile, &settings.TLSConfig.ClientKey},
		{"volume_plugin", c.VolumePlugin, &plugin},
		{"filer", c.Filer, &filer},
	} {
		switch {
		case s.value.IsUnknown():
			resp.Diagnostics.AddAttributeError(path.Root(s.name), "Not known yet",
				"How Nomad is reached has to be known when the plan is made. Apply what "+s.name+" comes from first (terraform apply -target), or write it down.")
		case s.value.ValueString() != "":
			*s.into = s.value.ValueString()
		}
	}
	for _, name := range []string{settings.TLSConfig.CACert, settings.TLSConfig.ClientCert, settings.TLSConfig.ClientKey} {
		if name == "" {
			continue
		}
		if _, err := os.Stat(name); err != nil {
			resp.Diagnostics.AddError("No TLS with Nomad", err.Error()+": see the provider's ca_file, cert_file and key_file, or NOMAD_CACERT, NOMAD_CLIENT_CERT and NOMAD_CLIENT_KEY")
		}
	}
	if err := checkFiler(filer); err != nil {
		resp.Diagnostics.AddAttributeError(path.Root("filer"), "Not a filer's URL", err.Error()+": see the provider's filer, or $"+filerVariable)
	}
	if resp.Diagnostics.HasError() {
		return
	}
	nomad, err := api.NewClient(settings)
	if err != nil {
		resp.Diagnostics.AddError("No client for Nomad", err.Error()+": see the provider's address, cert_file and key_file, or NOMAD_ADDR, NOMAD_CLIENT_CERT and NOMAD_CLIENT_KEY")
		return
	}
	resp.Diagnostics.Append(greet(ctx, nomad, settings)...)
	known := &cluster{nomad: nomad, config: settings, namespace: settings.Namespace, volumePlugin: plugin, filer: filer}
	if known.namespace == "" {
		known.namespace = api.DefaultNamespace
	}
	p.cluster = known
	resp.ResourceData, resp.DataSourceData = known, known
}

// greet asks Nomad whether it is there, and whose token it is: what is wrong with either is told once, and not by each resource.
func greet(ctx context.Context, nomad *api.Client, settings *api.Config) (diags diag.Diagnostics) {
	ctx, cancel := context.WithTimeout(ctx, reachTimeout)
	defer cancel()
	q := (&api.QueryOptions{}).WithContext(ctx)
	if _, err := nomad.Raw().Query("/v1/status/leader", new(string), q); err != nil {
		diags.AddError("Nomad can't be reached", settings.Address+": "+reason(err)+"\nSee the provider's address, or $NOMAD_ADDR.")
		return diags
	}
	if settings.SecretID == "" {
		return nil // what nobody may do without a token says so itself
	}
	if _, _, err := nomad.ACLTokens().Self(q); err != nil && !saysACLsOff(err) {
		diags.AddError("Nomad does not know this token", settings.Address+": "+reason(err)+"\nSee the provider's token, or $NOMAD_TOKEN.")
	}
	return diags
}

func (p *cradle) Resources(context.Context) []func() resource.Resource {
	return []func() resource.Resource{newPod, newVolume, newSnapshot, newNetwork}
}

func (p *cradle) DataSources(context.Context) []func() datasource.DataSource {
	return []func() datasource.DataSource{newPodData, newPodsData, newVolumeData, newVolumesData, newSnapshotsData, newNodesData}
}

func (p *cradle) Functions(context.Context) []func() function.Function {
	return []func() function.Function{newSizeFunction}
}

// configured is the cluster that Configure made; nil while Terraform only validates.
func configured(data any) *cluster {
	c, _ := data.(*cluster)
	return c
}

func (c *cluster) query(ctx context.Context, namespace string) *api.QueryOptions {
	return (&api.QueryOptions{Namespace: namespace, WaitTime: longestWait}).WithContext(ctx)
}

// longestWait is how long a query waits for a change: the index that Nomad gives with an answer may be that of a change which came after it was read, and would be waited for in vain.
const longestWait = 5 * time.Second

func (c *cluster) write(ctx context.Context, namespace string) *api.WriteOptions {
	return (&api.WriteOptions{Namespace: namespace}).WithContext(ctx)
}
