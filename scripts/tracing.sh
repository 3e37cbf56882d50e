#!/bin/sh
# Builds what spans are sent to in tests and in the stack: the OpenTelemetry
# Collector and Jaeger, in the versions that test/tracing pins. Prints the
# folder of the two binaries.
#
# They are built once (10 minutes of CPU) and kept in ${XDG_CACHE_HOME:-~/.cache}/
# kptrace/tracing/HASH, where HASH is that of everything they are made from;
# then this is instant. 110 MB stay; the compiled packages a build needs go when
# it succeeds, and serve the next try when it does not.
set -eu
cd "$(dirname "$0")/.."
# shellcheck source=scripts/env.sh
. scripts/env.sh

src=test/tracing
hash=$({ go env GOVERSION GOARCH && cat scripts/tracing.sh && find "$src" -mindepth 2 -maxdepth 2 \( -name '*.go' -o -name 'go.*' \) -type f | LC_ALL=C sort | xargs cat; } | sha256sum | cut -c1-16)
out=$kptrace_cache/tracing/$hash

complete() {
	[ -x "$out/collector" ] && [ -x "$out/jaeger" ]
}

if ! complete; then
	mkdir -p "$out"
	# One build at a time; who waited finds it done.
	exec 9>"$kptrace_cache/tracing/lock"
	flock 9
fi
if ! complete; then
	export CGO_ENABLED=0 GOOS=linux GOFLAGS="-trimpath -buildvcs=false -mod=readonly" GOCACHE="$kptrace_cache/tracing/gocache"
	echo "tracing: building the OpenTelemetry Collector and Jaeger, once, some minutes" >&2
	build() {
		[ -x "$out/$1" ] && return
		nice -n 15 go -C "$src/$1" build -ldflags '-s -w' -o "$out/.$1" "$2" >&2
		mv "$out/.$1" "$out/$1"
	}
	build collector .
	build jaeger github.com/jaegertracing/jaeger/cmd/all-in-one
	# Older versions and what is only for building have had their day.
	find "$kptrace_cache/tracing" -mindepth 1 -maxdepth 1 -type d ! -name "$hash" -exec rm -rf {} +
fi
echo "$out"
