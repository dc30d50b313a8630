package server

import "math/rand/v2"

var (
	qualities = []string{
		"amber", "brave", "bright", "brisk", "calm", "clear", "clever", "cosy", "crisp", "eager", "early", "fair", "fine", "fond", "fresh", "gentle", "glad", "golden", "grand",
		"green", "happy", "hardy", "honest", "humble", "jolly", "keen", "kind", "late", "lively", "loyal", "lucky", "mellow", "merry", "mild", "neat", "nimble", "noble", "patient",
		"plain", "polite", "proud", "quick", "quiet", "rapid", "ready", "royal", "rustic", "sandy", "sharp", "shy", "silent", "silver", "sleepy", "snug", "solid", "spry", "steady",
		"sunny", "swift", "tidy", "tiny", "vivid", "warm", "wise", "witty", "young",
	}
	things = []string{
		"acorn", "alder", "anchor", "aspen", "badger", "barley", "beech", "birch", "bridge", "brook", "candle", "cedar", "cliff", "clover", "comet", "coral", "cricket", "crane", "dune",
		"falcon", "fern", "finch", "fjord", "forest", "garden", "glacier", "grove", "harbor", "hazel", "heron", "island", "ivy", "juniper", "kestrel", "lagoon", "lantern", "larch",
		"lichen", "linden", "magpie", "maple", "marsh", "meadow", "moss", "oak", "orchard", "osprey", "otter", "pebble", "pine", "plover", "prairie", "quarry", "raven", "reef",
		"ridge", "river", "robin", "rowan", "sparrow", "spruce", "stream", "summit", "swallow", "thistle", "timber", "valley", "walnut", "willow", "wren",
	}
)

// randomName is for a container that was given none.
func randomName() string {
	return oneOf(qualities) + "_" + oneOf(things) + "_" + string(letter()) + string(letter())
}

func oneOf(of []string) string { return of[rand.IntN(len(of))] }

func letter() rune { return 'a' + rand.N('z'-'a'+1) }
