#!/bin/sh
# go test ARGS..., and after it what ran in a kernel of its own: go test shows
# nothing of a package that passes.
set -eu
KPTRACE_GUEST_REPORT=$(mktemp)
export KPTRACE_GUEST_REPORT
trap 'rm -f "$KPTRACE_GUEST_REPORT"' EXIT
trap 'exit 1' HUP INT TERM
code=0
go test "$@" || code=$?
[ ! -s "$KPTRACE_GUEST_REPORT" ] || sed 's/^/ipvs: /' "$KPTRACE_GUEST_REPORT"
exit $code
