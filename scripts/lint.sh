#!/bin/sh
# Runs golangci-lint in the version that scripts/tools/lint pins. The binary is
# built once per version and Go release (a minute or more) and kept in the cache.
set -eu
cd "$(dirname "$0")/.."
# shellcheck source=scripts/env.sh
. scripts/env.sh

module=github.com/golangci/golangci-lint/v2
version=$(go -C scripts/tools/lint list -m -f '{{.Version}}' "$module")
lint=$kptrace_cache/bin/golangci-lint-$version-$(go env GOVERSION)
if [ ! -x "$lint" ]; then
	mkdir -p "$kptrace_cache/bin"
	# One build at a time; who waited finds it done.
	exec 9>"$kptrace_cache/bin/lock"
	flock 9
fi
if [ ! -x "$lint" ]; then
	echo "lint: building golangci-lint $version" >&2
	go -C scripts/tools/lint build -mod=mod -trimpath -o "$lint.$$" "$module/cmd/golangci-lint"
	mv "$lint.$$" "$lint"
fi
exec 9>&-
exec "$lint" run "$@"
