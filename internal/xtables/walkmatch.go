package xtables

import (
	"math"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// outcome is whether a rule matches: not, or with a probability that holds if
// the matches in unknown do.
type outcome struct {
	p       float64 // 0 for not at all
	unknown []*Match
	// ask is a question behind one of the unknown, zero for none.
	ask Question
}

// evaluate tries all of a rule's matches on a packet.
func (o *Oracles) evaluate(r *Rule, p *Packet) outcome {
	if r.Proto.Name != "" && (r.Proto.Name == p.Proto) == r.Proto.Not || r.Frag == "-f" {
		return outcome{}
	}
	o.ask = Question{}
	in, to := o.device(r.In, false, p), o.device(r.Out, true, p)
	if in == No || to == No {
		return outcome{}
	}
	out := outcome{p: 1}
	if in == Unknown {
		out.unknown = append(out.unknown, &Match{Name: "-i " + r.In.Name})
	}
	if to == Unknown {
		out.unknown = append(out.unknown, &Match{Name: "-o " + r.Out.Name})
	}
	for _, a := range [...]struct {
		addr *Addr
		name string
		ip   netip.Addr
	}{{&r.Src, "source", p.Src}, {&r.Dst, "destination", p.Dst}} {
		match, known := a.addr.matches(a.ip)
		if !known {
			out.unknown = append(out.unknown, &Match{Name: a.name})
		} else if !match {
			return outcome{}
		}
	}
	for i := range r.Matches {
		m := &r.Matches[i]
		prob := 1.0
		var t Tri
		if m.Name == "statistic" {
			prob, t = statistic(m)
		} else if t = o.match(m, p); t == Unknown && o.Other != nil {
			t = o.Other(r, m, p)
		}
		switch {
		case t == No || prob == 0:
			return outcome{}
		case t == Unknown:
			out.unknown = append(out.unknown, m)
		default:
			out.p *= prob
		}
	}
	out.ask = o.ask
	return out
}

func matchIface(i Iface, name string) bool {
	if i.Name == "" {
		return true
	}
	prefix, wild := strings.CutSuffix(i.Name, "+")
	if wild {
		return strings.HasPrefix(name, prefix) != i.Not
	}
	return (name == i.Name) != i.Not
}

// statistic returns the probability of a statistic match.
func statistic(m *Match) (float64, Tri) {
	var p float64
	var o *Opt
	if o = m.Opt("probability"); o != nil {
		v, err := strconv.ParseFloat(o.Value(), 64)
		if err != nil || !(v >= 0 && v <= 1) {
			return 0, Unknown
		}
		p = Probability(v)
	} else if o = m.Opt("every"); o != nil {
		n, err := strconv.ParseUint(o.Value(), 10, 32)
		if err != nil || n == 0 {
			return 0, Unknown
		}
		p = 1 / float64(n)
	} else {
		return 0, Unknown
	}
	if o.Not {
		p = 1 - p
	}
	return p, Yes
}

// match tries one match; all options of a match must hold.
func (o *Oracles) match(m *Match, p *Packet) Tri {
	switch m.Name {
	case "comment", "nfacct":
		return Yes
	case "tcp", "udp", "sctp", "udplite", "icmp", "icmp6":
		if protoMatch(p.Proto) != m.Name {
			return No
		}
	case "recent":
		return o.recent(m, p)
	case "set":
		return o.ipset(m, p)
	}
	all := Yes
	for i := range m.Opts {
		t := o.option(m.Name, &m.Opts[i], m, p)
		if m.Opts[i].Not {
			t = t.not()
		}
		if t == No {
			return No
		}
		if t == Unknown {
			all = Unknown
		}
	}
	if len(m.Opts) == 0 && matchExtensions[m.Name] == nil {
		return Unknown
	}
	return all
}

// option tries one option, without its negation.
func (o *Oracles) option(match string, opt *Opt, m *Match, p *Packet) Tri {
	v := opt.Value()
	switch match + " " + opt.Name {
	case "tcp sport", "udp sport", "sctp sport", "udplite sport":
		return portIn(v, p.SPort)
	case "tcp dport", "udp dport", "sctp dport", "udplite dport":
		return portIn(v, p.DPort)
	case "tcp tcp-flags":
		if len(opt.Values) != 2 {
			return Unknown
		}
		mask, ok1 := tcpFlagBits(opt.Values[0])
		comp, ok2 := tcpFlagBits(opt.Values[1])
		if !ok1 || !ok2 {
			return Unknown
		}
		return tri(p.TCPFlags&mask == comp)
	case "icmp icmp-type", "icmp6 icmpv6-type":
		return icmpIs(v, p)
	case "multiport sports":
		return portList(v, p.SPort)
	case "multiport dports":
		return portList(v, p.DPort)
	case "multiport ports":
		if t := portList(v, p.SPort); t != No {
			return t
		}
		return portList(v, p.DPort)
	case "mark mark":
		return markIs(v, p.Mark)
	case "connmark mark":
		return markIs(v, p.CTMark)
	case "conntrack ctstate", "state state":
		return stateIs(v, p.State)
	case "conntrack ctdir":
		return tri((v == "REPLY") == p.Reply)
	case "conntrack ctstatus":
		return statusIs(v, p)
	case "conntrack ctproto":
		return tri(protoNumber(v) == protoNumber(p.Proto))
	case "conntrack ctorigsrc":
		return addrIs(v, p.OrigSrc.Addr())
	case "conntrack ctorigdst":
		return addrIs(v, p.OrigDst.Addr())
	case "conntrack ctorigsrcport":
		return portIn(v, p.OrigSrc.Port())
	case "conntrack ctorigdstport":
		return portIn(v, p.OrigDst.Port())
	case "addrtype src-type":
		return o.addrType(v, p.Src, m)
	case "addrtype dst-type":
		return o.addrType(v, p.Dst, m)
	case "addrtype limit-iface-in", "addrtype limit-iface-out":
		return Yes // addrType says what is unknown because of them
	case "physdev physdev-is-in":
		return tri(p.PhysIn != "")
	case "physdev physdev-is-out":
		return tri(p.PhysOut != "")
	case "physdev physdev-is-bridged":
		return tri(p.PhysIn != "" && p.PhysOut != "")
	case "physdev physdev-in":
		return tri(matchIface(Iface{Name: v}, p.PhysIn))
	case "physdev physdev-out":
		return tri(matchIface(Iface{Name: v}, p.PhysOut))
	case "iprange src-range":
		return rangeHas(v, p.Src)
	case "iprange dst-range":
		return rangeHas(v, p.Dst)
	}
	return Unknown
}

func portIn(s string, port uint16) Tri {
	lo, hi, ok := parsePorts(s, ':')
	if !ok {
		return Unknown
	}
	return tri(lo <= port && port <= hi)
}

func portList(s string, port uint16) Tri {
	all := No
	for word := range strings.SplitSeq(s, ",") {
		switch portIn(word, port) {
		case Yes:
			return Yes
		case Unknown:
			all = Unknown
		}
	}
	return all
}

func icmpIs(s string, p *Packet) Tri {
	if s == "any" {
		return Yes
	}
	typ, code, hasCode := strings.Cut(s, "/")
	t, err := strconv.ParseUint(typ, 10, 8)
	if err != nil {
		return Unknown
	}
	if !hasCode {
		return tri(uint8(t) == p.ICMPType)
	}
	c, err := strconv.ParseUint(code, 10, 8)
	if err != nil {
		return Unknown
	}
	return tri(uint8(t) == p.ICMPType && uint8(c) == p.ICMPCode)
}

func markIs(s string, mark uint32) Tri {
	value, mask, ok := parseMark(s)
	if !ok {
		return Unknown
	}
	return tri(mark&mask == value)
}

func stateIs(s string, state State) Tri {
	for word := range strings.SplitSeq(s, ",") {
		i := slices.Index(ctStates, word)
		if i < 0 {
			return Unknown
		}
		bit := [...]State{StateInvalid, StateNew, StateRelated, StateEstablished, StateUntracked, StateSNAT, StateDNAT}[i]
		if state&bit != 0 {
			return Yes
		}
	}
	return No
}

// statusIs knows of the status bits what the state implies.
func statusIs(s string, p *Packet) Tri {
	all := No
	for word := range strings.SplitSeq(s, ",") {
		t := Unknown
		switch word {
		case "NONE":
			t = tri(p.State&(StateNew|StateEstablished|StateRelated) == 0)
		case "SEEN_REPLY":
			if p.Reply || p.State&StateEstablished != 0 {
				t = Yes
			} else if p.State&StateNew != 0 {
				t = No
			}
		case "CONFIRMED":
			if p.State&StateEstablished != 0 {
				t = Yes
			}
		case "ASSURED":
			if p.State&StateNew != 0 {
				t = No
			}
		}
		if t == Yes {
			return Yes
		}
		if t == Unknown {
			all = Unknown
		}
	}
	return all
}

func addrIs(s string, ip netip.Addr) Tri {
	f := IPv4
	if ip.Is6() {
		f = IPv6
	}
	a, err := parseAddr(f, s)
	if err != nil || !ip.IsValid() {
		return Unknown
	}
	match, known := a.matches(ip)
	if !known {
		return Unknown
	}
	return tri(match)
}

func rangeHas(s string, ip netip.Addr) Tri {
	first, last, ok := strings.Cut(s, "-")
	if !ok {
		last = first
	}
	lo, err1 := netip.ParseAddr(first)
	hi, err2 := netip.ParseAddr(last)
	if err1 != nil || err2 != nil {
		return Unknown
	}
	return tri(lo.Compare(ip) <= 0 && ip.Compare(hi) <= 0)
}

// remark carries out --set-xmark.
func remark(mark uint32, s string) (uint32, bool) {
	value, mask, ok := parseMark(s)
	return mark&^mask ^ value, ok
}

// maskOf reads a mask option, all ones if absent.
func maskOf(r *Rule, name string) uint32 {
	s, ok := r.TargetOpt(name)
	if !ok {
		return math.MaxUint32
	}
	n, ok := parseUint32(s)
	if !ok {
		return math.MaxUint32
	}
	return n
}
