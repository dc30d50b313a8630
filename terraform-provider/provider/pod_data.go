package provider

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/hashicorp/nomad/api"
	"github.com/hashicorp/terraform-plugin-framework/datasource"
	"github.com/hashicorp/terraform-plugin-framework/datasource/schema"
	"github.com/hashicorp/terraform-plugin-framework/diag"
	"github.com/hashicorp/terraform-plugin-framework/types"
)

// A podView is a pod as a data source shows it.
type podView struct {
	ID         types.String    `tfsdk:"id"`
	Name       types.String    `tfsdk:"name"`
	Namespace  types.String    `tfsdk:"namespace"`
	Replicas   types.Int64     `tfsdk:"replicas"`
	CPUs       types.Int64     `tfsdk:"cpus"`
	Memory     sizeValue       `tfsdk:"memory"`
	Status     types.String    `tfsdk:"status"`
	Containers []containerView `tfsdk:"containers"`
	Instances  types.List      `tfsdk:"instances"`
}

type containerView struct {
	Name   types.String `tfsdk:"name"`
	Image  types.String `tfsdk:"image"`
	Labels types.Map    `tfsdk:"labels"`
}

func (c *cluster) viewPod(ctx context.Context, f *foundPod, ask bool) (podView, diag.Diagnostics) {
	var m podModel
	diags := c.view(ctx, f, &m, ask)
	v := podView{ID: m.ID, Name: m.Name, Namespace: m.Namespace, Replicas: m.Replicas, CPUs: m.CPUs, Memory: m.Memory, Status: m.Status, Instances: m.Instances, Containers: []containerView{}}
	for i := range m.Containers {
		v.Containers = append(v.Containers, containerView{m.Containers[i].Name, m.Containers[i].Image, m.Containers[i].Labels})
	}
	return v, diags
}

// podAttributes are a pod's; those that find one are given by the configuration.
func podAttributes(find bool) map[string]schema.Attribute {
	text := func(description string) schema.Attribute {
		return schema.StringAttribute{Computed: true, MarkdownDescription: description}
	}
	all := map[string]schema.Attribute{
		"id": text("NAMESPACE/NAME."), "name": text("Of the job."), "namespace": text("Nomad's namespace."),
		"replicas": schema.Int64Attribute{Computed: true, MarkdownDescription: "How many equal pods."},
		"cpus":     schema.Int64Attribute{Computed: true, MarkdownDescription: "Processors of the machine."},
		"memory":   schema.StringAttribute{CustomType: sizeType{}, Computed: true, MarkdownDescription: "What the containers may use together."},
		"status":   text("`running`, `pending`, `completed`, `failed` or `stopped`."),
		"containers": schema.ListNestedAttribute{Computed: true, MarkdownDescription: "The containers.", NestedObject: schema.NestedAttributeObject{Attributes: map[string]schema.Attribute{
			"name": text("Its name."), "image": text("Its image."), "labels": schema.MapAttribute{ElementType: types.StringType, Computed: true, MarkdownDescription: "Docker's labels."},
		}}},
		"instances": schema.ListNestedAttribute{Computed: true, MarkdownDescription: "What runs.", NestedObject: schema.NestedAttributeObject{Attributes: map[string]schema.Attribute{
			"id": text("Of the allocation."), "node": text("The name of its node."), "status": text("Nomad's word for it."), "address": text("Its own in the bridge network."),
			"images": schema.MapAttribute{ElementType: types.StringType, Computed: true, MarkdownDescription: "The images that its containers run, by docker's ids of them: `sha256:…`. Not in `cradle_pods`, which asks Nomad alone."},
			"ports":  schema.MapAttribute{ElementType: types.StringType, Computed: true, MarkdownDescription: "Where its ports are, such as `80/tcp` at `192.0.2.7:8080`."},
		}}},
	}
	if find {
		all["name"] = schema.StringAttribute{Required: true, MarkdownDescription: "Of the job."}
		all["namespace"] = schema.StringAttribute{Optional: true, Computed: true, MarkdownDescription: "Nomad's namespace. Default: the provider's."}
	}
	return all
}

func newPodData() datasource.DataSource {
	return &data[podView]{
		name:   "pod",
		schema: schema.Schema{MarkdownDescription: "A pod, whoever made it.", Attributes: podAttributes(true)},
		read: func(ctx context.Context, c *cluster, m *podView) (diags diag.Diagnostics) {
			namespace, name := or(m.Namespace, c.namespace), m.Name.ValueString()
			f, err := c.pod(ctx, namespace, name)
			if err == nil && f == nil {
				err = fmt.Errorf("there is no such job")
			}
			if err != nil {
				diags.Append(failed("The pod can't be read", objectID(namespace, name), err))
				return diags
			}
			*m, diags = c.viewPod(ctx, f, true)
			return diags
		},
	}
}

type podsModel struct {
	Namespace types.String `tfsdk:"namespace"`
	Prefix    types.String `tfsdk:"prefix"`
	Pods      []podView    `tfsdk:"pods"`
}

func newPodsData() datasource.DataSource {
	return &data[podsModel]{
		name: "pods",
		schema: schema.Schema{
			MarkdownDescription: "All pods of a namespace that Nomad keeps running, by their names. Other jobs are left out.",
			Attributes: map[string]schema.Attribute{
				"namespace": schema.StringAttribute{Optional: true, MarkdownDescription: "Default: the provider's."},
				"prefix":    schema.StringAttribute{Optional: true, MarkdownDescription: "Only those whose names begin so."},
				"pods":      schema.ListNestedAttribute{Computed: true, NestedObject: schema.NestedAttributeObject{Attributes: podAttributes(false)}, MarkdownDescription: "The pods."},
			},
		},
		read: func(ctx context.Context, c *cluster, m *podsModel) (diags diag.Diagnostics) {
			namespace := or(m.Namespace, c.namespace)
			q := c.query(ctx, namespace)
			q.Prefix = m.Prefix.ValueString()
			all, _, err := c.nomad.Jobs().List(q)
			if err != nil {
				diags.Append(failed("The pods can't be listed", namespace, err))
				return diags
			}
			m.Pods = []podView{}
			for _, stub := range all {
				if stub.Type != api.JobTypeService {
					continue
				}
				f, err := c.pod(ctx, stub.Namespace, stub.ID)
				if isAnswer(err) {
					diags.Append(failed("The pod can't be read", objectID(stub.Namespace, stub.ID), err))
					return diags
				}
				if err != nil || f == nil { // no pod, or it has gone meanwhile
					continue
				}
				v, d := c.viewPod(ctx, f, false)
				if diags.Append(d...); d.HasError() {
					return diags
				}
				m.Pods = append(m.Pods, v)
			}
			slices.SortFunc(m.Pods, func(a, b podView) int { return strings.Compare(a.ID.ValueString(), b.ID.ValueString()) })
			return nil
		},
	}
}
