package beside

import (
	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/proxy/liverules"
)

// program is what another kube-proxy's rules mean, and what we add to them.
type program struct {
	// live is nil where the rules are not read; wanted is what our own mode would
	// do with the state, nil if nothing is predicted.
	live    *liverules.Program
	wanted  proxy.Program
	nft     bool // the other is in nftables mode
	layouts []xtables.Layout
	mode    proxy.Mode // of the layouts
	members map[member]bool
	index   proxy.Index
}

// Index lists our own tagged rules. They serve all Services: which one a report
// is about its packet says.
func (p *program) Index() proxy.Index { return p.index }

// Walk asks the live rules, or where they are not read, what should be.
func (p *program) Walk(pkt proxy.Packet) proxy.Outcome {
	switch {
	case p.live != nil:
		return p.live.Walk(pkt)
	case p.wanted != nil:
		out := p.wanted.Walk(pkt)
		if p.nft && pkt.FromNode && out.Verdict == proxy.Pass {
			// Unlike iptables mode it refuses what the node itself sends to an
			// outside address of a Service without endpoints.
			pkt.FromNode = false
			if other := p.wanted.Walk(pkt); other.Verdict == proxy.Reject && other.Reason == "no-endpoints" {
				return other
			}
		}
		return out
	}
	return proxy.Outcome{}
}

// AffinityLists lists the lists of the live rules.
func (p *program) AffinityLists() []proxy.AffinityList {
	if p.live == nil {
		return nil
	}
	return p.live.AffinityLists()
}

// Text is what we add, as iptables-restore takes it.
func (p *program) Text() string {
	text := ""
	for i := range p.layouts {
		text += p.layouts[i].Text()
	}
	return text
}

// Problems is empty: what is wrong with the rules of another, a check says.
func (p *program) Problems() []proxy.Problem { return nil }

// Rules is all that is live, with what we add, as iptables-save prints it, by
// family.
func (p *program) Rules() (v4, v6 string) {
	text := map[xtables.Family]string{}
	if p.live != nil {
		for _, rs := range p.live.Rulesets() {
			text[rs.Family] += rs.String()
		}
	}
	for i := range p.layouts {
		text[p.layouts[i].Family] += p.layouts[i].Text()
	}
	return text[xtables.IPv4], text[xtables.IPv6]
}
