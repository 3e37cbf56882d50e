package path

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/kptrace/kptrace/internal/nfnl"
	"github.com/kptrace/kptrace/proxy/liverules/nftables"
	"github.com/kptrace/kptrace/trace"
)

// builder makes the hops of one packet.
type builder struct {
	j    *Joiner
	p    *packet
	path trace.Path
	// now is the packet as it was last told, known the index of the first hop
	// after that.
	now   trace.PacketHeader
	known int
	// dst and src are its ends as far as hops have translated them since.
	mark uint32
}

// path makes the path of a packet that met at least one rule.
func (j *Joiner) path(p *packet) trace.Path {
	b := &builder{j: j, p: p, now: p.first, path: trace.Path{
		Packet: p.first.Name(), Tuple: p.first.Tuple, Incomplete: p.lost,
	}}
	if p.lost {
		b.path.Note = "reports were lost meanwhile: hops may be missing"
	}
	in, out := b.wires()
	if p.hits[0].hook == "output" && j.isResent(p) {
		b.add(trace.Hop{Kind: trace.HopSocket, Purpose: "sent again by this node: nobody had acknowledged it", Source: trace.Drops})
	}
	b.came(&in, "")
	for i := range p.hits {
		b.came(&in, p.hits[i].hook)
		b.hit(&p.hits[i])
	}
	b.came(&in, "end")
	b.leave(out)
	for _, s := range out {
		b.add(b.wire(s, "out"))
	}
	if p.drop != nil {
		h := trace.Hop{Kind: trace.HopDrop, Text: p.drop.Reason, Purpose: "the kernel gave it up", Verdict: "drop", Source: trace.Drops}
		if p.drop.Function != "" {
			h.Purpose += " in " + p.drop.Function
		}
		if dev := b.device(p.drop.Device); dev != "" {
			h.Purpose += ", at " + dev
		}
		if p.drop.Time != 0 {
			h.Time = time.Unix(0, p.drop.Time).UTC()
		}
		b.add(h)
	}
	return b.path
}

func (b *builder) add(h trace.Hop) { b.path.Hops = append(b.path.Hops, h) }

// came adds the devices by which the packet came in up to a hook: a bridge whose
// packets meet the rules of prerouting at the port sees them translated.
func (b *builder) came(in *[]trace.Sighting, hook string) {
	for len(*in) > 0 && ((*in)[0].Packet.Tuple == b.p.first.Tuple || hook != "" && hook != "prerouting") {
		b.add(b.wire((*in)[0], "in"))
		*in = (*in)[1:]
	}
}

// hit adds the hop of one report, and before it what happened since the last.
func (b *builder) hit(h *seen) {
	if h.CTID != 0 {
		b.path.CTID, b.path.Reply = h.CTID, h.CTReply
	}
	if h.HasPacket && h.Packet != b.now {
		b.moved(&h.Packet, h)
	}
	if h.Kind == trace.HopEnd && h.base {
		return // its policy follows
	}
	found := b.j.cfg.Rules(&h.RuleHit)
	if found.Rule != nil && b.j.cfg.Own(h.Table, found.Rule.Target) || h.Target != "" && b.j.cfg.Own(h.Table, h.Target) {
		return // the way to the tracer's own chain
	}
	kind := h.Kind
	if found.Rule != nil {
		kind = trace.HopRule
	}
	hop := trace.Hop{
		Kind: kind, Hook: h.named(), Table: h.Table, Chain: h.Chain, Rule: h.Number, Handle: h.Handle,
		Verdict: h.Verdict, Target: h.Target, Mark: h.Mark, Source: h.Source,
		In: b.device(h.InDev), Out: b.device(h.OutDev), PhysIn: b.device(h.PhysIn), PhysOut: b.device(h.PhysOut),
	}
	if h.KernelTime {
		hop.Time = time.Unix(0, h.Time).UTC()
	}
	switch kind {
	case trace.HopRule:
		b.rule(&hop, &found)
	case trace.HopEnd:
		hop.Verdict = "return"
		if hop.Rule == 0 {
			hop.Rule = found.End
		}
	case trace.HopPolicy:
		hop.Rule = 0
		if hop.Verdict == "" {
			if hop.Verdict = "accept"; found.Policy == "DROP" {
				hop.Verdict = "drop"
			}
		}
		if hop.Verdict == "drop" {
			hop.Purpose = "the policy of the chain drops what no rule accepted"
		}
	}
	b.marked(&hop, h)
	b.add(hop)
}

// rule fills in what is known of a rule.
func (b *builder) rule(hop *trace.Hop, found *Found) {
	if found.Native {
		hop.Rule, hop.Text = found.Number, found.Text
		if found.Effect != "" {
			hop.Verdict = found.Effect
		}
		hop.Purpose = nftables.Meaning(hop.Chain, found.Text, hop.Target, b.j.cfg.Names.endpoint)
		if hop.Untracks() {
			hop.Purpose = "not tracked: " + hop.Table + " says notrack"
		}
		return
	}
	if found.Rule == nil {
		if found.Note != "" {
			hop.Purpose = found.Note
		}
		if hop.Verdict == "" {
			hop.Verdict = "unknown"
		}
		return
	}
	hop.Rule, hop.Text, hop.Verdict = found.Number, found.Text, found.Effect
	hop.Target, hop.Probability = "", found.Probability()
	if hop.Verdict == "jump" || hop.Verdict == "goto" {
		hop.Target = found.Rule.Target
	}
	hop.Purpose = meaning(found, hop, &b.now, b.j.cfg.Names)
	if to, ok := found.Rule.TargetOpt("to-destination"); ok && hop.Verdict == "dnat" {
		if after, err := netip.ParseAddrPort(to); err == nil {
			before := b.now.Tuple.Dst()
			hop.Changes = append(hop.Changes, trace.Change{Field: "dst", Before: before.String(), After: after.String()})
			b.now.Tuple = b.now.Tuple.WithDst(after)
		}
	}
}

// marked adds the change of the mark. nf_tables reports it as it is after the
// rule, iptables-legacy as it was before.
func (b *builder) marked(hop *trace.Hop, h *seen) {
	if !h.HasMark || h.Mark == b.mark {
		hop.Mark = b.mark
		return
	}
	change := trace.Change{Field: "mark", Before: hex(b.mark), After: hex(h.Mark)}
	hop.Mark = b.mark
	b.mark = h.Mark
	if h.Source == trace.NFTrace {
		hop.Changes = append(hop.Changes, change)
		return
	}
	hop.Mark = h.Mark
	for i := len(b.path.Hops) - 1; i >= 0; i-- {
		if before := &b.path.Hops[i]; before.Kind == trace.HopRule {
			before.Changes = append(before.Changes, change)
			return
		}
	}
}

func hex(n uint32) string { return fmt.Sprintf("0x%x", n) }

// moved notes how the packet differs from what was last known of it. next is the
// report that tells so, nil where a device does.
func (b *builder) moved(now *trace.PacketHeader, next *seen) {
	before := b.now
	b.now = *now
	var changes []trace.Change
	if a, c := before.Tuple.Src(), now.Tuple.Src(); a != c && !b.credit("src", a, c, "snat", "masquerade") {
		changes = append(changes, trace.Change{Field: "src", Before: a.String(), After: c.String()})
	}
	if a, c := before.Tuple.Dst(), now.Tuple.Dst(); a != c && !b.credit("dst", a, c, "dnat", "redirect") {
		changes = append(changes, trace.Change{Field: "dst", Before: a.String(), After: c.String()})
	}
	if hop, ok := b.ipvs(changes, next); ok {
		b.add(hop)
		changes = nil
	}
	if len(changes) > 0 {
		b.add(trace.Hop{
			Kind: trace.HopConntrack, Hook: b.lastHook(), Changes: changes, Source: trace.Conntrack,
			Purpose: "translated as the connection's first packet was",
		})
	}
	changes = nil
	if before.TTL != now.TTL {
		changes = append(changes, trace.Change{Field: "ttl", Before: fmt.Sprint(before.TTL), After: fmt.Sprint(now.TTL)})
	}
	if before.TOS != now.TOS {
		changes = append(changes, trace.Change{Field: "tos", Before: fmt.Sprintf("0x%02x", before.TOS), After: fmt.Sprintf("0x%02x", now.TOS)})
	}
	if len(changes) > 0 {
		b.add(trace.Hop{Kind: trace.HopRoute, Changes: changes, Purpose: "routed", Source: b.p.hits[0].Source})
	}
	b.known = len(b.path.Hops)
}

// ipvs recognises IPVS by where a packet changed. A request gets its endpoint
// behind the rules of input, or, if the node sends it, behind those of nat in
// output; one that then leaves the node meets the rules of output again. An answer
// gets the Service's address behind the rules of forward, or in output if the node
// gives it. Connection tracking translates at none of these, but for what the node
// sends, of which nat then sees nothing.
func (b *builder) ipvs(changes []trace.Change, next *seen) (trace.Hop, bool) {
	if len(changes) != 1 || !b.j.cfg.IPVS() {
		return trace.Hop{}, false
	}
	c := changes[0]
	hop := trace.Hop{Kind: trace.HopIPVS, Hook: b.lastHook(), Changes: changes, Source: trace.IPVS}
	sent := next != nil && next.hook == "output" && (next.Table == "raw" || next.Table == "mangle") ||
		slices.ContainsFunc(b.path.Hops, func(h trace.Hop) bool { return h.Hook == "output" && h.Table == "nat" })
	switch {
	case c.Field == "dst" && (hop.Hook == "input" || hop.Hook == "output" && sent):
		hop.Verdict, hop.Purpose = "dnat", "IPVS sends it to "+c.After
	case c.Field == "src" && (hop.Hook == "forward" || hop.Hook == "output" && next != nil):
		hop.Verdict, hop.Purpose = "snat", "IPVS answers as "+c.After
	default:
		return trace.Hop{}, false
	}
	return hop, true
}

func (b *builder) lastHook() string {
	if n := len(b.path.Hops); n > 0 {
		return b.path.Hops[n-1].Hook
	}
	return ""
}

// credit gives a change to the last hop since the packet was told that does such
// things.
func (b *builder) credit(field string, from, to netip.AddrPort, verdicts ...string) bool {
	for i := len(b.path.Hops) - 1; i >= b.known; i-- {
		if h := &b.path.Hops[i]; slices.Contains(verdicts, h.Verdict) {
			h.Changes = append(h.Changes, trace.Change{Field: field, Before: from.String(), After: to.String()})
			return true
		}
	}
	return false
}

// leave notes how the packet left.
func (b *builder) leave(out []trace.Sighting) {
	if len(b.path.Hops) == 0 {
		return
	}
	last := b.path.Hops[len(b.path.Hops)-1]
	if len(out) > 0 {
		seen := out[len(out)-1].Packet
		seen.TTL, seen.TOS, seen.Len = b.now.TTL, b.now.TOS, b.now.Len
		b.moved(&seen, nil)
		b.path.Left = b.now.Tuple
		return
	}
	if strings.TrimPrefix(last.Hook, trace.BridgeHook) != "postrouting" || last.Verdict == "drop" || last.Verdict == "reject" {
		return
	}
	if b.path.Reply || slices.ContainsFunc(b.path.Hops, func(h trace.Hop) bool { return h.Verdict == "masquerade" || h.Verdict == "snat" }) {
		return // conntrack may have translated it since; Complete tells
	}
	b.path.Left = b.now.Tuple
}

// wires tells the devices it came in by from those it left by.
func (b *builder) wires() (in, out []trace.Sighting) {
	wire := slices.Clone(b.p.wire)
	slices.SortStableFunc(wire, func(a, c trace.Sighting) int { return int(a.Time - c.Time) })
	entry := map[uint32]bool{}
	for i := range b.p.hits {
		if h := &b.p.hits[i]; h.hook == "prerouting" || h.hook == "input" || h.Family == nfnl.FamilyBridge && h.hook == "forward" {
			entry[h.InDev], entry[h.PhysIn] = true, true
		}
	}
	delete(entry, 0)
	came := func(s trace.Sighting) bool {
		return len(entry) > 0 && s.Packet.TTL == b.p.first.TTL &&
			(s.Packet.Tuple == b.p.first.Tuple || entry[s.Device] && !b.left(s.Device))
	}
	for i, s := range wire {
		switch {
		case !came(s) || len(out) > 0:
			out = append(out, s)
		case entry[s.Device] && !b.left(s.Device):
			in = append(in, s)
		case entry[s.Device] && !slices.ContainsFunc(in, func(o trace.Sighting) bool { return o.Device == s.Device }):
			in = append(in, s) // a bridge that it comes in by and leaves by
		case b.left(s.Device):
			out = append(out, s)
		case i == 0, slices.ContainsFunc(wire[i+1:], func(o trace.Sighting) bool { return came(o) && entry[o.Device] }):
			in = append(in, s) // a port of the bridge that it came in by
		default:
			out = append(out, s) // the port it was bridged to, unchanged
		}
	}
	return in, out
}

// left reports whether a device is one the packet was to leave by.
func (b *builder) left(dev uint32) bool {
	return slices.ContainsFunc(b.p.hits, func(h seen) bool { return h.OutDev == dev || h.PhysOut == dev })
}

func (b *builder) wire(s trace.Sighting, dir string) trace.Hop {
	h := trace.Hop{Kind: trace.HopWire, Hook: dir, Time: time.Unix(0, s.Time).UTC(), Source: trace.Wire}
	if dir == "in" {
		h.In = b.device(s.Device)
	} else {
		h.Out = b.device(s.Device)
	}
	return h
}

func (b *builder) device(index uint32) string {
	if index == 0 {
		return ""
	}
	if name := b.j.cfg.Device(index); name != "" {
		return name
	}
	return fmt.Sprintf("if%d", index)
}
