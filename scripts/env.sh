#!/bin/sh
# The environment in which kptrace is built, tested and run from this tree.
#
# Sourced (by the Makefile and the scripts beside it) it exports the variables;
# run as a command it prints them, for a shell of your own:
#
#	eval "$(scripts/env.sh)"
#
# It finds the packet filter tools where Debian puts them (/usr/sbin, which is
# not on an ordinary user's PATH) or, when the system has none, in the cache
# folder that scripts/deps.sh fills without root. When nothing is missing
# nothing but PATH changes.
# shellcheck shell=sh

# What each tool cache must offer; the first three are the whole iptables.
kptrace_tools="iptables-nft-restore iptables-nft-save iptables-legacy-restore iptables-legacy-save ipset nft"
# The kernel that runs IPVS as an ordinary process.
kptrace_guest=linux.uml
# What scrapes the metrics, and judges rules about them.
kptrace_monitor="prometheus promtool"
# What listens to the kernel beside kptrace, in tests.
kptrace_neighbours="conntrackd ulogd"
kptrace_cache=${KPTRACE_CACHE:-${XDG_CACHE_HOME:-${HOME:-/nonexistent}/.cache}/kptrace}

# kptrace_has COMMAND...: all of them are on PATH.
kptrace_has() {
	for kptrace_cmd in "$@"; do
		command -v "$kptrace_cmd" >/dev/null 2>&1 || return 1
	done
}

for kptrace_dir in /usr/sbin /sbin; do
	case :$PATH: in
	*:$kptrace_dir:*) ;;
	*) PATH=$PATH:$kptrace_dir ;;
	esac
done
kptrace_has go || [ ! -x /usr/local/go/bin/go ] || PATH=$PATH:/usr/local/go/bin
export PATH

# Tools unpacked without root. Their libraries come with them.
# shellcheck disable=SC2086 # a list of words
if [ -d "$kptrace_cache/tools" ] && { [ "${KPTRACE_DEPS_FORCE:-}" = unpack ] || ! kptrace_has $kptrace_tools $kptrace_guest $kptrace_monitor $kptrace_neighbours; }; then
	case :$PATH: in
	*:$kptrace_cache/tools/*) ;;
	*)
		PATH=$kptrace_cache/tools/usr/sbin:$kptrace_cache/tools/sbin:$kptrace_cache/tools/usr/bin:$PATH
		for kptrace_dir in "$kptrace_cache"/tools/usr/lib/*-linux-* "$kptrace_cache"/tools/lib/*-linux-*; do
			[ -d "$kptrace_dir" ] || continue
			LD_LIBRARY_PATH=$kptrace_dir${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
			[ ! -d "$kptrace_dir/xtables" ] || export XTABLES_LIBDIR="$kptrace_dir/xtables"
		done
		export PATH LD_LIBRARY_PATH
		;;
	esac
fi

# iptables-legacy takes a lock in /run, where an ordinary user cannot write.
if [ -z "${XTABLES_LOCKFILE:-}" ] && [ ! -w /run/xtables.lock ] && { [ -e /run/xtables.lock ] || [ ! -w /run ]; }; then
	if [ -n "${XDG_RUNTIME_DIR:-}" ] && [ -w "$XDG_RUNTIME_DIR" ]; then
		export XTABLES_LOCKFILE="$XDG_RUNTIME_DIR/xtables.lock"
	elif mkdir -p "$kptrace_cache" 2>/dev/null; then
		export XTABLES_LOCKFILE="$kptrace_cache/xtables.lock"
	fi
fi

case ${0##*/} in
env.sh)
	for kptrace_var in PATH LD_LIBRARY_PATH XTABLES_LIBDIR XTABLES_LOCKFILE; do
		eval "kptrace_value=\${$kptrace_var:-}"
		[ -z "$kptrace_value" ] || printf "export %s='%s'\n" "$kptrace_var" "$kptrace_value"
	done
	;;
esac
