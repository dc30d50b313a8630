package provider

import (
	"context"

	"github.com/hashicorp/terraform-plugin-framework/attr"
	"github.com/hashicorp/terraform-plugin-framework/resource"
	"github.com/hashicorp/terraform-plugin-framework/resource/schema"
	"github.com/hashicorp/terraform-plugin-framework/resource/schema/booldefault"
	"github.com/hashicorp/terraform-plugin-framework/resource/schema/int64default"
	"github.com/hashicorp/terraform-plugin-framework/resource/schema/objectdefault"
	"github.com/hashicorp/terraform-plugin-framework/resource/schema/planmodifier"
	"github.com/hashicorp/terraform-plugin-framework/resource/schema/stringdefault"
	"github.com/hashicorp/terraform-plugin-framework/resource/schema/stringplanmodifier"
	"github.com/hashicorp/terraform-plugin-framework/schema/validator"
	"github.com/hashicorp/terraform-plugin-framework/types"

	"github.com/cradlestack/cradlestack/internal/nomadjob"
	"github.com/cradlestack/cradlestack/spec"
)

// Until when an apply waits.
const (
	waitNone    = "none"
	waitRunning = "running"
	waitHealthy = "healthy"
	waitEnded   = "completed"
)

// catalogNomad is Nomad's own list of services.
const catalogNomad = "nomad"

func text(description string, validators ...validator.String) schema.StringAttribute {
	return schema.StringAttribute{Optional: true, MarkdownDescription: description, Validators: validators}
}

func textOf(otherwise, description string, validators ...validator.String) schema.StringAttribute {
	return schema.StringAttribute{Optional: true, Computed: true, Default: stringdefault.StaticString(otherwise), MarkdownDescription: description + " Default: `" + otherwise + "`.", Validators: validators}
}

func number(description string, least, most int64) schema.Int64Attribute {
	return schema.Int64Attribute{Optional: true, MarkdownDescription: description, Validators: []validator.Int64{between{least, most}}}
}

func numberOf(otherwise int64, description string, least, most int64) schema.Int64Attribute {
	a := number(description, least, most)
	a.Computed, a.Default = true, int64default.StaticInt64(otherwise)
	return a
}

func flag(description string) schema.BoolAttribute {
	return schema.BoolAttribute{Optional: true, MarkdownDescription: description}
}

func texts(description string) schema.ListAttribute {
	return schema.ListAttribute{ElementType: types.StringType, Optional: true, MarkdownDescription: description}
}

func named(description string) schema.MapAttribute {
	return schema.MapAttribute{ElementType: types.StringType, Optional: true, MarkdownDescription: description}
}

func bytesOf(otherwise spec.Bytes, description string) schema.StringAttribute {
	a := schema.StringAttribute{CustomType: sizeType{}, Optional: true, MarkdownDescription: description, PlanModifiers: []planmodifier.String{sameQuantity[inBytes]{}}}
	if otherwise != 0 {
		a.Computed, a.Default = true, stringdefault.StaticString(otherwise.String())
	}
	return a
}

func timeOf(otherwise, description string) schema.StringAttribute {
	a := schema.StringAttribute{CustomType: durationType{}, Optional: true, MarkdownDescription: description, PlanModifiers: []planmodifier.String{sameQuantity[inTime]{}}}
	if otherwise != "" {
		a.Computed, a.Default = true, stringdefault.StaticString(otherwise)
	}
	return a
}

// none is the plan modifier of what is an empty list once a plan is applied.
type none struct{}

func (none) Description(context.Context) string               { return "Nothing is left of it." }
func (n none) MarkdownDescription(ctx context.Context) string { return n.Description(ctx) }

func (none) PlanModifyList(_ context.Context, _ planmodifier.ListRequest, resp *planmodifier.ListResponse) {
	resp.PlanValue = types.ListValueMust(types.StringType, []attr.Value{})
}

func (r *podResource) Schema(_ context.Context, _ resource.SchemaRequest, resp *resource.SchemaResponse) {
	kept := []planmodifier.String{stringplanmodifier.UseStateForUnknown()}
	restart, rollout := nomadjob.DefaultRestart, nomadjob.DefaultUpdate
	duration := durationType{}
	memory := bytesOf(spec.DefaultMemory, "What the containers may use together, up to whole MiB. Default: `256MiB`.")
	memory.PlanModifiers = []planmodifier.String{sameMemory{}}
	resp.Schema = schema.Schema{
		MarkdownDescription: "A pod, or several equal ones, that Nomad keeps running: a microVM with one or more containers. Everything but `name`, `namespace` and `once` changes in place: new pods take the place of the former ones, as `rollout` says.",
		Attributes: map[string]schema.Attribute{
			"id":        schema.StringAttribute{Computed: true, PlanModifiers: kept, MarkdownDescription: "NAMESPACE/NAME."},
			"name":      schema.StringAttribute{Required: true, Validators: podName, MarkdownDescription: "Of the job: lower-case letters, digits, `_`, `.` and `-`. Another name is another pod."},
			"namespace": schema.StringAttribute{Optional: true, Computed: true, PlanModifiers: kept, Validators: notEmpty, MarkdownDescription: "Nomad's namespace. Default: the provider's. Another one is another pod."},
			"replicas":  numberOf(1, "How many equal pods. Default: 1.", 0, 10000),
			"cpus":      numberOf(1, "Processors of the machine, 100 MHz of its node reserved for each. Default: 1.", 1, spec.MaxCPUs),
			"memory":    memory,
			"disk":      bytesOf(0, "The disk for what containers write to their images and to scratch volumes. Default: the node's driver's."),
			"hostname":  text("Of all containers. Default: the beginning of the pod's id."),
			"network": schema.StringAttribute{
				Optional: true, Computed: true, Validators: oneOf(networkUser, networkBridge, networkNone),
				MarkdownDescription: "`user`: the pod has a way out, and `port`s in. `bridge`: an address in its node's network as well. `none`. Default: `user`; with `networks`, `bridge`.",
			},
			"zone": text("Only nodes whose `meta.zone` it is."),
			"networks": schema.MapNestedAttribute{
				Optional: true, MarkdownDescription: "The networks on which other pods, docker's too, find this one by its `name`, its `hostname` and `aliases`, and it finds those: by names of a `cradle_network`, or of one that docker has made. Pods of a network are on one node, in its `bridge`.",
				NestedObject: schema.NestedAttributeObject{Attributes: map[string]schema.Attribute{"aliases": texts("More names of the pod there.")}},
			},
			"node": schema.StringAttribute{
				Optional: true, Computed: true, MarkdownDescription: "Only the node of this id. Default: any; with `networks`, the one that these are on.",
			},
			"once": schema.BoolAttribute{
				Optional: true, Computed: true, Default: booldefault.StaticBool(false),
				MarkdownDescription: "Run it to its end, and not again before it is changed. An apply waits for that, and fails when it has failed. Default: `false`: Nomad keeps it running. Another value is another pod.",
			},
			"variant":      text("The boot package that it needs: `default`, `stock`. Default: its node's."),
			"replace_lost": schema.BoolAttribute{Optional: true, Computed: true, Default: booldefault.StaticBool(true), MarkdownDescription: "Start the pod elsewhere when its node is lost. Default: `true`."},
			"restart": schema.SingleNestedAttribute{
				Optional: true, Computed: true, MarkdownDescription: "How a pod that has ended is started again.",
				Attributes: map[string]schema.Attribute{
					"attempts": numberOf(int64(restart.Attempts), "So often on its node within `interval`. Default: 2.", 0, 1000),
					"interval": timeOf(restart.Interval.String(), "Default: `30m`."),
					"delay":    timeOf(restart.Delay.String(), "Before each start. Default: `15s`."),
					"mode":     textOf("fail", "After that: `fail`: elsewhere; `delay`: again in the next interval.", oneOf("fail", "delay")...),
				},
				Default: objectdefault.StaticValue(types.ObjectValueMust(
					map[string]attr.Type{"attempts": types.Int64Type, "interval": duration, "delay": duration, "mode": types.StringType},
					map[string]attr.Value{"attempts": types.Int64Value(int64(restart.Attempts)), "interval": newDuration(restart.Interval), "delay": newDuration(restart.Delay), "mode": types.StringValue("fail")},
				)),
			},
			"rollout": schema.SingleNestedAttribute{
				Optional: true, Computed: true, MarkdownDescription: "How new pods take the place of former ones.",
				Attributes: map[string]schema.Attribute{
					"max_parallel": numberOf(int64(rollout.MaxParallel), "So many at a time. Default: 1.", 1, 10000),
					"min_healthy":  timeOf(rollout.MinHealthy.String(), "How long a new pod has to be well. Default: `10s`."),
					"deadline":     timeOf(rollout.Deadline.String(), "How long it may take until then, pulling images included. Default: `5m`."),
					"auto_revert":  schema.BoolAttribute{Optional: true, Computed: true, Default: booldefault.StaticBool(false), MarkdownDescription: "Go back to what was well before where a new pod is not. Default: `false`."},
				},
				Default: objectdefault.StaticValue(types.ObjectValueMust(
					map[string]attr.Type{"max_parallel": types.Int64Type, "min_healthy": duration, "deadline": duration, "auto_revert": types.BoolType},
					map[string]attr.Value{"max_parallel": types.Int64Value(int64(rollout.MaxParallel)), "min_healthy": newDuration(rollout.MinHealthy), "deadline": newDuration(rollout.Deadline), "auto_revert": types.BoolValue(false)},
				)),
			},
			"wait_for":     schema.StringAttribute{Optional: true, Computed: true, Validators: oneOf(waitNone, waitRunning, waitHealthy, waitEnded), MarkdownDescription: "Until when an apply waits: `healthy`: all pods are well as `rollout` says, by the checks of their `service`s where there are some, and by the `healthcheck`s of their containers; `running`: they have started; `completed`: one that runs `once` has done so; `none`. Default: `healthy`, of one that runs once `completed`."},
			"wait_timeout": timeOf("10m", "How long. Default: `10m`."),
			"status":       schema.StringAttribute{Computed: true, MarkdownDescription: "`running`, `pending`, `completed`, `failed` or `stopped`."},
			"env_index":    schema.Int64Attribute{Computed: true, MarkdownDescription: "Of which version of Nomad's variable the pods have their environment."},
			"beyond":       schema.ListAttribute{ElementType: types.StringType, Computed: true, PlanModifiers: []planmodifier.List{none{}}, MarkdownDescription: "What the job says that no attribute can, by the names that it has in a job's file: an apply takes it away."},
			"instances": schema.ListNestedAttribute{
				Computed: true, MarkdownDescription: "What runs.",
				NestedObject: schema.NestedAttributeObject{Attributes: map[string]schema.Attribute{
					"id":      schema.StringAttribute{Computed: true, MarkdownDescription: "Of the allocation."},
					"node":    schema.StringAttribute{Computed: true, MarkdownDescription: "The name of its node."},
					"status":  schema.StringAttribute{Computed: true, MarkdownDescription: "Nomad's word for it."},
					"address": schema.StringAttribute{Computed: true, MarkdownDescription: "Its own in the bridge network."},
					"images":  schema.MapAttribute{ElementType: types.StringType, Computed: true, MarkdownDescription: "The images that its containers run, by docker's ids of them: `sha256:…`."},
					"ports":   schema.MapAttribute{ElementType: types.StringType, Computed: true, MarkdownDescription: "Where its ports are, such as `80/tcp` at `192.0.2.7:8080`."},
				}},
			},
		},
		Blocks: map[string]schema.Block{
			"container":  schema.ListNestedBlock{MarkdownDescription: "The containers. The first one is the pod's own: volumes are mounted there, and its end is the pod's.", NestedObject: containerBlock()},
			"port":       schema.ListNestedBlock{MarkdownDescription: "Ports of the pod that its node forwards.", NestedObject: portBlock()},
			"service":    schema.ListNestedBlock{MarkdownDescription: "Ports that others find by a name.", NestedObject: serviceBlock()},
			"constraint": schema.ListNestedBlock{MarkdownDescription: "What a node has to be, as in Nomad's jobs.", NestedObject: constraintBlock()},
		},
	}
}

func portBlock() schema.NestedBlockObject {
	return schema.NestedBlockObject{Attributes: map[string]schema.Attribute{
		"port":      schema.Int64Attribute{Required: true, Validators: []validator.Int64{between{1, 65535}}, MarkdownDescription: "Of the pod."},
		"host_port": number("Of the node. Default: a free one.", 1, 65535),
		"host_ip":   text("Only at this address of the node. Default: the one that Nomad has for it."),
		"protocol":  textOf("tcp", "`tcp` or `udp`.", oneOf("tcp", "udp")...),
	}}
}

func serviceBlock() schema.NestedBlockObject {
	return schema.NestedBlockObject{Attributes: map[string]schema.Attribute{
		"name":    schema.StringAttribute{Required: true, MarkdownDescription: "By which it is found."},
		"port":    schema.Int64Attribute{Required: true, Validators: []validator.Int64{between{1, 65535}}, MarkdownDescription: "Of the pod: a `port` of it, or any in the `bridge` network."},
		"catalog": textOf(catalogNomad, "Where: `nomad` or `consul`.", oneOf(catalogNomad, "consul")...),
		"tags":    texts("More about it."),
		"check": schema.SingleNestedAttribute{
			Optional: true, MarkdownDescription: "How it is found out whether it is well.",
			Attributes: map[string]schema.Attribute{
				"type":     textOf("tcp", "`tcp`: it can be connected to; `http`: it answers at `path` with 2xx.", oneOf("tcp", "http")...),
				"path":     text("Of `http`."),
				"interval": timeOf("10s", "Default: `10s`."),
				"timeout":  timeOf("2s", "Default: `2s`."),
			},
		},
	}}
}

func constraintBlock() schema.NestedBlockObject {
	return schema.NestedBlockObject{Attributes: map[string]schema.Attribute{
		"attribute": text("Such as `$${attr.cpu.arch}`."),
		"operator":  textOf("=", "As in Nomad's jobs."),
		"value":     text("Such as `amd64`."),
	}}
}

func containerBlock() schema.NestedBlockObject {
	return schema.NestedBlockObject{
		Attributes: map[string]schema.Attribute{
			"name":       schema.StringAttribute{Required: true, MarkdownDescription: "Unique in the pod."},
			"image":      schema.StringAttribute{Required: true, MarkdownDescription: "A registry's reference, best with its digest; or `oci:DIR` of the node."},
			"entrypoint": texts("In place of the image's, whose command is dropped."),
			"command":    texts("In place of the image's command."),
			"env":        schema.MapAttribute{ElementType: types.StringType, Optional: true, Validators: envNames, MarkdownDescription: "Environment. Nothing secret: it is in Terraform's state, though not in the job's text."},
			"secret_env": schema.MapAttribute{
				ElementType: types.StringType, Optional: true, WriteOnly: true, Sensitive: true, Validators: envNames,
				MarkdownDescription: "More of the environment, which is in no plan and no state: a Nomad variable that the job alone reads. Terraform does not see a change of it: change `secret_env_version` with it.",
			},
			"secret_env_names":   schema.ListAttribute{ElementType: types.StringType, Computed: true, MarkdownDescription: "The names in `secret_env`: a plan shows which come and go, and which an imported pod has."},
			"secret_env_version": text("Another text here brings the values of `secret_env` to the pods."),
			"user":               text("Name or id, with `:group`. Default: the image's."),
			"working_dir":        text("Default: the image's."),
			"stop_signal":        text("Default: the image's."),
			"stop_timeout":       timeOf("", "From the stop signal to the end, of the first container. Default: `10s`."),
			"init":               flag("Run an init that reaps processes as process 1."),
			"read_only":          flag("The image is read-only."),
			"privileged":         flag("All capabilities and devices, of the guest."),
			"cap_add":            texts("Capabilities beyond docker's default set."),
			"cap_drop":           texts("Capabilities taken away."),
			"labels":             named("Docker's labels, such as those of an ingress."),
			"memory":             bytesOf(0, "Most memory of a further container. Default: the pod's."),
			"healthcheck": schema.SingleNestedAttribute{
				Optional: true, MarkdownDescription: "Docker's health check, for `after` of other containers, for docker's API, and for `wait_for`. Default: the image's, which `wait_for` does not heed.",
				Attributes: map[string]schema.Attribute{
					"test":         schema.ListAttribute{ElementType: types.StringType, Required: true, MarkdownDescription: "`[\"CMD\", program, argument…]`, `[\"CMD-SHELL\", line]`, or `[\"NONE\"]`."},
					"interval":     timeOf("", "Default: `30s`."),
					"timeout":      timeOf("", "Default: `30s`."),
					"start_period": timeOf("", "Failures within it do not count. Default: `0s`."),
					"retries":      number("Failures in a row that make it unhealthy. Default: 3.", 1, 1000),
				},
			},
			"restart":       textOf(restartNo, "When the container ends inside of the pod: `no`, `on-failure`, `always`.", oneOf(restartNo, restartOnFailure, restartAlways)...),
			"restart_delay": timeOf("", "Default: docker's, 100ms doubled up to a minute."),
			"max_starts":    number("Counts the first one. Default: no limit.", 1, 1000000),
			"critical":      flag("Its end is the pod's. Default: of the first container `true`, of others `false`."),
			"after": schema.ListNestedAttribute{
				Optional: true, MarkdownDescription: "Containers to wait for.",
				NestedObject: schema.NestedAttributeObject{Attributes: map[string]schema.Attribute{
					"container": schema.StringAttribute{Required: true, MarkdownDescription: "Its name."},
					"until":     text("`started` (the default), `healthy` or `exited`, with success.", oneOf("started", "healthy", "exited")...),
				}},
			},
		},
		Blocks: map[string]schema.Block{
			"mount": schema.ListNestedBlock{MarkdownDescription: "What is mounted: one of `volume`, `scratch` and `host_path`.", NestedObject: schema.NestedBlockObject{Attributes: map[string]schema.Attribute{
				"path":      schema.StringAttribute{Required: true, MarkdownDescription: "Where."},
				"volume":    text("The `name` of a `cradle_volume`, for the first container."),
				"shared":    flag("Of `volume`: other pods may write to it too; of classes nfs and gfs."),
				"scratch":   text("A volume on the pod's own disk, which its containers share by this name."),
				"host_path": text("A directory of the node, where its driver allows it."),
				"subpath":   text("Only this directory of it."),
				"read_only": flag("Read-only."),
				"no_copy":   flag("Leave an empty volume empty, though the image has something there."),
			}}},
		},
	}
}
