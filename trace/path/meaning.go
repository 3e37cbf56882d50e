package path

import (
	"fmt"
	"net/netip"

	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/proxy/liverules"
	"github.com/kptrace/kptrace/trace"
)

// Names puts addresses into words.
type Names struct {
	// Endpoint names what serves at an address, as "foo-5c"; empty if unknown.
	Endpoint func(netip.AddrPort) string
}

func (n *Names) endpoint(ep netip.AddrPort) string {
	if n != nil && n.Endpoint != nil {
		if name := n.Endpoint(ep); name != "" {
			return name + " " + ep.String()
		}
	}
	return ep.String()
}

// meaning says in a few words what a rule meant for this packet.
func meaning(f *Found, hop *trace.Hop, pkt *trace.PacketHeader, names *Names) string {
	r := f.Rule
	client := pkt.Tuple.Src().Addr()
	chainKind := liverules.KindOf(hop.Chain)
	switch {
	case hop.Verdict == "dnat" && chainKind == liverules.KindEndpoint:
		if to, ok := r.TargetOpt("to-destination"); ok {
			if ep, err := netip.ParseAddrPort(to); err == nil {
				return "DNAT to " + names.endpoint(ep)
			}
		}
	case liverules.KindOf(r.Target) == liverules.KindEndpoint:
		if s := pick(f, names, client); s != "" {
			return s
		}
	}
	if prefix, ok := r.TargetOpt("nflog-prefix"); ok {
		if tag, ok := proxy.ParseTag(prefix); ok && tag.Kind == proxy.TagMiss {
			return "affinity: no entry for " + client.String()
		}
	}
	if f.Program == nil {
		return ""
	}
	return f.Program.Purpose(hop.Table, hop.Chain, r)
}

// pick says which of how many a rule takes.
func pick(f *Found, names *Names, client netip.Addr) string {
	to := f.Rule.Target
	if f.Program != nil {
		if _, _, ep, ok := f.Program.Chain(f.Rule.Target); ok && ep.IsValid() {
			to = names.endpoint(ep)
		}
	}
	if f.Rule.Match("recent") != nil {
		return "affinity: " + client.String() + " was sent to " + to + " before"
	}
	n, at := 0, 0
	for _, r := range f.Chain {
		if liverules.KindOf(r.Target) == liverules.KindEndpoint && r.Match("recent") == nil {
			if n++; r == f.Rule {
				at = n
			}
		}
	}
	if at == 0 {
		return ""
	}
	return fmt.Sprintf("pick %d of %d, %s: %s", at, n, odds(f.Chain, f.Rule), to)
}

// odds says how probable a rule was: here, and counted from the chain's
// beginning where that is another number.
func odds(chain []*xtables.Rule, rule *xtables.Rule) string {
	all := 1.0
	for _, r := range chain {
		if liverules.KindOf(r.Target) != liverules.KindEndpoint || r.Match("recent") != nil {
			continue
		}
		p := chanceOf(r)
		if r.Match("statistic") == nil {
			p = 1
		}
		if r == rule {
			total := all * p
			if d := total - p; d < -0.0005 || d > 0.0005 {
				return fmt.Sprintf("p = %.3f (%.3f of those left)", total, p)
			}
			return fmt.Sprintf("p = %.3f", p)
		}
		all *= 1 - p
	}
	return fmt.Sprintf("p = %.3f", all)
}
