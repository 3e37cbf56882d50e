package features

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/kptrace/kptrace/internal/netns"
)

// probeTimeout bounds one probe; all run at the same time. A packet that never
// comes takes that long, a whole run where all is well some 30 ms.
const probeTimeout = 2500 * time.Millisecond

// found is what a probe saw: a text for each feature that is present.
type found map[string]string

// probe tries one or more features at once. The first name is the feature
// whose absence run's error explains; the others are present if in found.
type probe struct {
	names    []string
	required []string
	fix      string
	run      func(context.Context, *netns.NS) (found, error)
}

// probes returns the table, in the order of printing.
func probes() []probe {
	const kernel = "a kernel with "
	return []probe{
		{names: []string{UserNamespace}, required: needUserNamespace(), run: userNamespace},
		{names: []string{NetNamespace}, required: []string{NetNamespace}, run: netNamespace},
		{names: []string{PIDNamespace}, required: []string{PIDNamespace}, run: pidNamespace},
		{names: []string{MountNamespace}, required: []string{MountNamespace}, run: mountNamespace},
		{names: []string{Veth}, required: []string{Veth}, fix: "modprobe veth (as root, once)", run: veth},
		{names: []string{Bridge}, fix: "modprobe bridge (as root, once)", run: bridge},
		{names: []string{IPTablesNFT}, required: []string{IPTablesNFT},
			fix: "apt install iptables; " + kernel + "nf_tables and the xt_* modules named", run: iptables("iptables-nft")},
		{names: []string{IPTablesLegacy}, required: []string{IPTablesLegacy},
			fix: "apt install iptables; modprobe -a ip_tables iptable_nat iptable_mangle iptable_raw (as root, once)",
			run: iptables("iptables-legacy")},
		{names: []string{IPSet}, required: []string{IPSet}, fix: "apt install ipset; modprobe ip_set_hash_ip", run: ipset},
		{names: []string{ConntrackEvents, ConntrackAccounting, ConntrackTimestamps, ConntrackEventTime},
			required: []string{ConntrackEvents, ConntrackAccounting},
			fix:      "modprobe nf_conntrack_netlink (as root, once); " + kernel + "CONFIG_NF_CONNTRACK_EVENTS", run: conntrackEvents},
		{names: []string{NFLOG, NFLOGTimestamp, NFLOGConntrack}, required: []string{NFLOG},
			fix: "modprobe -a nfnetlink_log xt_NFLOG (as root, once)", run: nflog},
		{names: []string{NFTTrace, NFTTraceConntrack}, fix: kernel + "nf_tables and xt_TRACE", run: nftTrace},
		{names: []string{LegacyTrace}, fix: "modprobe -a nfnetlink_log xt_TRACE iptable_raw (as root, once)", run: legacyTrace},
		{names: []string{IPVS}, fix: "modprobe ip_vs (as root, once), or a guest that has it", run: ipvs},
		{names: []string{BTF}, fix: kernel + "CONFIG_DEBUG_INFO_BTF", run: btf},
	}
}

// Probe tries everything, each probe in a network namespace of its own, and
// returns all features in a fixed order. It must run as root or inside a
// sandbox, changes nothing outside of its namespaces, and takes well under
// three seconds.
func Probe(ctx context.Context) []Feature { return ProbeOnly(ctx, names()...) }

// ProbeOnly is Probe for some features, by name; unknown names are left out.
func ProbeOnly(ctx context.Context, names ...string) []Feature {
	table := slices.DeleteFunc(probes(), func(p probe) bool {
		return !slices.ContainsFunc(p.names, func(n string) bool { return slices.Contains(names, n) })
	})
	results := make([][]Feature, len(table))
	var wg sync.WaitGroup
	for i, p := range table {
		wg.Go(func() { results[i] = p.try(ctx) })
	}
	wg.Wait()
	return slices.DeleteFunc(slices.Concat(results...), func(f Feature) bool { return !slices.Contains(names, f.Name) })
}

// Unavailable is the list for a host on which no sandbox can be made: nothing
// was probed, and err says why.
func Unavailable(err error) []Feature {
	var all []Feature
	for _, p := range probes() {
		all = append(all, p.features(nil, err)...)
	}
	return all
}

func names() []string {
	var all []string
	for _, p := range probes() {
		all = append(all, p.names...)
	}
	return all
}

func (p probe) try(ctx context.Context) []Feature {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	ns, err := netns.New()
	if err != nil {
		return p.features(nil, err)
	}
	defer ns.Close()
	seen, err := p.run(ctx, ns)
	return p.features(seen, err)
}

func (p probe) features(seen found, err error) []Feature {
	fix := p.fix
	var host *netns.HostError
	if errors.As(err, &host) {
		fix = host.Fix
	}
	var out []Feature
	for i, name := range p.names {
		detail, ok := seen[name]
		f := Feature{Name: name, Present: ok, Detail: detail, Required: slices.Contains(p.required, name)}
		switch {
		case ok:
		case err != nil:
			f.Detail, f.Fix = oneLine(err), fix
		case i == 0:
			f.Detail, f.Fix = "nothing was seen", fix
		default:
			f.Detail = "not with this kernel"
		}
		out = append(out, f)
	}
	return out
}

func oneLine(err error) string {
	return strings.TrimPrefix(strings.Join(strings.Fields(err.Error()), " "), "features: ")
}

func needUserNamespace() []string {
	if netns.Rootless() {
		return []string{UserNamespace}
	}
	return nil
}

// errNothing is what a probe says when the packet went but no message came.
func errNothing(what string, err error) error {
	return fmt.Errorf("features: waiting for %s: %w", what, err)
}
