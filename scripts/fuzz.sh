#!/bin/sh
# Runs every fuzz target for FUZZTIME each (default 10s). The go command takes
# one target at a time.
set -eu
cd "$(dirname "$0")/.."
# shellcheck source=scripts/env.sh
. scripts/env.sh

targets=$(grep -rE --include='*_test.go' '^func Fuzz[A-Za-z0-9_]*\(' . |
	sed -E 's|^(.*)/[^/]*:func (Fuzz[A-Za-z0-9_]*)\(.*|\1 \2|' | sort -u)
[ -n "$targets" ] || {
	echo "fuzz: no targets found" >&2
	exit 1
}
echo "$targets" | while read -r dir name; do
	echo "fuzz: $dir $name"
	go test -run '^$' -fuzz "^$name\$" -fuzztime "${FUZZTIME:-10s}" "$dir" </dev/null
done
