package features

import (
	"context"
	"fmt"
	"slices"
	"strings"
)

// Feature is one thing that kptrace uses.
type Feature struct {
	// Name is one of the constants below, and stable.
	Name string
	// Present says that it worked, just now, in a fresh namespace.
	Present bool
	// Required says that kptrace's main job fails without it.
	Required bool
	// Detail is what was seen, or the error.
	Detail string
	// Fix is what makes it present, as far as we know; empty when it is.
	Fix string
}

// The names of all features.
const (
	UserNamespace  = "user-namespace"
	NetNamespace   = "net-namespace"
	PIDNamespace   = "pid-namespace"
	MountNamespace = "mount-namespace"
	Veth           = "veth"
	Bridge         = "bridge"
	// IPTablesNFT and IPTablesLegacy load kube-proxy's kind of nat rules:
	// statistic, recent, comment, mark, MASQUERADE, DNAT, and ours: NFLOG,
	// conntrack --ctstate DNAT, connbytes.
	IPTablesNFT    = "iptables-nft"
	IPTablesLegacy = "iptables-legacy"
	// IPSet is a set with entries that time out.
	IPSet = "ipset"
	// ConntrackEvents is NEW, with the reply tuple after DNAT, and DESTROY.
	ConntrackEvents = "conntrack-events"
	// ConntrackAccounting is packets and bytes in DESTROY.
	ConntrackAccounting = "conntrack-accounting"
	// ConntrackTimestamps is start and stop in DESTROY.
	ConntrackTimestamps = "conntrack-timestamps"
	// ConntrackEventTime is the time in every event (Linux 6.14).
	ConntrackEventTime = "conntrack-event-time"
	// NFLOG is a packet read from a group, with prefix, hook and sequence.
	NFLOG = "nflog"
	// NFLOGTimestamp is the kernel's time on a packet at PREROUTING.
	NFLOGTimestamp = "nflog-timestamp"
	// NFLOGConntrack is the conntrack entry on a packet
	// (CONFIG_NETFILTER_NETLINK_GLUE_CT).
	NFLOGConntrack = "nflog-conntrack"
	// NFTTrace is the trace of an iptables-nft TRACE rule.
	NFTTrace = "nft-trace"
	// NFTTraceConntrack is the conntrack id in it (Linux 6.16).
	NFTTraceConntrack = "nft-trace-conntrack"
	// LegacyTrace is the trace of an iptables-legacy TRACE rule in NFLOG
	// group 0.
	LegacyTrace = "legacy-trace"
	IPVS        = "ipvs"
	BTF         = "btf"
)

// Missing returns the features that are required but absent.
func Missing(all []Feature) []Feature {
	return slices.DeleteFunc(slices.Clone(all), func(f Feature) bool { return f.Present || !f.Required })
}

// String returns one line: name, yes or no, detail, fix.
func (f Feature) String() string {
	state := "yes"
	switch {
	case !f.Present && f.Required:
		state = "MISSING"
	case !f.Present:
		state = "no"
	}
	line := fmt.Sprintf("%-21s %-7s %s", f.Name, state, f.Detail)
	if f.Fix != "" {
		line += " (to have it: " + f.Fix + ")"
	}
	return strings.TrimSpace(line)
}

// TB is what Require uses of testing.TB.
type TB interface {
	Helper()
	Fatalf(format string, args ...any)
	Context() context.Context
}

// Require probes the named features, under the names of this package, and
// fails the test if one is absent. It never skips: a test that cannot run has
// not passed.
func Require(t TB, names ...string) {
	t.Helper()
	found := ProbeOnly(t.Context(), names...)
	for _, name := range names {
		i := slices.IndexFunc(found, func(f Feature) bool { return f.Name == name })
		if i < 0 {
			t.Fatalf("features: there is no feature %q", name)
		} else if !found[i].Present {
			found[i].Required = true
			t.Fatalf("features: this test needs: %v", found[i])
		}
	}
}
