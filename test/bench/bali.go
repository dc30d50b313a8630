package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"time"

	"github.com/cradlestack/cradlestack/test/programs"
)

// baliRounds are few: bali's own benchmark counts the fastest of each.
const baliRounds = 5

// bali: what its own benchmark measures against the plain tools.
func (b *bench) bali(ctx context.Context) error {
	root, err := programs.Root()
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, "go", "run", "./bali/bench", "-o", "json", "-n", strconv.Itoa(min(b.rounds, baliRounds)))
	cmd.Dir, cmd.Stderr = root, os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return fmt.Errorf("%s: %w", cmd, err)
	}
	var duels []struct {
		Name          string
		Limit         float64
		OursSeconds   float64
		TheirsSeconds float64
	}
	if err := json.Unmarshal(out, &duels); err != nil {
		return fmt.Errorf("%s: %w", cmd, err)
	}
	if len(duels) == 0 {
		return fmt.Errorf("%s measured nothing", cmd)
	}
	duration := func(s float64) time.Duration { return time.Duration(s * float64(time.Second)) }
	for _, d := range duels {
		ours, theirs := duration(d.OursSeconds), duration(d.TheirsSeconds)
		b.table.compare("bali: "+d.Name, seconds(ours), seconds(theirs), ratio(ours, theirs), d.Limit, 0)
	}
	return nil
}
