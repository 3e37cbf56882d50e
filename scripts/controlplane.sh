#!/bin/sh
# Builds what the end-to-end tests hold kptrace against: etcd, kube-apiserver
# and upstream kube-proxy, in the versions that test/controlplane pins. Prints
# the folder of the three binaries.
#
# They are built once (9 minutes of CPU) and kept in ${XDG_CACHE_HOME:-~/.cache}/
# kptrace/controlplane/HASH, where HASH is that of everything they are made
# from; then this is instant. 200 MB stay; the 2 GB of compiled packages a build
# needs go when it succeeds, and serve the next try when it does not.
set -eu
cd "$(dirname "$0")/.."
# shellcheck source=scripts/env.sh
. scripts/env.sh

src=test/controlplane
hash=$({ go env GOVERSION GOARCH && cat scripts/controlplane.sh && find "$src" \( -name '*.go' -o -name 'go.*' \) -type f | LC_ALL=C sort | xargs cat; } | sha256sum | cut -c1-16)
out=$kptrace_cache/controlplane/$hash

complete() {
	for name in etcd kube-apiserver kube-proxy; do
		[ -x "$out/$name" ] || return 1
	done
}

if ! complete; then
	mkdir -p "$out"
	# One build at a time; who waited finds it done.
	exec 9>"$kptrace_cache/controlplane/lock"
	flock 9
fi
if ! complete; then
	export CGO_ENABLED=0 GOOS=linux GOFLAGS="-trimpath -buildvcs=false -mod=readonly" GOCACHE="$kptrace_cache/controlplane/gocache"
	kube=$(go -C "$src" list -m -f '{{.Version}}' k8s.io/kubernetes)
	minor=${kube#*.}
	version=k8s.io/component-base/version
	# A server that does not know its version calls itself v0.0.0-master.
	flags="-s -w -X $version.gitVersion=$kube -X $version.gitMajor=1 -X $version.gitMinor=${minor%%.*}"
	echo "controlplane: building etcd, kube-apiserver and kube-proxy $kube, once, some minutes" >&2
	build() {
		[ -x "$out/$2" ] && return
		nice -n 15 go -C "$1" build -ldflags "$flags" -o "$out/.$2" "$3" >&2
		mv "$out/.$2" "$out/$2"
	}
	build "$src/etcd" etcd go.etcd.io/etcd/server/v3
	build "$src" kube-apiserver ./kube-apiserver
	build "$src" kube-proxy ./kube-proxy
	# Older versions and what is only for building have had their day.
	find "$kptrace_cache/controlplane" -mindepth 1 -maxdepth 1 -type d ! -name "$hash" -exec rm -rf {} +
fi
echo "$out"
