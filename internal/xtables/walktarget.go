package xtables

import (
	"net/netip"
	"strings"
)

// apply does what a matching rule says; it returns false if the branch is over.
func (x *walking) apply(b *branch, i int, r *Rule, prob float64, note string) bool {
	c := b.stack[len(b.stack)-1].chain
	step := func(effect string) *Step { return x.step(b, c, i, r, effect, prob, note) }
	switch r.Target {
	case "ACCEPT":
		step(EffectAccept)
		b.stack = b.stack[:0]
		return true
	case "DROP":
		step(EffectDrop)
		x.leaf(b, Drop, "")
		return false
	case "REJECT":
		with, _ := r.TargetOpt("reject-with")
		step(EffectReject)
		x.leaf(b, Reject, with)
		return false
	case "RETURN":
		step(EffectReturn)
		if b.stack = b.stack[:len(b.stack)-1]; len(b.stack) == 0 {
			return x.policy(b)
		}
		return true
	case "MARK", "CONNMARK", "CT", "NOTRACK":
		s := step(EffectMatch)
		x.alter(b, r)
		s.MarkAfter = b.p.Mark
		return true
	case "DNAT", "SNAT", "MASQUERADE", "REDIRECT":
		x.translate(b, r, step(EffectMatch))
		b.stack = b.stack[:0]
		return true
	}
	if passive(r) {
		step(EffectMatch)
		return true
	}
	next := b.table.Chain(r.Target)
	switch {
	case next == nil:
		note = "what " + r.Target + " does is not known"
		step(EffectUnknown)
		x.leaf(b, Lost, "")
		return false
	case len(b.stack) >= maxDepth:
		note = "the chains jump in a circle"
		step(EffectUnknown)
		x.leaf(b, Lost, "")
		return false
	case r.Goto:
		step(EffectGoto)
		b.stack[len(b.stack)-1] = frame{chain: next}
	default:
		step(EffectJump)
		b.stack = append(b.stack, frame{chain: next})
	}
	return true
}

// alter carries out the targets that change marks and state.
func (x *walking) alter(b *branch, r *Rule) {
	p := &b.p
	switch r.Target {
	case "MARK":
		if s, ok := r.TargetOpt("set-xmark"); ok {
			if mark, ok := remark(p.Mark, s); ok {
				p.Mark = mark
			}
		}
	case "CONNMARK":
		nf, ct := maskOf(r, "nfmask"), maskOf(r, "ctmask")
		if s, ok := r.TargetOpt("set-xmark"); ok {
			if mark, ok := remark(p.CTMark, s); ok {
				p.CTMark = mark
			}
		} else if _, ok := r.TargetOpt("save-mark"); ok {
			p.CTMark = p.CTMark&^ct ^ p.Mark&nf
		} else if _, ok := r.TargetOpt("restore-mark"); ok {
			p.Mark = p.Mark&^nf ^ p.CTMark&ct
		}
	default: // CT, NOTRACK
		if _, ok := r.TargetOpt("notrack"); ok || r.Target == "NOTRACK" {
			p.State = StateUntracked
		}
	}
}

// translate carries out the targets of nat.
func (x *walking) translate(b *branch, r *Rule, s *Step) {
	p := &b.p
	switch r.Target {
	case "DNAT":
		s.Effect = EffectDNAT
		to, _ := r.TargetOpt("to-destination")
		addr, port, exact := natTarget(to)
		if addr.IsValid() {
			p.Dst = addr
		}
		if port != 0 {
			p.DPort = port
		}
		if !exact {
			s.Note = "one of a range"
		}
		p.State |= StateDNAT
	case "REDIRECT":
		s.Effect = EffectRedirect
		if p.In == "" { // sent by the node: the kernel takes loopback
			p.Dst = netip.AddrFrom4([4]byte{127, 0, 0, 1})
			if p.Src.Is6() {
				p.Dst = netip.IPv6Loopback()
			}
		} else {
			s.Note = "the address of " + p.In
		}
		if ports, ok := r.TargetOpt("to-ports"); ok {
			if lo, _, ok := parsePorts(ports, '-'); ok {
				p.DPort = lo
			}
		}
		p.State |= StateDNAT
	case "SNAT":
		s.Effect = EffectSNAT
		to, _ := r.TargetOpt("to-source")
		addr, port, exact := natTarget(to)
		if addr.IsValid() {
			p.Src = addr
		}
		if port != 0 {
			p.SPort = port
		}
		if !exact {
			s.Note = "one of a range"
		}
		p.State |= StateSNAT
	case "MASQUERADE":
		s.Effect = EffectMasquerade
		p.State |= StateSNAT
		p.Masqueraded = true
	}
	s.DstAfter = netip.AddrPortFrom(p.Dst, p.DPort)
}

// natTarget reads addr[-addr][:port[-port]]; exact is false for a range, of
// which the first is returned.
func natTarget(s string) (addr netip.Addr, port uint16, exact bool) {
	exact = true
	addrs, ports := s, ""
	if s, ok := strings.CutPrefix(s, "["); ok {
		addrs, ports, _ = strings.Cut(s, "]")
		ports = strings.TrimPrefix(ports, ":")
	} else if strings.Count(s, ":") == 1 {
		addrs, ports, _ = strings.Cut(s, ":")
	}
	first, _, many := strings.Cut(addrs, "-")
	if many {
		exact = false
	}
	addr, _ = netip.ParseAddr(first)
	ports, _, _ = strings.Cut(ports, "/")
	lo, hi, ok := parsePorts(ports, '-')
	if ok && ports != "" {
		port = lo
		exact = exact && lo == hi
	}
	return addr, port, exact
}

// Effect returns what a rule does where it matches, as a Step has it.
func (t *Table) Effect(r *Rule) string {
	switch r.Target {
	case "ACCEPT":
		return EffectAccept
	case "DROP":
		return EffectDrop
	case "REJECT":
		return EffectReject
	case "RETURN":
		return EffectReturn
	case "DNAT":
		return EffectDNAT
	case "SNAT":
		return EffectSNAT
	case "MASQUERADE":
		return EffectMasquerade
	case "REDIRECT":
		return EffectRedirect
	case "MARK", "CONNMARK", "CT", "NOTRACK":
		return EffectMatch
	}
	switch {
	case passive(r):
		return EffectMatch
	case t.Chain(r.Target) == nil:
		return EffectUnknown
	case r.Goto:
		return EffectGoto
	}
	return EffectJump
}
