package main

import "testing"

// What pods call their files is shown to who compares snapshots, and does nothing to his terminal, nor makes lines of its own.
func TestShownName(t *testing.T) {
	for name, want := range map[string]string{
		"letters/to the bank":   "letters/to the bank",
		"größe/文":               "größe/文",
		"a\nremoved  b":         `"a\nremoved  b"`,
		"\x1b]0;owned\x07":      `"\x1b]0;owned\a"`,
		"\x9b2J":                `"\x9b2J"`,
		"right\u202eleft":       `"right\u202eleft"`,
		"tab\tbed":              `"tab\tbed"`,
		`"quoted"`:              `"\"quoted\""`,
		"\xff":                  `"\xff"`,
		"replacement \ufffd ok": "replacement \ufffd ok",
	} {
		if got := shownName(name); got != want {
			t.Errorf("%q is shown as %s, not %s", name, got, want)
		}
	}
}
