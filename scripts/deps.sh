#!/bin/sh
# Sets up what kptrace needs from outside Go: the iptables of both flavours,
# ipset, nftables, user-mode-linux, Prometheus with promtool, conntrackd and ulogd. Silent
# and instant when all is there.
#
#	scripts/deps.sh          what the demo and the tests need
#	scripts/deps.sh protoc   what `make generate` needs
#	scripts/deps.sh tracers  what `make bench-trace` compares with
#
# Missing Debian packages are installed by apt-get as root, by sudo where it
# asks for no password, and otherwise unpacked into ${XDG_CACHE_HOME:-~/.cache}/
# kptrace/tools, where scripts/env.sh finds them; nothing outside that folder is
# touched then.
#
# For testing, KPTRACE_DEPS_FORCE=apt|sudo|unpack acts as if all were missing
# and takes that way.
set -eu
cd "$(dirname "$0")/.."
# shellcheck source=scripts/env.sh
. scripts/env.sh

say() { echo "deps: $*" >&2; }
die() {
	say "$@"
	exit 1
}

# provided COMMAND...: nothing to do for them.
provided() {
	case ${KPTRACE_DEPS_FORCE:-} in
	"") kptrace_has "$@" ;;
	unpack)
		for cmd in "$@"; do
			case $(command -v "$cmd") in
			"$kptrace_cache"/tools/*) ;;
			*) return 1 ;;
			esac
		done
		;;
	*) return 1 ;;
	esac
}

# provide PACKAGE...: gets Debian packages in the best way this user has.
provide() {
	kptrace_has apt-get || die "missing: $*. Install these packages (names as on Debian) and try again."
	way=${KPTRACE_DEPS_FORCE:-}
	if [ -z "$way" ]; then
		if [ "$(id -u)" = 0 ]; then
			way=apt
		elif kptrace_has sudo && sudo -n true 2>/dev/null; then
			way=sudo
		else
			way=unpack
		fi
	fi
	case $way in
	apt)
		say "installing $*"
		install_packages "" "$@"
		;;
	sudo)
		say "installing $* with sudo apt-get"
		install_packages "sudo -n" "$@"
		;;
	unpack)
		say "no root and no sudo: unpacking $* into $kptrace_cache/tools"
		unpack_packages "$@"
		;;
	*) die "KPTRACE_DEPS_FORCE=$way: want apt, sudo or unpack" ;;
	esac
}

# install_packages SUDO PACKAGE...: by apt-get, with fresh lists only if the
# ones at hand are empty or too old.
install_packages() {
	sudo=$1
	shift
	set -- env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "$@"
	# The first try may fail for want of lists; the second one says why.
	# shellcheck disable=SC2086 # no word, or two
	$sudo "$@" >/dev/null 2>&1 </dev/null && return
	# shellcheck disable=SC2086
	$sudo apt-get update -qq </dev/null >&2 || say "apt-get update failed; trying with the lists at hand"
	# shellcheck disable=SC2086
	$sudo "$@" </dev/null >&2
}

# unpack_packages PACKAGE...: downloads them with the libraries they bring and
# unpacks them into the tool cache. Downloads are checked by apt as always.
unpack_packages() {
	work=$kptrace_cache/unpack.$$
	trap 'rm -rf "$work"' EXIT
	trap 'exit 1' HUP INT TERM
	mkdir -p "$work/debs" "$work/root" "$work/cache/archives/partial"
	own="-o Dir::State=$work/state -o Dir::State::status=/var/lib/dpkg/status -o Debug::NoLocking=1"
	# The system's lists if they are readable and fresh enough, else our own.
	if ! fetch "" "$@" 2>/dev/null; then
		mkdir -p "$work/state/lists/partial"
		# shellcheck disable=SC2086 # a list of words
		apt-get update -qq $own -o Dir::Cache="$work/cache" </dev/null >"$work/log" 2>&1 || true
		if ! fetch "$own" "$@" 2>>"$work/log"; then
			cat "$work/log" >&2
			die "cannot download the packages $*"
		fi
	fi
	for deb in "$work"/debs/*.deb; do
		dpkg -x "$deb" "$work/root"
	done
	# Add to what an earlier call unpacked, then swap in one step.
	if [ -d "$kptrace_cache/tools" ]; then
		cp -a -n "$kptrace_cache/tools/." "$work/root/"
		mv "$kptrace_cache/tools" "$work/old"
	fi
	mv "$work/root" "$kptrace_cache/tools"
}

# fetch OPTIONS PACKAGE...: downloads packages and, of what they depend on, the
# libraries that belong to the tools and are absent from small systems.
fetch() {
	own=$1
	shift
	# shellcheck disable=SC2086 # a list of words
	names=$(apt-cache $own -o Dir::Cache="$work/cache" depends --recurse --no-recommends --no-suggests \
		--no-conflicts --no-breaks --no-replaces --no-enhances "$@" |
		grep -E '^(lib(xtables|ip4tc|ip6tc|iptc|nftnl|mnl|nfnetlink|netfilter-(conntrack|cthelper|queue|acct|log)|ipset|nftables|protobuf|protoc)[0-9].*)$' |
		sort -u) || return 1
	# shellcheck disable=SC2086
	(cd "$work/debs" && apt-get download -qq $own -o Dir::Cache="$work/cache" "$@" $names </dev/null >&2)
}

# namespaces_allowed: an ordinary user's tests and labs live in user namespaces.
namespaces_allowed() {
	[ "$(id -u)" = 0 ] && return
	unshare -Urn true 2>/dev/null && return
	say "this host forbids unprivileged user namespaces; the demo and the tests need them or root."
	if [ "$(setting kernel/apparmor_restrict_unprivileged_userns)" = 1 ]; then
		say "allow them with:  sudo sysctl -w kernel.apparmor_restrict_unprivileged_userns=0"
	fi
	if [ "$(setting kernel/unprivileged_userns_clone)" = 0 ]; then
		say "allow them with:  sudo sysctl -w kernel.unprivileged_userns_clone=1"
	fi
	if [ "$(setting user/max_user_namespaces)" = 0 ]; then
		say "allow them with:  sudo sysctl -w user.max_user_namespaces=10000"
	fi
	exit 1
}

setting() { cat "/proc/sys/$1" 2>/dev/null || true; }

# tools_work: each tool does what the tests ask of it, in a namespace of its own.
tools_work() {
	if [ "$(id -u)" = 0 ]; then
		spaces=-n sudo=
	else
		spaces=-Urn sudo="sudo "
	fi
	try iptables-nft-save -t nat || die "iptables-nft does not work here: $failure"
	try ipset list -name || die "ipset does not work here: $failure"
	# iptables-legacy has to load its own kernel modules, which takes root;
	# once they are loaded everybody has them.
	try iptables-legacy -t nat -S && return
	say "iptables-legacy does not work here: $failure"
	say "If the kernel has it as modules, load them once:"
	say "    ${sudo}modprobe -a ip_tables iptable_filter iptable_nat iptable_mangle iptable_raw"
	say "Without them only --iptables-flavour nft works, and make test fails."
}

# try COMMAND...: runs it in new namespaces; failure is the end of what it said.
try() {
	failure=$(unshare $spaces "$@" 2>&1 >/dev/null </dev/null) && return
	failure=$(echo "$failure" | tail -n 1)
	return 1
}

case ${1:-} in
protoc)
	provided protoc || provide protobuf-compiler
	;;
tracers)
	provided nft conntrack || provide nftables conntrack
	;;
"")
	kptrace_has go || die "missing: Go 1.26 or newer"
	# shellcheck disable=SC2086 # a list of words
	provided $kptrace_tools || provide iptables ipset nftables
	# A kernel with IPVS, SCTP and dummy devices, where this one lacks them;
	# there is one for x86 only.
	case $(uname -m) in
	x86_64 | i?86) provided $kptrace_guest || provide user-mode-linux ;;
	esac
	# Unpacked, never installed: their packages would start servers.
	# shellcheck disable=SC2086 # a list of words
	provided $kptrace_monitor || {
		kptrace_has apt-get || die "missing: $kptrace_monitor. Install Prometheus and try again."
		say "unpacking prometheus into $kptrace_cache/tools"
		unpack_packages prometheus
	}
	# shellcheck disable=SC2086 # a list of words
	provided $kptrace_neighbours || {
		kptrace_has apt-get || die "missing: $kptrace_neighbours. Install conntrackd and ulogd2 and try again."
		say "unpacking conntrackd and ulogd2 into $kptrace_cache/tools"
		unpack_packages conntrackd ulogd2
	}
	# shellcheck source=scripts/env.sh
	. scripts/env.sh
	namespaces_allowed
	tools_work
	;;
*) die "usage: scripts/deps.sh [protoc|tracers]" ;;
esac
