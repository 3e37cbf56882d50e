package xtables

import (
	"net/netip"
	"slices"
)

// indexFrom is the length of a chain from which on it is worth an index.
const indexFrom = 16

// chainIndex finds the rules of a long chain that can match a packet: those
// for its destination, those for its port, and those that name neither. Each
// list holds places in the chain, in order.
type chainIndex struct {
	byDst  map[netip.Addr][]int32
	byPort map[portKey][]int32
	rest   []int32
}

type portKey struct {
	proto string
	port  uint16
}

func newChainIndex(rules []*Rule) *chainIndex {
	x := &chainIndex{byDst: make(map[netip.Addr][]int32), byPort: make(map[portKey][]int32)}
	for i, r := range rules {
		n := int32(i)
		if d := &r.Dst; d.Prefix.IsValid() && !d.Not && d.Prefix.IsSingleIP() {
			x.byDst[d.Prefix.Addr()] = append(x.byDst[d.Prefix.Addr()], n)
		} else if key, ok := rulePort(r); ok {
			x.byPort[key] = append(x.byPort[key], n)
		} else {
			x.rest = append(x.rest, n)
		}
	}
	return x
}

// rulePort returns the one destination port that a rule is for.
func rulePort(r *Rule) (portKey, bool) {
	if r.Proto.Name == "" || r.Proto.Not {
		return portKey{}, false
	}
	m := r.Match(r.Proto.Name)
	if m == nil {
		return portKey{}, false
	}
	o := m.Opt("dport")
	if o == nil || o.Not {
		return portKey{}, false
	}
	lo, hi, ok := parsePorts(o.Value(), ':')
	return portKey{r.Proto.Name, lo}, ok && lo == hi
}

// next returns the first place from i on whose rule can match p, or -1.
func (x *chainIndex) next(p *Packet, i int) int {
	best := -1
	for _, list := range [...][]int32{x.byDst[p.Dst], x.byPort[portKey{p.Proto, p.DPort}], x.rest} {
		j, _ := slices.BinarySearch(list, int32(i))
		if j < len(list) && (best < 0 || int(list[j]) < best) {
			best = int(list[j])
		}
	}
	return best
}
