package provider

import (
	"context"
	"fmt"
	"time"

	"github.com/hashicorp/terraform-plugin-framework/attr"
	"github.com/hashicorp/terraform-plugin-framework/attr/xattr"
	"github.com/hashicorp/terraform-plugin-framework/diag"
	"github.com/hashicorp/terraform-plugin-framework/function"
	"github.com/hashicorp/terraform-plugin-framework/resource/schema/planmodifier"
	"github.com/hashicorp/terraform-plugin-framework/types/basetypes"
	"github.com/hashicorp/terraform-plugin-go/tftypes"

	"github.com/cradlestack/cradlestack/internal/nomadjob"
	"github.com/cradlestack/cradlestack/spec"
)

// A unit is what a quantity is counted in: bytes of sizes, nanoseconds of durations. Of an attribute that is a quantity, two texts are the same when they say
// the same number of it.
type unit interface {
	name() string
	parse(string) (int64, error)
	format(int64) string
}

type inBytes struct{}

func (inBytes) name() string { return "size" }

func (inBytes) parse(s string) (int64, error) {
	n, err := spec.ParseBytes(s)
	if err == nil && n <= 0 {
		err = fmt.Errorf("size %q: there has to be something", s)
	}
	return int64(n), err
}

func (inBytes) format(n int64) string { return spec.Bytes(n).String() }

type inTime struct{}

func (inTime) name() string { return "duration" }

func (inTime) parse(s string) (int64, error) {
	d, err := time.ParseDuration(s)
	if err != nil || d < 0 {
		return 0, fmt.Errorf("duration %q is not such as 1m30s", s)
	}
	return int64(d), nil
}

func (inTime) format(n int64) string { return time.Duration(n).String() }

type (
	sizeType      = quantityType[inBytes]
	sizeValue     = quantity[inBytes]
	durationType  = quantityType[inTime]
	durationValue = quantity[inTime]
)

type quantityType[U unit] struct{ basetypes.StringType }

func (t quantityType[U]) Equal(o attr.Type) bool {
	_, ok := o.(quantityType[U])
	return ok
}

func (t quantityType[U]) String() string {
	var u U
	return u.name()
}

func (t quantityType[U]) ValueFromString(_ context.Context, in basetypes.StringValue) (basetypes.StringValuable, diag.Diagnostics) {
	return quantity[U]{in}, nil
}

func (t quantityType[U]) ValueFromTerraform(ctx context.Context, in tftypes.Value) (attr.Value, error) {
	v, err := t.StringType.ValueFromTerraform(ctx, in)
	if err != nil {
		return nil, err
	}
	return quantity[U]{v.(basetypes.StringValue)}, nil
}

func (t quantityType[U]) ValueType(context.Context) attr.Value { return quantity[U]{} }

type quantity[U unit] struct{ basetypes.StringValue }

func newSize(n spec.Bytes) sizeValue { return quantityOf[inBytes](int64(n)) }

func newDuration(d time.Duration) durationValue { return quantityOf[inTime](int64(d)) }

func quantityOf[U unit](n int64) quantity[U] {
	var u U
	return quantity[U]{basetypes.NewStringValue(u.format(n))}
}

func (v quantity[U]) Type(context.Context) attr.Type { return quantityType[U]{} }

func (v quantity[U]) Equal(o attr.Value) bool {
	other, ok := o.(quantity[U])
	return ok && v.StringValue.Equal(other.StringValue)
}

// number is 0 where nothing is said, or not yet.
func (v quantity[U]) number() int64 {
	var u U
	n, _ := u.parse(v.ValueString()) // validated
	return n
}

func (v quantity[U]) known() bool { return !v.IsNull() && !v.IsUnknown() }

// or is the number as a time, or what is so where nothing is said, or not yet.
func (v quantity[U]) or(otherwise time.Duration) time.Duration {
	if v.known() {
		return v.duration()
	}
	return otherwise
}

// same says whether both are known, and of the same number.
func (v quantity[U]) same(o quantity[U]) bool {
	return v.known() && o.known() && v.number() == o.number()
}

// now is the value for a number that was read: the text that is there where it says so, and null for what nobody has said.
func (v quantity[U]) now(n int64) quantity[U] {
	if v.known() && v.number() == n {
		return v
	}
	if n == 0 {
		return quantity[U]{basetypes.NewStringNull()}
	}
	return quantityOf[U](n)
}

// StringSemanticEquals keeps the text that is there where a new one says the same.
func (v quantity[U]) StringSemanticEquals(_ context.Context, o basetypes.StringValuable) (bool, diag.Diagnostics) {
	other, ok := o.(quantity[U])
	return ok && v.same(other), nil
}

func (v quantity[U]) ValidateAttribute(_ context.Context, req xattr.ValidateAttributeRequest, resp *xattr.ValidateAttributeResponse) {
	if !v.known() {
		return
	}
	var u U
	if _, err := u.parse(v.ValueString()); err != nil {
		resp.Diagnostics.AddAttributeError(req.Path, "Not a "+u.name(), err.Error())
	}
}

// sameQuantity is the plan modifier that keeps a quantity which is only written in another way.
type sameQuantity[U unit] struct{}

func (sameQuantity[U]) Description(context.Context) string {
	return "Two texts for the same number are no change."
}

func (m sameQuantity[U]) MarkdownDescription(ctx context.Context) string { return m.Description(ctx) }

func (sameQuantity[U]) PlanModifyString(_ context.Context, req planmodifier.StringRequest, resp *planmodifier.StringResponse) {
	if was, is := (quantity[U]{req.StateValue}), (quantity[U]{req.PlanValue}); was.same(is) {
		resp.PlanValue = req.StateValue
	}
}

// sameMemory is the plan modifier that keeps a pod's memory which is the same to a job, as it has whole MiB.
type sameMemory struct{}

func (sameMemory) Description(context.Context) string {
	return "Two texts for the same number of whole MiB are no change."
}

func (m sameMemory) MarkdownDescription(ctx context.Context) string { return m.Description(ctx) }

func (sameMemory) PlanModifyString(_ context.Context, req planmodifier.StringRequest, resp *planmodifier.StringResponse) {
	was, is := sizeValue{req.StateValue}, sizeValue{req.PlanValue}
	if was.known() && is.known() && nomadjob.MemoryMB(spec.Bytes(was.number())) == nomadjob.MemoryMB(spec.Bytes(is.number())) {
		resp.PlanValue = req.StateValue
	}
}

// sizeFunction is provider::cradle::size.
type sizeFunction struct{}

func newSizeFunction() function.Function { return sizeFunction{} }

func (sizeFunction) Metadata(_ context.Context, _ function.MetadataRequest, resp *function.MetadataResponse) {
	resp.Name = "size"
}

func (sizeFunction) Definition(_ context.Context, _ function.DefinitionRequest, resp *function.DefinitionResponse) {
	resp.Definition = function.Definition{
		Summary:             "The number of bytes that a size says",
		MarkdownDescription: "Reads a size as this provider's attributes do: `10GiB` and `10G` are powers of 1024, `10 GB` of 1000.",
		Parameters:          []function.Parameter{function.StringParameter{Name: "size", MarkdownDescription: "Such as `512MiB`."}},
		Return:              function.Int64Return{},
	}
}

func (sizeFunction) Run(ctx context.Context, req function.RunRequest, resp *function.RunResponse) {
	var text string
	if resp.Error = req.Arguments.Get(ctx, &text); resp.Error != nil {
		return
	}
	n, err := spec.ParseBytes(text)
	if err != nil {
		resp.Error = function.NewArgumentFuncError(0, err.Error())
		return
	}
	resp.Error = resp.Result.Set(ctx, int64(n))
}
