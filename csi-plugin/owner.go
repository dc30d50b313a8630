package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/hashicorp/nomad/api"

	"github.com/cradlestack/cradlestack/csi-plugin/rpc"
	"github.com/cradlestack/cradlestack/csi-plugin/volume"
)

// An owner says which of the volumes of one name, on several hosts, is the one to be used: a Nomad Variable. Without one no volume of the name
// was restored elsewhere, and the generation is 0.
type owner struct {
	rpc.Owner
	next   rpc.Owner      // the last one that a restore was begun for, whether it has come to its end or not
	volume *api.CSIVolume // as it is registered; Nomad may have forgotten it in between
	index  uint64         // of the Variable, 0 where there is none
}

// ownerPath is the Variable of a volume. Of a volume's name it may not hold the dot and not all of the length.
func ownerPath(id string) string {
	const longest = 100
	if len(id) > longest {
		sum := sha256.Sum256([]byte(id))
		id = "~" + hex.EncodeToString(sum[:])
	}
	return ownersPath + strings.ReplaceAll(id, ".", "~")
}

const ownersPath = "cradle/lv2/"

// readOwner reads it; it is the zero value where there is none.
func readOwner(ctx context.Context, nomad *api.Client, namespace, id string) (owner, error) {
	return readOwnerAt(ctx, nomad, namespace, ownerPath(id))
}

func readOwnerAt(ctx context.Context, nomad *api.Client, namespace, path string) (o owner, err error) {
	v, _, err := nomad.Variables().Peek(path, query(ctx, namespace))
	if err != nil || v == nil {
		return o, err
	}
	o.index, o.Node, o.next.Node = v.ModifyIndex, v.Items["node"], v.Items["next_node"]
	o.Generation, err = strconv.Atoi(v.Items["generation"])
	if next := v.Items["next_generation"]; err == nil && next != "" {
		o.next.Generation, err = strconv.Atoi(next)
	}
	if err == nil {
		err = json.Unmarshal([]byte(v.Items["volume"]), &o.volume)
	}
	if err != nil {
		return o, fmt.Errorf("variable %s: %w", v.Path, err)
	}
	return o, nil
}

// begin is the generation of the volume that a restore makes on a node, and whether that is written already. No two volumes that are in use have the same, wherever: what
// a restore has left that was given up is never taken for the volume. now is what Nomad knows, nil where it has forgotten it.
func (o *owner) begin(node string, now *api.CSIVolume) (generation int, written bool) {
	switch {
	case o.next.Node == node && o.next.Generation > o.Generation: // a call was interrupted
		return o.next.Generation, true
	case o.Node == node && !o.before(now): // a call was interrupted later
		return o.Generation, true
	}
	o.next = rpc.Owner{Generation: max(o.Generation, o.next.Generation) + 1, Node: node}
	return o.next.Generation, false
}

// before says whether all that was restored was, before what Nomad knows was made: that is another one, made anew, and has got the generation of the last one. A restore
// writes before it has Nomad know anything, and Nomad numbers all that is written.
func (o *owner) before(now *api.CSIVolume) bool { return now != nil && now.CreateIndex > o.index }

// replaced says whether what a node has of the generation that is used is a former one: a restore to it found that the volume was made anew elsewhere, with that generation.
func (o *owner) replaced(node string) bool {
	return o.Node == node && o.next.Node == node && o.next.Generation > o.Generation
}

// former says whether a generation is one that was given up: before the one that is used, or of a restore that never came to its end.
func (o *owner) former(generation int) bool {
	return generation < o.Generation || generation > o.Generation && generation <= o.next.Generation
}

// write replaces what was read; somebody else's that came in between stays, and is an error.
func (o *owner) write(ctx context.Context, nomad *api.Client, namespace, id string) error {
	text, err := json.Marshal(o.volume)
	if err != nil {
		return err
	}
	v := &api.Variable{Path: ownerPath(id), ModifyIndex: o.index, Items: api.VariableItems{
		"generation": strconv.Itoa(o.Generation), "node": o.Node, "volume": string(text),
		"next_generation": strconv.Itoa(o.next.Generation), "next_node": o.next.Node,
	}}
	v, _, err = nomad.Variables().CheckedUpdate(v, (&api.WriteOptions{Namespace: namespace}).WithContext(ctx))
	if errors.As(err, new(api.ErrCASConflict)) {
		return fmt.Errorf("volume %s: somebody else restores it just now", id)
	}
	if err != nil {
		return fmt.Errorf("variable %s: %w", ownerPath(id), err)
	}
	o.index = v.ModifyIndex
	return nil
}

// owners asks Nomad whose a volume is; nil where there is no Nomad to ask.
func owners(address string) (func(ctx context.Context, id string) (rpc.Owner, error), error) {
	if address == "" {
		return nil, nil
	}
	config := api.DefaultConfig()
	config.Address = address
	nomad, err := api.NewClient(config)
	if err != nil {
		return nil, fmt.Errorf("--nomad: %w", err)
	}
	return func(ctx context.Context, id string) (rpc.Owner, error) {
		o, err := readOwner(ctx, nomad, config.Namespace, id)
		if err != nil {
			return rpc.Owner{}, fmt.Errorf("%w: Nomad does not say on which host volume %s is: %w", volume.ErrUnavailable, id, err)
		}
		return o.Owner, nil
	}, nil
}

// pending says, by what owners returned, whether a volume is of a restore that has not come to its end: nobody has used it, as no plugin lets anybody.
func pending(ctx context.Context, owner func(context.Context, string) (rpc.Owner, error), v volume.Volume) (bool, error) {
	if owner == nil || v.Generation == 0 {
		return false, nil
	}
	o, err := owner(ctx, v.ID)
	return o.Generation < v.Generation, err
}
