package provider

import (
	"context"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/nomad/api"
	"github.com/hashicorp/terraform-plugin-framework/datasource"
	"github.com/hashicorp/terraform-plugin-framework/datasource/schema"
	"github.com/hashicorp/terraform-plugin-framework/diag"
	"github.com/hashicorp/terraform-plugin-framework/types"
)

// A data source reads what there is; it is the same thing for all but its schema and how it is read.
type data[M any] struct {
	*cluster
	name   string
	schema schema.Schema
	read   func(ctx context.Context, c *cluster, m *M) diag.Diagnostics
}

func (d *data[M]) Metadata(_ context.Context, req datasource.MetadataRequest, resp *datasource.MetadataResponse) {
	resp.TypeName = req.ProviderTypeName + "_" + d.name
}

func (d *data[M]) Schema(_ context.Context, _ datasource.SchemaRequest, resp *datasource.SchemaResponse) {
	resp.Schema = d.schema
}

func (d *data[M]) Configure(_ context.Context, req datasource.ConfigureRequest, _ *datasource.ConfigureResponse) {
	d.cluster = configured(req.ProviderData)
}

func (d *data[M]) Read(ctx context.Context, req datasource.ReadRequest, resp *datasource.ReadResponse) {
	var m M
	if resp.Diagnostics.Append(req.Config.Get(ctx, &m)...); resp.Diagnostics.HasError() {
		return
	}
	if resp.Diagnostics.Append(d.read(ctx, d.cluster, &m)...); !resp.Diagnostics.HasError() {
		resp.Diagnostics.Append(resp.State.Set(ctx, &m)...)
	}
}

// or is a text, or what is there in its place.
func or(s types.String, otherwise string) string {
	if s.ValueString() == "" {
		return otherwise
	}
	return s.ValueString()
}

// A volumeView is a volume as a data source shows it.
type volumeView struct {
	ID             types.String `tfsdk:"id"`
	Name           types.String `tfsdk:"name"`
	Namespace      types.String `tfsdk:"namespace"`
	Plugin         types.String `tfsdk:"plugin"`
	Class          types.String `tfsdk:"class"`
	Size           sizeValue    `tfsdk:"size"`
	Zone           types.String `tfsdk:"zone"`
	AccessMode     types.String `tfsdk:"access_mode"`
	AttachmentMode types.String `tfsdk:"attachment_mode"`
	Attach         types.String `tfsdk:"attach"`
	Snapshots      types.String `tfsdk:"snapshots"`
	Parameters     types.Map    `tfsdk:"parameters"`
	SnapshotID     types.String `tfsdk:"snapshot_id"`
	CloneID        types.String `tfsdk:"clone_id"`
	ExternalID     types.String `tfsdk:"external_id"`
	Capacity       types.Int64  `tfsdk:"capacity"`
	Jobs           []string     `tfsdk:"jobs"`
}

func viewVolume(v *api.CSIVolume) volumeView {
	var m volumeModel
	m.read(v)
	jobs := []string{}
	for _, a := range v.Allocations {
		jobs = append(jobs, a.JobID)
	}
	slices.Sort(jobs)
	return volumeView{
		ID: m.ID, Name: m.Name, Namespace: m.Namespace, Plugin: m.Plugin, Class: m.Class, Size: m.Size, Zone: m.Zone, AccessMode: m.AccessMode, AttachmentMode: m.AttachmentMode,
		Attach: m.Attach, Snapshots: m.Snapshots, Parameters: m.Parameters, SnapshotID: m.SnapshotID, CloneID: m.CloneID, ExternalID: m.ExternalID, Capacity: m.Capacity,
		Jobs: slices.Compact(jobs),
	}
}

// volumeAttributes are a volume's; those that find one are given by the configuration.
func volumeAttributes(find bool) map[string]schema.Attribute {
	text := func(description string) schema.Attribute {
		return schema.StringAttribute{Computed: true, MarkdownDescription: description}
	}
	all := map[string]schema.Attribute{
		"id": text("NAMESPACE/NAME."), "name": text("By which pods have it."), "namespace": text("Nomad's namespace."), "plugin": text("The id of its CSI plugin."),
		"class":      text("`nfs`, `gfs` or `lv2`."),
		"size":       schema.StringAttribute{CustomType: sizeType{}, Computed: true, MarkdownDescription: "What was asked for."},
		"capacity":   schema.Int64Attribute{Computed: true, MarkdownDescription: "Bytes that it has."},
		"zone":       text("Where it is."),
		"parameters": schema.MapAttribute{ElementType: types.StringType, Computed: true, MarkdownDescription: "More of the plugin's parameters."},
		"jobs":       schema.ListAttribute{ElementType: types.StringType, Computed: true, MarkdownDescription: "The jobs that have it."},
	}
	for name, description := range map[string]string{
		"access_mode": "Who may have it at once.", "attachment_mode": "`file-system` or `block-device`.", "attach": "`direct` or `host`.", "snapshots": "Snapshots that are taken by schedule.",
		"snapshot_id": "The snapshot whose content it began with.", "clone_id": "The volume whose content it began with.", "external_id": "What its plugin calls it.",
	} {
		all[name] = text(description)
	}
	if find {
		all["name"] = schema.StringAttribute{Required: true, Validators: validName, MarkdownDescription: "By which pods have it."}
		all["namespace"] = schema.StringAttribute{Optional: true, Computed: true, MarkdownDescription: "Nomad's namespace. Default: the provider's."}
	}
	return all
}

func newVolumeData() datasource.DataSource {
	return &data[volumeView]{
		name:   "volume",
		schema: schema.Schema{MarkdownDescription: "A CSI volume that is there, whoever made it.", Attributes: volumeAttributes(true)},
		read: func(ctx context.Context, c *cluster, m *volumeView) (diags diag.Diagnostics) {
			namespace := or(m.Namespace, c.namespace)
			v, err := c.info(ctx, namespace, m.Name.ValueString())
			if err != nil {
				diags.Append(failed("The volume can't be read", objectID(namespace, m.Name.ValueString()), err))
				return diags
			}
			*m = viewVolume(v)
			return nil
		},
	}
}

type volumesModel struct {
	Namespace types.String `tfsdk:"namespace"`
	Plugin    types.String `tfsdk:"plugin"`
	Volumes   []volumeView `tfsdk:"volumes"`
}

func newVolumesData() datasource.DataSource {
	return &data[volumesModel]{
		name: "volumes",
		schema: schema.Schema{
			MarkdownDescription: "All CSI volumes of a namespace, by their names.",
			Attributes: map[string]schema.Attribute{
				"namespace": schema.StringAttribute{Optional: true, MarkdownDescription: "Default: the provider's."},
				"plugin":    schema.StringAttribute{Optional: true, MarkdownDescription: "Only those of this plugin."},
				"volumes":   schema.ListNestedAttribute{Computed: true, NestedObject: schema.NestedAttributeObject{Attributes: volumeAttributes(false)}, MarkdownDescription: "The volumes."},
			},
		},
		read: func(ctx context.Context, c *cluster, m *volumesModel) (diags diag.Diagnostics) {
			namespace := or(m.Namespace, c.namespace)
			all, _, err := c.nomad.CSIVolumes().List(c.query(ctx, namespace))
			if err != nil {
				diags.Append(failed("The volumes can't be listed", namespace, err))
				return diags
			}
			m.Volumes = []volumeView{}
			for _, stub := range all {
				if m.Plugin.ValueString() != "" && stub.PluginID != m.Plugin.ValueString() {
					continue
				}
				v, err := c.info(ctx, stub.Namespace, stub.ID)
				if isNotFound(err) { // it has gone meanwhile
					continue
				}
				if err != nil {
					diags.Append(failed("The volume can't be read", objectID(stub.Namespace, stub.ID), err))
					return diags
				}
				m.Volumes = append(m.Volumes, viewVolume(v))
			}
			slices.SortFunc(m.Volumes, func(a, b volumeView) int { return strings.Compare(a.ID.ValueString(), b.ID.ValueString()) })
			return nil
		},
	}
}

type snapshotsModel struct {
	Namespace types.String   `tfsdk:"namespace"`
	Plugin    types.String   `tfsdk:"plugin"`
	Volume    types.String   `tfsdk:"volume"`
	Snapshots []snapshotView `tfsdk:"snapshots"`
}

type snapshotView struct {
	ID      types.String `tfsdk:"id"`
	Volume  types.String `tfsdk:"volume_external_id"`
	Name    types.String `tfsdk:"name"`
	Size    sizeValue    `tfsdk:"size"`
	Created types.String `tfsdk:"created_at"`
}

func newSnapshotsData() datasource.DataSource {
	return &data[snapshotsModel]{
		name: "snapshots",
		schema: schema.Schema{
			MarkdownDescription: "Snapshots, also those that are taken by schedule, the oldest first.",
			Attributes: map[string]schema.Attribute{
				"namespace": schema.StringAttribute{Optional: true, MarkdownDescription: "Of the volume. Default: the provider's."},
				"plugin":    schema.StringAttribute{Optional: true, MarkdownDescription: "Default: the provider's."},
				"volume":    schema.StringAttribute{Optional: true, Validators: validName, MarkdownDescription: "Only those of the volume of this name."},
				"snapshots": schema.ListNestedAttribute{Computed: true, MarkdownDescription: "The snapshots.", NestedObject: schema.NestedAttributeObject{Attributes: map[string]schema.Attribute{
					"id":                 schema.StringAttribute{Computed: true, MarkdownDescription: "What its plugin calls it; a volume's `snapshot_id` is this."},
					"volume_external_id": schema.StringAttribute{Computed: true, MarkdownDescription: "The `external_id` of the volume."},
					"name":               schema.StringAttribute{Computed: true, MarkdownDescription: "Its name."},
					"size":               schema.StringAttribute{CustomType: sizeType{}, Computed: true, MarkdownDescription: "What a volume made of it has at least."},
					"created_at":         schema.StringAttribute{Computed: true, MarkdownDescription: "When it was taken, RFC 3339."},
				}}},
			},
		},
		read: func(ctx context.Context, c *cluster, m *snapshotsModel) (diags diag.Diagnostics) {
			namespace, plugin, of := or(m.Namespace, c.namespace), or(m.Plugin, c.volumePlugin), ""
			if name := m.Volume.ValueString(); name != "" {
				v, err := c.info(ctx, namespace, name)
				if err != nil {
					diags.Append(failed("The volume can't be read", objectID(namespace, name), err))
					return diags
				}
				of = v.ExternalID
			}
			var all []*api.CSISnapshot
			err := c.snapshots(ctx, namespace, plugin, func(s *api.CSISnapshot) {
				if of == "" || s.ExternalSourceVolumeID == of {
					all = append(all, s)
				}
			})
			if err != nil {
				diags.Append(failed("The snapshots can't be listed", "plugin "+plugin, err))
				return diags
			}
			slices.SortFunc(all, func(a, b *api.CSISnapshot) int {
				if a.CreateTime != b.CreateTime {
					return int(a.CreateTime - b.CreateTime)
				}
				return strings.Compare(a.ID, b.ID)
			})
			m.Snapshots = []snapshotView{}
			for _, s := range all {
				_, name, _ := strings.Cut(s.ID, "@")
				m.Snapshots = append(m.Snapshots, snapshotView{
					ID: types.StringValue(s.ID), Volume: types.StringValue(s.ExternalSourceVolumeID), Name: types.StringValue(name), Size: sizeValue{}.now(s.SizeBytes),
					Created: types.StringValue(time.Unix(s.CreateTime, 0).UTC().Format(time.RFC3339)),
				})
			}
			return nil
		},
	}
}

type nodesModel struct {
	Nodes []nodeView `tfsdk:"nodes"`
}

type nodeView struct {
	ID          types.String `tfsdk:"id"`
	Name        types.String `tfsdk:"name"`
	Address     types.String `tfsdk:"address"`
	Datacenter  types.String `tfsdk:"datacenter"`
	Status      types.String `tfsdk:"status"`
	Eligible    types.Bool   `tfsdk:"eligible"`
	RunsPods    types.Bool   `tfsdk:"runs_pods"`
	Reason      types.String `tfsdk:"reason"`
	Accelerator types.String `tfsdk:"accelerator"`
	Variant     types.String `tfsdk:"variant"`
}

func newNodesData() datasource.DataSource {
	return &data[nodesModel]{
		name: "nodes",
		schema: schema.Schema{
			MarkdownDescription: "The cluster's nodes, by their names, and whether they run pods.",
			Attributes: map[string]schema.Attribute{
				"nodes": schema.ListNestedAttribute{Computed: true, MarkdownDescription: "The nodes.", NestedObject: schema.NestedAttributeObject{Attributes: map[string]schema.Attribute{
					"id":          schema.StringAttribute{Computed: true, MarkdownDescription: "Nomad's id of it."},
					"name":        schema.StringAttribute{Computed: true, MarkdownDescription: "Its name."},
					"address":     schema.StringAttribute{Computed: true, MarkdownDescription: "Its address."},
					"datacenter":  schema.StringAttribute{Computed: true, MarkdownDescription: "Nomad's datacenter."},
					"status":      schema.StringAttribute{Computed: true, MarkdownDescription: "`ready`, `down`, …"},
					"eligible":    schema.BoolAttribute{Computed: true, MarkdownDescription: "Whether it takes new pods."},
					"runs_pods":   schema.BoolAttribute{Computed: true, MarkdownDescription: "Whether its driver is healthy."},
					"reason":      schema.StringAttribute{Computed: true, MarkdownDescription: "What the driver says of itself."},
					"accelerator": schema.StringAttribute{Computed: true, MarkdownDescription: "`kvm` or `tcg`."},
					"variant":     schema.StringAttribute{Computed: true, MarkdownDescription: "The boot package's."},
				}}},
			},
		},
		read: func(ctx context.Context, c *cluster, m *nodesModel) (diags diag.Diagnostics) {
			all, _, err := c.nomad.Nodes().List(c.query(ctx, ""))
			if err != nil {
				diags.Append(failed("The nodes can't be listed", "node:read", err))
				return diags
			}
			slices.SortFunc(all, func(a, b *api.NodeListStub) int { return strings.Compare(a.Name+" "+a.ID, b.Name+" "+b.ID) })
			m.Nodes = []nodeView{}
			for _, n := range all {
				d := n.Drivers["cradle"]
				if d == nil {
					d = &api.DriverInfo{HealthDescription: "it has no driver cradle"}
				}
				m.Nodes = append(m.Nodes, nodeView{
					ID: types.StringValue(n.ID), Name: types.StringValue(n.Name), Address: types.StringValue(n.Address), Datacenter: types.StringValue(n.Datacenter), Status: types.StringValue(n.Status),
					Eligible: types.BoolValue(n.SchedulingEligibility == api.NodeSchedulingEligible), RunsPods: types.BoolValue(d.Healthy), Reason: types.StringValue(d.HealthDescription),
					Accelerator: types.StringValue(d.Attributes["driver.cradle.accelerator"]), Variant: types.StringValue(d.Attributes["driver.cradle.boot.variant"]),
				})
			}
			return nil
		},
	}
}
