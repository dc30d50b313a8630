#!/usr/bin/env bash
# fuzz.sh TIME: run each fuzz target of the module for TIME (20s), one after the other.
set -euo pipefail
cd "$(dirname "$0")/.."
time=${1:-20s}
log=$(mktemp)
trap 'rm -f "$log"' EXIT
count=0
while read -r dir; do
  for target in $(cd "$dir" && { grep -ohE '^func Fuzz[A-Za-z0-9_]*' ./*_test.go 2>/dev/null || true; } | sed 's/^func //'); do
    echo "== ${dir#"$PWD"/} $target"
    count=$((count + 1))
    # Without a bound, making the first new input smaller (60 s by default) takes all the time: where goroutines run, the
    # coverage is never twice the same.
    if ! go test -tags vm -run '^$' -fuzz "^$target\$" -fuzztime "$time" -fuzzminimizetime 10x "$dir" 2>&1 | tee "$log"; then
      # The go command may also fail because its time ran out while a worker was busy (go.dev/issue/75804, until Go 1.27): nothing was found then.
      grep -q 'context deadline exceeded' "$log" && ! grep -q 'Failing input written' "$log" || exit 1
    fi
  done
done < <(go list -tags vm -f '{{.Dir}}' ./...)
[ "$count" -gt 0 ] || { echo 'fuzz.sh: no fuzz target found' >&2; exit 1; }
echo "$count fuzz targets, nothing found"
