package ipvs

import (
	"net/netip"
	"slices"
	"strings"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
)

// Walk sends the packet through the rendered rules, with the members of sets
// that could concern it, through IPVS, and on through the rules behind it.
//
// Probabilities are the shares that a scheduler gives in the long run: by weight
// for wrr, wlc, sed, nq, sh and mh, equal for all others. For those that look at
// the client or at connections the pick itself is no matter of chance.
func (p *program) Walk(pkt proxy.Packet) proxy.Outcome {
	for _, f := range p.families {
		if f.ip6 == (pkt.Dst.Addr().Is6() && !pkt.Dst.Addr().Is4In6()) {
			return f.walk(pkt)
		}
	}
	return proxy.Outcome{}
}

// walking is one walk.
type walking struct {
	f     *familyProgram
	units []*unit // that could concern the packet
	out   proxy.Outcome
	// picked says that IPVS has the packet behind it.
	picked bool
}

const tcpSYN = 2

// walk is Walk of one family. The Outcome must not be changed, for packets from
// the same kind of source share it.
func (f *familyProgram) walk(pkt proxy.Packet) proxy.Outcome {
	u, via := f.owner(&pkt)
	if u == nil && !f.bound[pkt.Dst.Addr()] {
		return f.walkOnce(pkt, nil, via) // addresses without number: not to be kept
	}
	key := walkKey{unit: u, dst: pkt.Dst, proto: pkt.Proto, fromNode: pkt.FromNode, lo: pkt.In == "lo", source: f.sourceOf(&pkt, u)}
	if out, ok := f.cache.Get(key); ok {
		return out
	}
	out := f.walkOnce(pkt, u, via)
	f.cache.Put(key, out)
	return out
}

// owner finds whose a packet is. What the node sends to an address of kube-ipvs0
// has that address for its source, which is then put right.
func (f *familyProgram) owner(pkt *proxy.Packet) (u *unit, via proxy.Via) {
	if pkt.FromNode && f.bound[pkt.Dst.Addr()] && slices.Contains(f.local, pkt.Src.Addr()) {
		pkt.Src = netip.AddrPortFrom(pkt.Dst.Addr(), pkt.Src.Port())
	}
	if o, ok := f.claims[proxy.Claim{IP: pkt.Dst.Addr(), Port: pkt.Dst.Port(), Proto: pkt.Proto}]; ok {
		return f.units[o.Unit], o.Via
	}
	if o, ok := f.claims[proxy.Claim{Port: pkt.Dst.Port(), Proto: pkt.Proto}]; ok && f.isLocal(pkt.Dst.Addr()) {
		return f.units[o.Unit], o.Via
	}
	return nil, ""
}

// walkOnce is walk without a cache.
func (f *familyProgram) walkOnce(pkt proxy.Packet, u *unit, via proxy.Via) proxy.Outcome {
	w := &walking{f: f}
	if u != nil {
		w.units = []*unit{u}
	}
	f.walks.Do(f.prepare)
	in := xtables.Packet{Proto: pkt.Proto.String(), Src: pkt.Src.Addr(), Dst: pkt.Dst.Addr(),
		SPort: pkt.Src.Port(), DPort: pkt.Dst.Port(), In: pkt.In, State: xtables.StateNew}
	if pkt.Proto == conntrack.TCP {
		in.TCPFlags = tcpSYN
	}
	v := w.virtual(key{pkt.Dst, pkt.Proto})
	before := stations("prerouting mangle PREROUTING", "prerouting nat PREROUTING", "input mangle INPUT", "input filter INPUT")
	if pkt.FromNode {
		in.In = ""
		before = stations("output mangle OUTPUT", "output nat OUTPUT")
		if v == nil { // it goes out by lo and comes in again
			before = append(before, stations("output filter OUTPUT", "postrouting mangle POSTROUTING", "postrouting nat POSTROUTING",
				"input mangle INPUT", "input filter INPUT")...)
		}
	}
	leaf := f.rules.Walk(in, before, w.oracles())[0]
	if len(w.units) == 0 {
		return w.foreign(&leaf)
	}
	w.describe(w.units[0], via, &leaf)
	if leaf.Verdict == xtables.Drop || leaf.Verdict == xtables.Reject {
		w.refused(&leaf)
		return w.out
	}
	if v == nil {
		w.out = proxy.Outcome{Steps: w.steps(&leaf)} // a loopback address, say
		return w.out
	}
	w.choices(v, &leaf, pkt.FromNode)
	return w.out
}

// stations are those of the words "hook table chain", whatever the destination.
func stations(texts ...string) []xtables.Station {
	out := make([]xtables.Station, len(texts))
	for i, text := range texts {
		f := strings.Fields(text)
		out[i] = xtables.Station{Hook: f[0], Table: f[1], Chain: f[2], If: xtables.Unknown}
	}
	return out
}

// prepare makes the walker.
func (f *familyProgram) prepare() {
	rs, err := f.layout.Ruleset()
	if err != nil {
		panic("proxy/ipvs: our own rules do not parse: " + err.Error())
	}
	f.rules = xtables.NewWalker(rs)
}

func (f *familyProgram) isLocal(ip netip.Addr) bool {
	return ip.IsLoopback() || slices.Contains(f.local, ip)
}

// virtual finds the packet's virtual server.
func (w *walking) virtual(at key) *virtual {
	for _, u := range w.units {
		for i := range u.virtuals {
			if u.virtuals[i].key == at {
				return &u.virtuals[i]
			}
		}
	}
	return nil
}

// oracles answer for the sets.
func (w *walking) oracles() xtables.Oracles {
	return xtables.Oracles{
		Other: func(_ *xtables.Rule, m *xtables.Match, _ *xtables.Packet) xtables.Tri {
			if m.Name == "ipvs" {
				return answer(w.picked)
			}
			return xtables.Unknown
		},
		Local: func(ip netip.Addr) bool { return w.f.isLocal(ip) || w.f.bound[ip] },
		Set: func(name string, dirs []string, p *xtables.Packet) xtables.Tri {
			s, ip6, ok := setNamed(name)
			if !ok || ip6 != w.f.ip6 {
				return xtables.Unknown
			}
			if s == setIPs {
				return answer(w.f.bound[p.Dst])
			}
			for _, u := range w.units {
				for i := range u.entries {
					if u.entries[i].set == s && u.entries[i].holds(dirs, p) {
						return xtables.Yes
					}
				}
			}
			return xtables.No
		},
	}
}

func answer(b bool) xtables.Tri {
	if b {
		return xtables.Yes
	}
	return xtables.No
}

// holds reports whether a packet is the member, asked for in the directions of a
// match.
func (e *entry) holds(dirs []string, p *xtables.Packet) bool {
	addr := func(i int) netip.Addr {
		if dirs[i] == "src" {
			return p.Src
		}
		return p.Dst
	}
	port := func(i int) uint16 {
		if dirs[i] == "src" {
			return p.SPort
		}
		return p.DPort
	}
	kind := e.set.def().kind
	if kind == typeBitmapPort {
		return port(0) == e.port
	}
	if addr(0) != e.ip {
		return false
	}
	if kind == typeIP {
		return true
	}
	if port(1) != e.port || e.proto.String() != p.Proto {
		return false
	}
	switch kind {
	case typeIPPortIP:
		return addr(2) == e.other
	case typeIPPortNet:
		return netip.PrefixFrom(e.other, int(e.bits)).Contains(addr(2))
	}
	return true
}

// foreign is what becomes of a packet that no Service claims.
func (w *walking) foreign(leaf *xtables.Leaf) proxy.Outcome {
	out := proxy.Outcome{Steps: w.steps(leaf)}
	switch leaf.Verdict {
	case xtables.Reject:
		out.Verdict, out.Reason = proxy.Reject, "no-such-port"
	case xtables.Drop:
		out.Verdict = proxy.Drop
	default:
	}
	return out
}

// describe says whose the packet is and which policy decides.
func (w *walking) describe(u *unit, via proxy.Via, leaf *xtables.Leaf) {
	w.out = proxy.Outcome{Service: u.svc.Name, Via: via, Affinity: u.svc.Affinity, Policy: u.sel.Policy, Excluded: u.sel.Excluded}
	local := u.svc.ExternalLocal
	if via == proxy.ViaClusterIP {
		local = u.svc.InternalLocal
	}
	if local && w.source(leaf) != chainSourceRanges {
		w.out.Policy, w.out.Excluded = u.sel.LocalPolicy, u.sel.LocalExcluded
	}
}

// source is the chain in which a walk ended.
func (w *walking) source(leaf *xtables.Leaf) string {
	if n := len(leaf.Steps); n > 0 {
		return leaf.Steps[n-1].Chain
	}
	return ""
}

func (w *walking) refused(leaf *xtables.Leaf) {
	w.out.Steps = w.steps(leaf)
	w.out.Verdict, w.out.Reason = proxy.Reject, "no-endpoints"
	switch {
	case w.source(leaf) == chainSourceRanges:
		w.out.Verdict, w.out.Reason = proxy.Drop, "source-range"
	case leaf.Verdict == xtables.Drop:
		w.out.Verdict, w.out.Reason = proxy.Drop, "no-local-endpoints"
	}
}

// choices walks on behind IPVS, once for each real server.
func (w *walking) choices(v *virtual, before *xtables.Leaf, fromNode bool) {
	w.out.Verdict, w.out.Algorithm = proxy.Forward, v.scheduler
	total, n := uint32(0), 0
	for _, r := range v.reals {
		if r.weight > 0 {
			total, n = total+r.weight, n+1
		}
	}
	if n == 1 {
		w.out.Algorithm = "single"
	}
	after := stations("output mangle OUTPUT", "output filter OUTPUT", "postrouting mangle POSTROUTING", "postrouting nat POSTROUTING")
	hook := "input"
	if fromNode {
		hook = "output"
	}
	head := w.steps(before)
	w.picked = true
	for _, r := range v.reals {
		if r.weight == 0 {
			continue
		}
		pkt := before.Packet
		pkt.Dst, pkt.DPort = r.addr.Addr(), r.addr.Port()
		leaf := w.f.rules.Walk(pkt, after, w.oracles())[0]
		c := proxy.Choice{Endpoint: r.addr, Probability: 1 / float64(n)}
		if (proxy.Scheduler{Name: v.scheduler}).Weighs() {
			c.Probability = float64(r.weight) / float64(total)
		}
		if leaf.Packet.Masqueraded {
			c.Masquerade = w.masquerade(before, &leaf)
		}
		c.Steps = append(slices.Clone(head), proxy.Step{Hook: hook, Table: "ipvs", Chain: v.key.String(), Text: "-s " + v.scheduler,
			Purpose: "IPVS picks " + r.addr.String() + " by " + v.scheduler + " and translates the destination", Effect: "dnat"})
		c.Steps = append(c.Steps, w.steps(&leaf)...)
		w.out.Choices = append(w.out.Choices, c)
	}
}

// masquerade says why a packet is masqueraded, from the rule that marked it or,
// where none did, from the one that did it.
func (w *walking) masquerade(before, after *xtables.Leaf) string {
	for i := range before.Steps {
		r := before.Steps[i].Rule
		if r == nil || r.Target != chainMarkMasq {
			continue
		}
		switch {
		case r.Match("addrtype") != nil:
			return "node"
		case before.Steps[i].Chain != chainServices || w.out.Via != proxy.ViaClusterIP:
			return "external"
		case r.Src.Not, r.In.Not:
			return "not-local"
		case strings.Contains(r.String(), "src,dst"):
			return "node"
		}
		return "all"
	}
	for i := range after.Steps {
		if r := after.Steps[i].Rule; r != nil && r.Target == "MASQUERADE" && strings.Contains(r.String(), setLoopBack.name(w.f.ip6)) {
			return "hairpin"
		}
	}
	return ""
}

func (w *walking) steps(l *xtables.Leaf) []proxy.Step {
	out := make([]proxy.Step, len(l.Steps))
	for i := range l.Steps {
		s := &l.Steps[i]
		out[i] = proxy.Step{Hook: s.Hook, Table: s.Table, Chain: s.Chain, Effect: s.Effect, Rule: s.Index}
		if s.Rule != nil {
			out[i].Text, out[i].Purpose = s.Rule.String(), s.Rule.Comment()
		}
	}
	return out
}
