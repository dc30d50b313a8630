package provider

import (
	"reflect"
	"slices"

	"github.com/hashicorp/terraform-plugin-framework/attr"
	"github.com/hashicorp/terraform-plugin-framework/types"
)

// inOrder keeps a state's order of what has none: a plan that only says the same in another order is no change. Terraform takes such a plan where what is left out
// at each place of the configuration is nothing there in the state (core's plan validity, "assertPlannedValueValid").
func (m *podModel) inOrder(state, config *podModel) {
	m.Ports = ordered(m.Ports, state.Ports, config.Ports)
	m.Services = ordered(m.Services, state.Services, config.Services)
	m.Constraints = ordered(m.Constraints, state.Constraints, config.Constraints)
	for i := range m.Containers {
		if i >= len(state.Containers) || i >= len(config.Containers) {
			return
		}
		c, s := &m.Containers[i], &state.Containers[i]
		c.Mounts = ordered(c.Mounts, s.Mounts, config.Containers[i].Mounts)
		c.CapAdd, c.CapDrop = orderedList(c.CapAdd, s.CapAdd), orderedList(c.CapDrop, s.CapDrop)
	}
}

func ordered[T any](plan, state, config []T) []T {
	if len(plan) != len(state) || len(plan) != len(config) || reflect.DeepEqual(plan, state) {
		return plan
	}
	left := slices.Clone(plan)
	for i := range state {
		at := slices.IndexFunc(left, func(t T) bool { return reflect.DeepEqual(t, state[i]) })
		if at < 0 || !stands(reflect.ValueOf(state[i]), reflect.ValueOf(plan[i]), reflect.ValueOf(config[i])) {
			return plan
		}
		left = slices.Delete(left, at, at+1)
	}
	return state
}

// stands says whether an element of a state can stand in a plan, where the configuration has another one at its place.
func stands(state, plan, config reflect.Value) bool {
	switch {
	case state.Type().Implements(reflect.TypeFor[attr.Value]()):
		s, p, c := state.Interface().(attr.Value), plan.Interface().(attr.Value), config.Interface().(attr.Value)
		byDefault := c.IsNull() && !p.IsNull()
		return byDefault || s.IsNull() == c.IsNull()
	case state.Kind() == reflect.Pointer:
		return state.IsNil() == config.IsNil() && state.IsNil() == plan.IsNil() && (state.IsNil() || stands(state.Elem(), plan.Elem(), config.Elem()))
	case state.Kind() == reflect.Struct:
		for i := range state.NumField() {
			if !stands(state.Field(i), plan.Field(i), config.Field(i)) {
				return false
			}
		}
		return true
	default:
		return false
	}
}

func orderedList(plan, state types.List) types.List {
	if plan.IsNull() || plan.IsUnknown() || state.IsNull() {
		return plan
	}
	is, was := strs(plan), strs(state)
	slices.Sort(is)
	slices.Sort(was)
	if slices.Equal(is, was) {
		return state
	}
	return plan
}
