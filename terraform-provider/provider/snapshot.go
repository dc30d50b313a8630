package provider

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/hashicorp/nomad/api"
	"github.com/hashicorp/terraform-plugin-framework/attr"
	"github.com/hashicorp/terraform-plugin-framework/path"
	"github.com/hashicorp/terraform-plugin-framework/resource"
	"github.com/hashicorp/terraform-plugin-framework/resource/schema"
	"github.com/hashicorp/terraform-plugin-framework/resource/schema/planmodifier"
	"github.com/hashicorp/terraform-plugin-framework/resource/schema/stringplanmodifier"
	"github.com/hashicorp/terraform-plugin-framework/types"

	"github.com/cradlestack/cradlestack/csi-plugin/volume"
)

type snapshotResource struct{ *cluster }

func newSnapshot() resource.Resource { return &snapshotResource{} }

type snapshotModel struct {
	ID        types.String `tfsdk:"id"`
	Volume    types.String `tfsdk:"volume"`
	Name      types.String `tfsdk:"name"`
	Namespace types.String `tfsdk:"namespace"`
	Plugin    types.String `tfsdk:"plugin"`
	Size      sizeValue    `tfsdk:"size"`
	Created   types.String `tfsdk:"created_at"`
}

func (r *snapshotResource) Metadata(_ context.Context, req resource.MetadataRequest, resp *resource.MetadataResponse) {
	resp.TypeName = req.ProviderTypeName + "_snapshot"
}

func (r *snapshotResource) Configure(_ context.Context, req resource.ConfigureRequest, _ *resource.ConfigureResponse) {
	r.cluster = configured(req.ProviderData)
}

func (r *snapshotResource) Schema(_ context.Context, _ resource.SchemaRequest, resp *resource.SchemaResponse) {
	kept := []planmodifier.String{stringplanmodifier.UseStateForUnknown()}
	resp.Schema = schema.Schema{
		MarkdownDescription: "A snapshot of a volume, taken when it is applied. Nothing of one changes: another name or volume makes another one. A volume goes back to it by `rollback_to`, another one begins with it by `snapshot_id`.",
		Attributes: map[string]schema.Attribute{
			"id":         schema.StringAttribute{Computed: true, PlanModifiers: kept, MarkdownDescription: "What its plugin calls it: the volume's `external_id`, @ and its name. A volume's `snapshot_id` is this."},
			"volume":     schema.StringAttribute{Required: true, Validators: validName, MarkdownDescription: "The `name` of the volume."},
			"name":       schema.StringAttribute{Required: true, Validators: validName, MarkdownDescription: "Letters, digits, `_`, `.` and `-`. A plugin uses a name once, for all volumes."},
			"namespace":  schema.StringAttribute{Optional: true, Computed: true, PlanModifiers: kept, Validators: notEmpty, MarkdownDescription: "Of the volume. Default: the provider's."},
			"plugin":     schema.StringAttribute{Optional: true, Computed: true, PlanModifiers: kept, Validators: notEmpty, MarkdownDescription: "Of the volume. Default: the provider's."},
			"size":       schema.StringAttribute{CustomType: sizeType{}, Computed: true, PlanModifiers: kept, MarkdownDescription: "What a volume made of it has at least; nothing where the volume has no bound."},
			"created_at": schema.StringAttribute{Computed: true, PlanModifiers: kept, MarkdownDescription: "When it was taken, RFC 3339."},
		},
	}
}

// ModifyPlan shows the defaults, and what makes another snapshot.
func (r *snapshotResource) ModifyPlan(ctx context.Context, req resource.ModifyPlanRequest, resp *resource.ModifyPlanResponse) {
	if req.Plan.Raw.IsNull() || r.cluster == nil {
		return
	}
	var config, plan, state snapshotModel
	resp.Diagnostics.Append(req.Config.Get(ctx, &config)...)
	resp.Diagnostics.Append(req.Plan.Get(ctx, &plan)...)
	if !req.State.Raw.IsNull() {
		resp.Diagnostics.Append(req.State.Get(ctx, &state)...)
	}
	if resp.Diagnostics.HasError() {
		return
	}
	fill(&plan.Namespace, config.Namespace, r.namespace)
	fill(&plan.Plugin, config.Plugin, r.volumePlugin)
	resp.Diagnostics.Append(resp.Plan.Set(ctx, &plan)...)
	if state.ID.IsNull() {
		return
	}
	for _, a := range []struct {
		name         string
		is, to, said attr.Value
	}{
		{"volume", state.Volume, plan.Volume, config.Volume},
		{"name", state.Name, plan.Name, config.Name},
		{"namespace", state.Namespace, plan.Namespace, config.Namespace},
		{"plugin", state.Plugin, plan.Plugin, config.Plugin},
	} {
		if !a.is.Equal(a.to) {
			resp.RequiresReplace.Append(path.Root(a.name))
			resp.Diagnostics.AddAttributeWarning(path.Root(a.name), "The snapshot will be lost", fmt.Sprintf("Nothing of a snapshot can be changed: %s is deleted, and one of today is taken.%s", state.ID.ValueString(), byDefault(a.name, a.said, a.to)))
		}
	}
}

func (m *snapshotModel) read(s *api.CSISnapshot) {
	m.ID, m.Size = types.StringValue(s.ID), m.Size.now(s.SizeBytes) // 0 of a volume without a bound
	m.Created = types.StringValue(time.Unix(s.CreateTime, 0).UTC().Format(time.RFC3339))
}

func (r *snapshotResource) Create(ctx context.Context, req resource.CreateRequest, resp *resource.CreateResponse) {
	var m snapshotModel
	if resp.Diagnostics.Append(req.Plan.Get(ctx, &m)...); resp.Diagnostics.HasError() {
		return
	}
	namespace := m.Namespace.ValueString()
	object := fmt.Sprintf("%s of %s", m.Name.ValueString(), objectID(namespace, m.Volume.ValueString()))
	v, err := r.info(ctx, namespace, m.Volume.ValueString())
	if err == nil {
		ctx = context.WithoutCancel(ctx) // what is made has to be in the state, also of an apply that is interrupted
		_, _, err = r.nomad.CSIVolumes().CreateSnapshot(&api.CSISnapshot{SourceVolumeID: v.ID, Name: m.Name.ValueString(), PluginID: m.Plugin.ValueString()}, r.write(ctx, namespace))
	}
	var made *api.CSISnapshot
	if err == nil { // it is made only once, and so is the one that an apply made which was killed
		made, err = r.snapshot(ctx, namespace, m.Plugin.ValueString(), volume.SnapshotID{Volume: v.ExternalID, Name: m.Name.ValueString()}.String())
	}
	if err == nil && made == nil {
		err = fmt.Errorf("plugin %s does not list it", m.Plugin.ValueString())
	}
	if err != nil {
		resp.Diagnostics.Append(failed("The snapshot was not taken", object, err))
		return
	}
	m.read(made)
	resp.Diagnostics.Append(resp.State.Set(ctx, &m)...)
}

// snapshot finds one by its id, nil where there is none.
func (c *cluster) snapshot(ctx context.Context, namespace, plugin, id string) (found *api.CSISnapshot, err error) {
	err = c.snapshots(ctx, namespace, plugin, func(s *api.CSISnapshot) {
		if s.ID == id {
			found = s
		}
	})
	return found, err
}

// snapshots are all of a plugin.
func (c *cluster) snapshots(ctx context.Context, namespace, plugin string, f func(*api.CSISnapshot)) error {
	for next := ""; ; {
		q := c.query(ctx, namespace)
		q.PerPage, q.NextToken = 1000, next
		resp, _, err := c.nomad.CSIVolumes().ListSnapshotsOpts(&api.CSISnapshotListRequest{PluginID: plugin, QueryOptions: *q})
		if err != nil {
			return err
		}
		for _, s := range resp.Snapshots {
			f(s)
		}
		if next = resp.NextToken; next == "" {
			return nil
		}
	}
}

func (r *snapshotResource) Read(ctx context.Context, req resource.ReadRequest, resp *resource.ReadResponse) {
	var m snapshotModel
	if resp.Diagnostics.Append(req.State.Get(ctx, &m)...); resp.Diagnostics.HasError() {
		return
	}
	s, err := r.snapshot(ctx, m.Namespace.ValueString(), m.Plugin.ValueString(), m.ID.ValueString())
	if err != nil {
		resp.Diagnostics.Append(failed("The snapshots can't be listed", m.ID.ValueString(), err))
		return
	}
	if s == nil {
		resp.State.RemoveResource(ctx)
		return
	}
	m.read(s)
	resp.Diagnostics.Append(resp.State.Set(ctx, &m)...)
}

// Update is never called: every change makes another one.
func (r *snapshotResource) Update(context.Context, resource.UpdateRequest, *resource.UpdateResponse) {
}

func (r *snapshotResource) Delete(ctx context.Context, req resource.DeleteRequest, resp *resource.DeleteResponse) {
	var m snapshotModel
	if resp.Diagnostics.Append(req.State.Get(ctx, &m)...); resp.Diagnostics.HasError() {
		return
	}
	err := r.nomad.CSIVolumes().DeleteSnapshot(&api.CSISnapshot{ID: m.ID.ValueString(), PluginID: m.Plugin.ValueString()}, r.write(ctx, m.Namespace.ValueString()))
	if err != nil && !isNotFound(err) {
		resp.Diagnostics.Append(failed("The snapshot was not deleted", m.ID.ValueString(), err))
	}
}

// ImportState takes NAMESPACE/VOLUME@NAME, by the volume's name in Nomad.
func (r *snapshotResource) ImportState(ctx context.Context, req resource.ImportStateRequest, resp *resource.ImportStateResponse) {
	namespace, id := r.split(req.ID)
	of, name, ok := strings.Cut(id, "@")
	if !ok {
		resp.Diagnostics.AddError("Not a snapshot", fmt.Sprintf("%q: write NAMESPACE/VOLUME@NAME, or VOLUME@NAME of the provider's namespace.", req.ID))
		return
	}
	v, err := r.info(ctx, namespace, of)
	if err != nil {
		resp.Diagnostics.Append(failed("There is no such volume", objectID(namespace, of), err))
		return
	}
	resp.Diagnostics.Append(resp.State.Set(ctx, &snapshotModel{
		ID: types.StringValue(volume.SnapshotID{Volume: v.ExternalID, Name: name}.String()), Volume: types.StringValue(of), Name: types.StringValue(name),
		Namespace: types.StringValue(namespace), Plugin: types.StringValue(v.PluginID),
	})...)
}
