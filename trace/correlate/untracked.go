package correlate

import (
	"fmt"

	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/trace"
)

const missingUntracked = "what became of it: connection tracking does not see it"

// Untracked makes a flow of a path that has none, if it is of a packet that was to open
// a connection to a Service and that a rule kept from connection tracking: no rule tells
// of it then, and there is no entry. It reports whether it did.
func (c *Correlator) Untracked(p *trace.Path, packet *trace.PacketHeader, at int64) bool {
	hop := untracking(p)
	if hop == nil || packet.Name() != "SYN" && packet.Name() != "udp" {
		return false
	}
	t := packet.Tuple
	w, ok := c.decider.at(at, t, hop.Hook == "output", func(w *walked) bool { return w.effect != proxy.Pass && w.service.Name != "" })
	if !ok {
		return false
	}
	r := c.add(t, c.find(t), &trace.Event{Tuple: t, Source: hop.Source, Time: at})
	r.isn, r.phase = packet.Seq, pending
	f := r.f
	f.Client = w.client
	f.Client.Addr = t.Src()
	f.Service = trace.ServiceRef{Name: w.service, Addr: t.Dst(), Via: w.via}
	f.Decision = trace.Decision{Mode: w.decision.Mode, Affinity: trace.AffinityNone, Masquerade: "no", Note: "not tracked"}
	f.Cause = fmt.Sprintf("rule %d of %s/%s: %s", hop.Rule, hop.Table, hop.Chain, hop.Text)
	addPath(f, p)
	r.settle()
	c.identify(r)
	c.end(r, trace.Unknown, trace.NotTracked, missingUntracked)
	return true
}

// untracking is the hop that keeps a packet from connection tracking, nil where there
// is none, or where the packet met rules of nat nevertheless.
func untracking(p *trace.Path) *trace.Hop {
	var by *trace.Hop
	for i := range p.Hops {
		switch h := &p.Hops[i]; {
		case h.Table == "nat", h.Verdict == "dnat":
			return nil
		case by == nil && h.Untracks():
			by = h
		}
	}
	return by
}
