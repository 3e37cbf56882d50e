package explain

import (
	"fmt"
	"net/netip"
	"strings"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/proxy/liverules"
	"github.com/kptrace/kptrace/trace"
)

// newPath wraps hops; the packet is the first one of its connection.
func newPath(pkt proxy.Packet, hops []trace.Hop, probability float64) trace.Path {
	name := pkt.Proto.String()
	if pkt.Proto == conntrack.TCP {
		name = "SYN"
	}
	return trace.Path{Predicted: true, Number: 1, Packet: name, Tuple: pkt.Tuple(), Hops: hops, Probability: probability}
}

// livePath makes a Path of the steps of a walk.
func livePath(p *liverules.Program, pkt proxy.Packet, w *liverules.Way) trace.Path {
	hops := make([]trace.Hop, len(w.Steps))
	dst := pkt.Dst
	for i := range w.Steps {
		s := &w.Steps[i]
		h := trace.Hop{
			Kind: trace.HopRule, Hook: s.Hook, Table: s.Table, Chain: s.Chain, Rule: uint64(s.Index),
			Verdict: s.Effect, Mark: s.MarkBefore,
		}
		switch {
		case s.Effect == xtables.EffectPolicy:
			h.Kind, h.Rule, h.Verdict = trace.HopPolicy, 0, "accept"
			if i == len(w.Steps)-1 && w.Leaf.Verdict == xtables.Drop {
				h.Verdict, h.Purpose = "drop", "the policy of the chain drops what no rule accepted"
			}
		case s.Rule == nil:
			h.Kind = trace.HopEnd
		default:
			h.Text, h.Purpose = s.Rule.String(), p.Purpose(s.Table, s.Chain, s.Rule)
			if s.Effect == xtables.EffectJump || s.Effect == xtables.EffectGoto {
				h.Target = s.Rule.Target
			}
			if s.Probability < 1 {
				h.Probability = s.Probability
			}
		}
		if s.Note != "" && h.Purpose == "" {
			h.Purpose = s.Note
		} else if s.Note != "" {
			h.Purpose += " (" + s.Note + ")"
		}
		if s.MarkBefore != s.MarkAfter {
			h.Changes = append(h.Changes, trace.Change{Field: "mark", Before: hex(s.MarkBefore), After: hex(s.MarkAfter)})
		}
		if s.DstAfter != dst {
			h.Changes = append(h.Changes, trace.Change{Field: "dst", Before: dst.String(), After: s.DstAfter.String()})
			dst = s.DstAfter
		}
		if s.Effect == xtables.EffectMasquerade {
			h.Changes = append(h.Changes, trace.Change{Field: "src", Before: pkt.Src.String(), After: "an address of the node"})
		}
		hops[i] = h
	}
	path := newPath(pkt, hops, w.Probability)
	if !w.Packet.Masqueraded && w.Packet.State&xtables.StateSNAT == 0 && (w.Verdict == proxy.Forward || w.Verdict == proxy.Pass) {
		path.Left = conntrack.NewTuple(pkt.Proto, netip.AddrPortFrom(w.Packet.Src, w.Packet.SPort), netip.AddrPortFrom(w.Packet.Dst, w.Packet.DPort))
	}
	if w.Unsure {
		path.Incomplete, path.Note = true, "what becomes of it here is not known"
	}
	return path
}

// steps makes hops of what a mode's walk says.
func steps(in []proxy.Step, pkt proxy.Packet, endpoint netip.AddrPort) []trace.Hop {
	hops := make([]trace.Hop, len(in))
	for i := range in {
		s := &in[i]
		h := trace.Hop{
			Kind: trace.HopRule, Hook: s.Hook, Table: s.Table, Chain: s.Chain, Rule: uint64(s.Rule),
			Text: s.Text, Purpose: s.Purpose, Verdict: s.Effect,
		}
		switch {
		case s.Effect == xtables.EffectPolicy:
			h.Kind, h.Rule, h.Verdict = trace.HopPolicy, 0, "accept"
		case s.Text == "" && s.Purpose == "":
			h.Kind = trace.HopEnd
		case s.Text == "" && s.Effect == xtables.EffectDrop:
			h.Kind = trace.HopPolicy
		case s.Effect == xtables.EffectJump || s.Effect == xtables.EffectGoto:
			if h.Target = target(s.Text); h.Target == "" && i+1 < len(in) {
				h.Target = in[i+1].Chain // by a map of nftables
			}
		case s.Table == "ipvs":
			// Not a rule: the kernel's balancer, by the virtual server's name.
			h.Kind, h.Table, h.Source = trace.HopIPVS, "", trace.IPVS
			if endpoint.IsValid() {
				h.Changes = []trace.Change{{Field: "dst", Before: pkt.Dst.String(), After: endpoint.String()}}
			}
		case s.Effect == xtables.EffectDNAT && endpoint.IsValid():
			h.Changes = []trace.Change{{Field: "dst", Before: pkt.Dst.String(), After: endpoint.String()}}
		case s.Effect == xtables.EffectMasquerade:
			h.Changes = []trace.Change{{Field: "src", Before: pkt.Src.String(), After: "an address of the node"}}
		}
		hops[i] = h
	}
	return hops
}

// target reads the chain behind -j or -g.
func target(text string) string {
	words := strings.Fields(text)
	for i := len(words) - 2; i >= 0; i-- {
		if words[i] == "-j" || words[i] == "-g" {
			return words[i+1]
		}
	}
	return ""
}

func hex(n uint32) string { return fmt.Sprintf("0x%x", n) }

// conditions puts assumptions into words.
func conditions(as []xtables.Assumption) []Condition {
	var out []Condition
	for i := range as {
		a := &as[i]
		c := Condition{Holds: a.Held}
		if a.Rule != nil {
			c.Text = a.Rule.String()
		}
		if a.Question != (xtables.Question{}) {
			c.What = a.Question.String()
		} else {
			var names []string
			for _, m := range a.Matches {
				if !strings.HasPrefix(m, "-") {
					m = "-m " + m
				}
				names = append(names, m)
			}
			c.What = fmt.Sprintf("%s matches in rule %d of %s/%s", strings.Join(names, " "), a.Index, a.Table, a.Chain)
		}
		out = append(out, c)
	}
	return out
}
