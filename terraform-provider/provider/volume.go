package provider

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/nomad/api"
	"github.com/hashicorp/terraform-plugin-framework/attr"
	"github.com/hashicorp/terraform-plugin-framework/diag"
	"github.com/hashicorp/terraform-plugin-framework/path"
	"github.com/hashicorp/terraform-plugin-framework/resource"
	"github.com/hashicorp/terraform-plugin-framework/resource/schema"
	"github.com/hashicorp/terraform-plugin-framework/resource/schema/booldefault"
	"github.com/hashicorp/terraform-plugin-framework/resource/schema/int64planmodifier"
	"github.com/hashicorp/terraform-plugin-framework/resource/schema/planmodifier"
	"github.com/hashicorp/terraform-plugin-framework/resource/schema/stringdefault"
	"github.com/hashicorp/terraform-plugin-framework/resource/schema/stringplanmodifier"
	"github.com/hashicorp/terraform-plugin-framework/types"

	"github.com/cradlestack/cradlestack/csi-plugin/volume"
	"github.com/cradlestack/cradlestack/internal/nomadjob"
)

const (
	// releaseTimeout is how long is waited for Nomad to take a volume back from pods: as long as what these take to end, or a busy node to let go of it.
	releaseTimeout = 5 * time.Minute
	// freedRetry is the time until a volume that a node still has is asked for again: it tells nobody when it lets go.
	freedRetry = 300 * time.Millisecond
)

// The plugin's parameters that are attributes of their own.
const (
	classParameter     = "class"
	attachParameter    = "attach"
	snapshotsParameter = "snapshots"
	attachDirect       = "direct"
	attachHost         = "host"
)

type volumeResource struct{ *cluster }

func newVolume() resource.Resource { return &volumeResource{} }

type volumeModel struct {
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
	Protected      types.Bool   `tfsdk:"prevent_destroy_if_in_use"`
	RollbackTo     types.String `tfsdk:"rollback_to"`
	Undo           types.String `tfsdk:"undo_snapshot"`
	ExternalID     types.String `tfsdk:"external_id"`
	Capacity       types.Int64  `tfsdk:"capacity"`
}

func (r *volumeResource) Metadata(_ context.Context, req resource.MetadataRequest, resp *resource.MetadataResponse) {
	resp.TypeName = req.ProviderTypeName + "_volume"
}

func (r *volumeResource) Configure(_ context.Context, req resource.ConfigureRequest, _ *resource.ConfigureResponse) {
	r.cluster = configured(req.ProviderData)
}

func (r *volumeResource) Schema(_ context.Context, _ resource.SchemaRequest, resp *resource.SchemaResponse) {
	kept := []planmodifier.String{stringplanmodifier.UseStateForUnknown()}
	resp.Schema = schema.Schema{
		MarkdownDescription: "A CSI volume. It grows in place and never shrinks; every other change makes another volume, and **the content of the former one is lost**.",
		Attributes: map[string]schema.Attribute{
			"id":        schema.StringAttribute{Computed: true, PlanModifiers: kept, MarkdownDescription: "NAMESPACE/NAME."},
			"name":      schema.StringAttribute{Required: true, Validators: validName, MarkdownDescription: "By which pods have it: letters, digits, `_`, `.` and `-`."},
			"namespace": schema.StringAttribute{Optional: true, Computed: true, PlanModifiers: kept, Validators: notEmpty, MarkdownDescription: "Nomad's namespace. Default: the provider's."},
			"plugin":    schema.StringAttribute{Optional: true, Computed: true, PlanModifiers: kept, Validators: notEmpty, MarkdownDescription: "The id of the CSI plugin. Default: the provider's."},
			"class": schema.StringAttribute{
				Optional: true, Computed: true, Default: stringdefault.StaticString(volume.NFS), Validators: oneOf(volume.NFS, volume.LV2, volume.GFS),
				MarkdownDescription: "`nfs`, `gfs`: files, for many pods; `lv2`: a block volume of one host, for one. Default: `nfs`.",
			},
			"size": schema.StringAttribute{
				CustomType: sizeType{}, Optional: true, Computed: true, PlanModifiers: []planmodifier.String{sameQuantity[inBytes]{}, stringplanmodifier.UseStateForUnknown()},
				MarkdownDescription: "Such as `10GiB` (or `10G`; `10 GB` are powers of 1000). Default: the plugin's: of a block volume 1GiB, of files no bound. Two texts for the same size are no change.",
			},
			"zone": schema.StringAttribute{
				Optional: true, Computed: true, PlanModifiers: kept, Validators: notEmpty, MarkdownDescription: "Where it is made. Default: anywhere; then it is where the plugin has made it.",
			},
			"access_mode": schema.StringAttribute{
				Optional: true, Computed: true, PlanModifiers: kept,
				Validators: oneOf(string(api.CSIVolumeAccessModeSingleNodeReader), string(api.CSIVolumeAccessModeSingleNodeWriter), string(api.CSIVolumeAccessModeMultiNodeReader),
					string(api.CSIVolumeAccessModeMultiNodeSingleWriter), string(api.CSIVolumeAccessModeMultiNodeMultiWriter)),
				MarkdownDescription: "Who may have it at once, by CSI's names. Default: `single-node-writer` of `lv2`, else `multi-node-multi-writer`.",
			},
			"attachment_mode": schema.StringAttribute{
				Optional: true, Computed: true, PlanModifiers: kept, Validators: oneOf(string(api.CSIVolumeAttachmentModeFilesystem), string(api.CSIVolumeAttachmentModeBlockDevice)),
				MarkdownDescription: "`file-system` (the default), or `block-device`.",
			},
			"attach": schema.StringAttribute{
				Optional: true, Computed: true, PlanModifiers: kept, Validators: oneOf(attachHost, attachDirect),
				MarkdownDescription: "`direct`: the guest of a pod has it as a disk of its own, which is fastest and the default of `lv2`. `host`: its node mounts it.",
			},
			"snapshots": schema.StringAttribute{
				Optional: true, Validators: parameter(snapshotsParameter),
				MarkdownDescription: "Snapshots that are taken by schedule, and how many of each are kept: `hourly=24,daily=7,weekly=4,monthly=12`, or some of these.",
			},
			"parameters": schema.MapAttribute{
				ElementType: types.StringType, Optional: true, Validators: pluginParameters,
				MarkdownDescription: "More of the plugin's parameters (`fs`, `pool`, `cold`, `iops`, …): see docs/csi.md.",
			},
			"snapshot_id": schema.StringAttribute{Optional: true, MarkdownDescription: "The `id` of a `cradle_snapshot` whose content it begins with."},
			"clone_id":    schema.StringAttribute{Optional: true, MarkdownDescription: "The `external_id` of a `cradle_volume` whose content it begins with."},
			"prevent_destroy_if_in_use": schema.BoolAttribute{
				Optional: true, Computed: true, Default: booldefault.StaticBool(true),
				MarkdownDescription: "Refuse to delete the volume while pods run that have it. With `false` these are waited for, for 5 minutes. Default: `true`.",
			},
			"rollback_to": schema.StringAttribute{
				Optional: true, MarkdownDescription: "The `name` (or `id`) of a snapshot of this volume, of class `nfs` or `gfs`: another text here makes its content what it was then, once, while pods have it. Needs the provider's `filer`.",
			},
			"undo_snapshot": schema.StringAttribute{Computed: true, PlanModifiers: kept, MarkdownDescription: "The name of the snapshot that has what was there before the last rollback: with it as `rollback_to`, that is undone. It goes with the volume."},
			"external_id":   schema.StringAttribute{Computed: true, PlanModifiers: kept, MarkdownDescription: "What its plugin calls it."},
			"capacity":      schema.Int64Attribute{Computed: true, PlanModifiers: []planmodifier.Int64{int64planmodifier.UseStateForUnknown()}, MarkdownDescription: "Bytes that it has, at least those of `size`."},
		},
	}
}

// ValidateConfig tells what can't be together.
func (r *volumeResource) ValidateConfig(ctx context.Context, req resource.ValidateConfigRequest, resp *resource.ValidateConfigResponse) {
	var m volumeModel
	if resp.Diagnostics.Append(req.Config.Get(ctx, &m)...); resp.Diagnostics.HasError() {
		return
	}
	if m.SnapshotID.ValueString() != "" && m.CloneID.ValueString() != "" { // what is not known yet may be nothing
		resp.Diagnostics.AddAttributeError(path.Root("clone_id"), "Two contents", "A volume begins with the content of a snapshot or of another volume: leave out snapshot_id or clone_id.")
	}
	if m.Class.IsUnknown() {
		return
	}
	block := m.Class.ValueString() == volume.LV2
	if block && !m.RollbackTo.IsNull() {
		resp.Diagnostics.AddAttributeError(path.Root("rollback_to"), "Not of this class", blockRollback)
	}
	if m.Attach.ValueString() == attachDirect && !block {
		resp.Diagnostics.AddAttributeError(path.Root("attach"), "Not of this class", "Only block volumes can be attached by a guest itself: leave it out, or set class = \"lv2\".")
	}
	if mode := m.AccessMode.ValueString(); block && strings.HasPrefix(mode, "multi-") {
		resp.Diagnostics.AddAttributeError(path.Root("access_mode"), "Not of this class", "A block volume is for one node at a time: single-node-writer or single-node-reader-only.")
	}
	if !block && m.AttachmentMode.ValueString() == string(api.CSIVolumeAttachmentModeBlockDevice) {
		resp.Diagnostics.AddAttributeError(path.Root("attachment_mode"), "Not of this class", "Only block volumes are devices: set class = \"lv2\", or leave it out.")
	}
	direct := m.Attach.IsUnknown() || m.Attach.ValueString() == attachDirect || m.Attach.IsNull() && block
	for name := range m.Parameters.Elements() {
		at := path.Root("parameters").AtMapKey(name)
		switch {
		case (name == "iops" || name == "bandwidth") && !direct:
			resp.Diagnostics.AddAttributeError(at, "Not of this volume", "It is kept by the guest's machine: set attach = \"direct\", or leave it out.")
		case name == "cold" && !block:
			resp.Diagnostics.AddAttributeError(at, "Not of this class", "It is for block volumes: set class = \"lv2\", or leave it out.")
		}
	}
}

// ModifyPlan shows defaults that depend on other attributes, says why a volume would be made anew, and refuses to shrink one. What it leaves as it is,
// settled knows as well.
func (r *volumeResource) ModifyPlan(ctx context.Context, req resource.ModifyPlanRequest, resp *resource.ModifyPlanResponse) {
	if req.Plan.Raw.IsNull() || r.cluster == nil {
		return
	}
	var config, plan, state volumeModel
	resp.Diagnostics.Append(req.Config.Get(ctx, &config)...)
	resp.Diagnostics.Append(req.Plan.Get(ctx, &plan)...)
	there := !req.State.Raw.IsNull()
	if there {
		resp.Diagnostics.Append(req.State.Get(ctx, &state)...)
	}
	if resp.Diagnostics.HasError() {
		return
	}
	r.fill(&config, &plan)
	rolls := there && !plan.RollbackTo.IsNull() && !plan.RollbackTo.Equal(state.RollbackTo)
	switch {
	case rolls:
		plan.Undo = types.StringUnknown()
	case there:
		plan.Undo = state.Undo
	default:
		plan.Undo = types.StringNull()
	}
	resp.Diagnostics.Append(resp.Plan.Set(ctx, &plan)...)
	resp.Diagnostics.Append(r.planRollback(there, &plan, &state)...)
	if !there {
		return
	}
	for _, a := range []struct {
		name         string
		is, to, said attr.Value
	}{
		{"name", state.Name, plan.Name, config.Name},
		{"namespace", state.Namespace, plan.Namespace, config.Namespace},
		{"plugin", state.Plugin, plan.Plugin, config.Plugin},
		{"class", state.Class, plan.Class, config.Class},
		{"zone", state.Zone, plan.Zone, config.Zone},
		{"access_mode", state.AccessMode, plan.AccessMode, config.AccessMode},
		{"attachment_mode", state.AttachmentMode, plan.AttachmentMode, config.AttachmentMode},
		{"attach", state.Attach, plan.Attach, config.Attach},
		{"snapshots", state.Snapshots, plan.Snapshots, config.Snapshots},
		{"parameters", state.Parameters, plan.Parameters, config.Parameters},
		{"snapshot_id", state.SnapshotID, plan.SnapshotID, config.SnapshotID},
		{"clone_id", state.CloneID, plan.CloneID, config.CloneID},
	} {
		if !a.is.Equal(a.to) && !(saysNothing(a.is) && saysNothing(a.to)) {
			resp.RequiresReplace.Append(path.Root(a.name))
			resp.Diagnostics.AddAttributeWarning(path.Root(a.name), "The volume's content will be lost",
				fmt.Sprintf("%s of a volume can't be changed: %s is deleted with all that is in it, and made anew.%s", a.name, state.ID.ValueString(), byDefault(a.name, a.said, a.to)))
		}
	}
	if len(resp.RequiresReplace) > 0 {
		resp.Diagnostics.Append(resp.Plan.SetAttribute(ctx, path.Root("undo_snapshot"), types.StringNull())...)
		if rolls {
			resp.Diagnostics.Append(r.planRollback(false, &plan, &state)...)
		}
		return
	}
	if is, to := state.Size, plan.Size; is.known() && to.known() && to.number() < is.number() {
		resp.Diagnostics.AddAttributeError(path.Root("size"), "A volume never shrinks", fmt.Sprintf("%s has %s, which is more than %s: write at least that.", state.ID.ValueString(), is.ValueString(), to.ValueString()))
	}
	if !state.Size.same(plan.Size) && !state.Size.Equal(plan.Size) {
		resp.Diagnostics.Append(resp.Plan.SetAttribute(ctx, path.Root("capacity"), types.Int64Unknown())...)
	}
}

// byDefault tells where a value comes from that is in no configuration.
func byDefault(name string, said, to attr.Value) string {
	if !said.IsNull() || to.IsNull() || to.IsUnknown() {
		return ""
	}
	return fmt.Sprintf(" The configuration says no %s, which is %s by default.", name, to)
}

// saysNothing says whether a text or a map is empty, or not there.
func saysNothing(v attr.Value) bool {
	switch v := v.(type) {
	case types.String:
		return !v.IsUnknown() && v.ValueString() == ""
	case types.Map:
		return !v.IsUnknown() && len(v.Elements()) == 0
	}
	return false
}

// fill sets what the configuration leaves out, where it is known before the volume is made: also where it has said something else before.
func (r *volumeResource) fill(config, plan *volumeModel) {
	fill(&plan.Namespace, config.Namespace, r.namespace)
	fill(&plan.Plugin, config.Plugin, r.volumePlugin)
	if !plan.Namespace.IsUnknown() && !plan.Name.IsUnknown() {
		plan.ID = types.StringValue(objectID(plan.Namespace.ValueString(), plan.Name.ValueString()))
	}
	fill(&plan.AttachmentMode, config.AttachmentMode, defaultAttachmentMode)
	if class := plan.Class.ValueString(); !plan.Class.IsUnknown() {
		fill(&plan.AccessMode, config.AccessMode, nomadjob.AccessMode(class))
		fill(&plan.Attach, config.Attach, defaultAttach(class))
		return
	}
	for into, config := range map[*types.String]types.String{&plan.AccessMode: config.AccessMode, &plan.Attach: config.Attach} {
		if config.IsNull() {
			*into = types.StringUnknown()
		}
	}
}

// fill makes what a configuration leaves out what it is by default.
func fill(plan *types.String, config types.String, otherwise string) {
	if config.IsNull() {
		*plan = types.StringValue(otherwise)
	}
}

// defaultAttachmentMode is that of all classes.
const defaultAttachmentMode = string(api.CSIVolumeAttachmentModeFilesystem)

func defaultAttach(class string) string {
	if class == volume.LV2 {
		return attachDirect
	}
	return attachHost
}

func objectID(namespace, name string) string { return namespace + "/" + name }

// request is the volume that a plan asks for.
func (m *volumeModel) request() *nomadjob.Volume {
	v := &nomadjob.Volume{
		Name: m.Name.ValueString(), Namespace: m.Namespace.ValueString(), Plugin: m.Plugin.ValueString(), Size: m.Size.number(), Zone: m.Zone.ValueString(),
		AccessMode: m.AccessMode.ValueString(), AttachmentMode: m.AttachmentMode.ValueString(), SnapshotID: m.SnapshotID.ValueString(), CloneID: m.CloneID.ValueString(),
		Parameters: map[string]string{classParameter: m.Class.ValueString()},
	}
	if m.Attach.ValueString() == attachDirect {
		v.Parameters[attachParameter] = attachDirect
	}
	if s := m.Snapshots.ValueString(); s != "" {
		v.Parameters[snapshotsParameter] = s
	}
	for name, value := range m.Parameters.Elements() {
		v.Parameters[name] = value.(types.String).ValueString()
	}
	return v
}

// read sets everything to what Nomad says.
func (m *volumeModel) read(v *api.CSIVolume) {
	m.ID = types.StringValue(objectID(v.Namespace, v.ID))
	m.Name, m.Namespace, m.Plugin = types.StringValue(v.ID), types.StringValue(v.Namespace), types.StringValue(v.PluginID)
	m.ExternalID, m.Capacity = types.StringValue(v.ExternalID), types.Int64Value(v.Capacity)
	m.SnapshotID, m.CloneID = nowText(m.SnapshotID, v.SnapshotID), nowText(m.CloneID, v.CloneID)
	if len(v.RequestedCapabilities) == 0 {
		m.AccessMode, m.AttachmentMode = types.StringNull(), types.StringNull()
	} else {
		m.AccessMode, m.AttachmentMode = nowText(m.AccessMode, string(v.RequestedCapabilities[0].AccessMode)), nowText(m.AttachmentMode, string(v.RequestedCapabilities[0].AttachmentMode))
	}
	m.Zone = types.StringNull()
	for _, t := range v.Topologies {
		if t != nil && t.Segments[nomadjob.ZoneSegment] != "" {
			m.Zone = types.StringValue(t.Segments[nomadjob.ZoneSegment])
		}
	}
	// A volume that was only registered has no parameters: its plugin's word is what there is.
	said := v.Parameters
	if len(said) == 0 {
		said = v.Context
	}
	more := maps.Clone(said)
	for _, name := range []string{classParameter, attachParameter, snapshotsParameter} {
		delete(more, name)
	}
	m.Class, m.Attach, m.Snapshots = types.StringValue(volume.NFS), types.StringValue(attachHost), nowText(m.Snapshots, said[snapshotsParameter])
	if class := said[classParameter]; class != "" {
		m.Class = types.StringValue(class)
	}
	if attach := said[attachParameter]; attach != "" {
		m.Attach = types.StringValue(attach)
	}
	m.Parameters = nowMap(m.Parameters, more)
	asked := v.RequestedCapacityMin
	if asked == 0 {
		asked = v.Capacity
	}
	m.Size = m.Size.now(asked)
}

func (r *volumeResource) Create(ctx context.Context, req resource.CreateRequest, resp *resource.CreateResponse) {
	var m volumeModel
	if resp.Diagnostics.Append(req.Plan.Get(ctx, &m)...); resp.Diagnostics.HasError() {
		return
	}
	wanted := m.request().CSI()
	there, err := r.info(ctx, wanted.Namespace, wanted.ID)
	switch {
	case err == nil && !sameVolume(there, wanted):
		resp.Diagnostics.AddAttributeError(path.Root("name"), "There is such a volume",
			fmt.Sprintf("%s exists, and is another one than this configuration has: choose another name, or take it into Terraform's state with\nterraform import ADDRESS %[1]s", m.ID.ValueString()))
		return
	case err == nil: // an apply that was killed had made it
		resp.Diagnostics.AddWarning("The volume was there", m.ID.ValueString()+" is as it should be, and is Terraform's from now on.")
		m.read(there)
	case !isNotFound(err):
		resp.Diagnostics.Append(failed("The volume was not made", m.ID.ValueString(), err))
		return
	default:
		resp.Diagnostics.Append(r.put(ctx, wanted, &m, "The volume was not made")...)
	}
	if !m.ExternalID.IsUnknown() { // it is there
		resp.Diagnostics.Append(resp.State.Set(ctx, &m)...)
	}
}

// sameVolume says whether a volume is what is wanted, down to what it began with.
func sameVolume(is, wanted *api.CSIVolume) bool {
	return is.Name == wanted.Name && is.PluginID == wanted.PluginID && maps.Equal(is.Parameters, wanted.Parameters) && is.RequestedCapacityMin == wanted.RequestedCapacityMin &&
		is.SnapshotID == wanted.SnapshotID && is.CloneID == wanted.CloneID &&
		slices.EqualFunc(is.RequestedCapabilities, wanted.RequestedCapabilities, func(a, b *api.CSIVolumeCapability) bool { return *a == *b })
}

// put makes a volume, or makes it grow, and reads what has come of it.
func (r *volumeResource) put(ctx context.Context, v *api.CSIVolume, m *volumeModel, summary string) (diags diag.Diagnostics) {
	ctx = context.WithoutCancel(ctx) // what is made has to be in the state, also of an apply that is interrupted
	all, _, err := r.nomad.CSIVolumes().Create(v, r.write(ctx, v.Namespace))
	if err != nil {
		diags.Append(failed(summary, objectID(v.Namespace, v.ID), err))
		return diags
	}
	made, err := r.info(ctx, v.Namespace, v.ID)
	if err != nil {
		diags.Append(failed("The volume can't be read", objectID(v.Namespace, v.ID), err))
		if len(all) == 1 {
			m.read(all[0])
		}
		return diags
	}
	m.read(made)
	return nil
}

func (c *cluster) info(ctx context.Context, namespace, name string) (*api.CSIVolume, error) {
	v, _, err := c.nomad.CSIVolumes().Info(name, c.query(ctx, namespace))
	return v, err
}

func (r *volumeResource) Read(ctx context.Context, req resource.ReadRequest, resp *resource.ReadResponse) {
	var m volumeModel
	if resp.Diagnostics.Append(req.State.Get(ctx, &m)...); resp.Diagnostics.HasError() {
		return
	}
	v, err := r.info(ctx, m.Namespace.ValueString(), m.Name.ValueString())
	if isNotFound(err) {
		resp.State.RemoveResource(ctx)
		return
	}
	if err != nil {
		resp.Diagnostics.Append(failed("The volume can't be read", m.ID.ValueString(), err))
		return
	}
	m.read(v)
	resp.Diagnostics.Append(resp.State.Set(ctx, &m)...)
}

// Update makes a volume grow, and rolls it back: nothing else of it changes in place. It grows first: what was in it then may not fit otherwise.
func (r *volumeResource) Update(ctx context.Context, req resource.UpdateRequest, resp *resource.UpdateResponse) {
	var m, state volumeModel
	resp.Diagnostics.Append(req.Plan.Get(ctx, &m)...)
	if resp.Diagnostics.Append(req.State.Get(ctx, &state)...); resp.Diagnostics.HasError() {
		return
	}
	rolls := !m.RollbackTo.IsNull() && !m.RollbackTo.Equal(state.RollbackTo)
	to := m.RollbackTo
	if m.Undo.IsUnknown() {
		m.RollbackTo, m.Undo = state.RollbackTo, state.Undo // until it is done
	}
	if state.Size.same(m.Size) || !m.Size.known() { // Nomad has nothing to do
		m.Capacity, m.Size = state.Capacity, state.Size
	} else if r.grow(ctx, &m, resp); resp.Diagnostics.HasError() {
		return
	}
	if rolls {
		asked := m
		asked.RollbackTo = to
		undo, diags := r.rollback(ctx, &asked)
		if resp.Diagnostics.Append(diags...); !diags.HasError() {
			m.RollbackTo, m.Undo = to, types.StringValue(undo)
		}
	}
	resp.Diagnostics.Append(resp.State.Set(ctx, &m)...)
}

func (r *volumeResource) grow(ctx context.Context, m *volumeModel, resp *resource.UpdateResponse) {
	v, err := r.info(ctx, m.Namespace.ValueString(), m.Name.ValueString())
	if err != nil {
		resp.Diagnostics.Append(failed("The volume did not grow", m.ID.ValueString(), err))
		return
	}
	v.RequestedCapacityMin, v.RequestedCapacityMax = m.Size.number(), 0
	if v.MountOptions == nil {
		v.MountOptions = &api.CSIMountOptions{}
	}
	resp.Diagnostics.Append(r.put(ctx, v, m, "The volume did not grow")...)
}

func (r *volumeResource) Delete(ctx context.Context, req resource.DeleteRequest, resp *resource.DeleteResponse) {
	var m volumeModel
	if resp.Diagnostics.Append(req.State.Get(ctx, &m)...); resp.Diagnostics.HasError() {
		return
	}
	namespace, name := m.Namespace.ValueString(), m.Name.ValueString()
	ctx, cancel := context.WithTimeout(ctx, releaseTimeout)
	defer cancel()
	users, err := r.release(ctx, namespace, name, m.Protected.IsNull() || m.Protected.ValueBool())
	if len(users) > 0 {
		resp.Diagnostics.AddError("The volume is in use", fmt.Sprintf("%s: %s has it. Stop that first, or let the volume wait for it with prevent_destroy_if_in_use = false.", m.ID.ValueString(), strings.Join(users, ", ")))
		return
	}
	if err == nil {
		err = r.deleteFreed(ctx, namespace, name)
	}
	if err != nil && !isNotFound(err) {
		resp.Diagnostics.Append(failed("The volume was not deleted", m.ID.ValueString(), err))
	}
}

// release waits until Nomad has taken a volume back from all pods. With protected those that run are returned instead of waited for; at the end of ctx, too.
func (c *cluster) release(ctx context.Context, namespace, name string, protected bool) (users []string, err error) {
	q := c.query(ctx, namespace)
	for {
		v, meta, err := c.nomad.CSIVolumes().Info(name, q)
		if err != nil {
			if ctx.Err() != nil && len(users) > 0 {
				return users, nil
			}
			return nil, err
		}
		users = nil
		for _, a := range v.Allocations {
			if a.DesiredStatus == api.AllocDesiredStatusRun && (a.ClientStatus == api.AllocClientStatusRunning || a.ClientStatus == api.AllocClientStatusPending) {
				users = append(users, "job "+a.JobID)
			}
		}
		slices.Sort(users)
		users = slices.Compact(users)
		if protected && len(users) > 0 {
			return users, nil
		}
		if len(v.ReadAllocs)+len(v.WriteAllocs) == 0 {
			return nil, nil
		}
		q.WaitIndex = meta.LastIndex
	}
}

// deleteFreed removes a volume when its node has let go of it. At the end of ctx it returns what kept the volume. Nomad may have it deleted already, for a Terraform that was killed.
func (c *cluster) deleteFreed(ctx context.Context, namespace, name string) error {
	var busy error
	for {
		err := c.nomad.CSIVolumes().DeleteOpts(&api.CSIVolumeDeleteRequest{ExternalVolumeID: name}, c.write(ctx, namespace))
		switch {
		case err == nil, nomadjob.IsVolumeGone(err, name):
			return nil
		case ctx.Err() != nil:
			return cmp.Or(busy, err)
		case !strings.Contains(err.Error(), "in use"):
			return err
		}
		busy = err
		select {
		case <-time.After(freedRetry):
		case <-ctx.Done():
			return busy
		}
	}
}

func (r *volumeResource) ImportState(ctx context.Context, req resource.ImportStateRequest, resp *resource.ImportStateResponse) {
	namespace, name := r.split(req.ID)
	m := volumeModel{Name: types.StringValue(name), Namespace: types.StringValue(namespace), Protected: types.BoolValue(true), Parameters: types.MapNull(types.StringType)}
	resp.Diagnostics.Append(resp.State.Set(ctx, &m)...)
}

// split reads NAMESPACE/NAME, or NAME of the provider's namespace.
func (c *cluster) split(id string) (namespace, name string) {
	if namespace, name, ok := strings.Cut(id, "/"); ok {
		return namespace, name
	}
	return c.namespace, id
}
