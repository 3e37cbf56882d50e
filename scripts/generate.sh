#!/bin/sh
# Generates the dashboards, docs/metrics.md, and the Go code of the .proto
# files, beside them. The generators of the latter are the ones scripts/tools/proto
# pins; protoc is Debian's.
set -eu
cd "$(dirname "$0")/.."
scripts/deps.sh protoc
# shellcheck source=scripts/env.sh
. scripts/env.sh

go run ./dashboards/generate dashboards
UPDATE_GOLDEN=1 go test -count=1 -run TestDocs ./exporters/prom >/dev/null

bin=$(mktemp -d)
trap 'rm -rf "$bin"' EXIT
trap 'exit 1' HUP INT TERM
go -C scripts/tools/proto build -mod=mod -trimpath -o "$bin/" \
	google.golang.org/protobuf/cmd/protoc-gen-go \
	google.golang.org/grpc/cmd/protoc-gen-go-grpc
cd exporters/relay
PATH=$bin:$PATH protoc \
	--go_out=. --go_opt=paths=source_relative \
	--go-grpc_out=. --go-grpc_opt=paths=source_relative \
	relay.proto
