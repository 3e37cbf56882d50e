package ipvs

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
)

// Index lists the tagged rules. They serve all Services: which one a report is
// about its packet says.
func (p *program) Index() proxy.Index {
	x := proxy.Index{}
	for _, f := range p.families {
		for _, r := range f.tagged {
			if err := x.Add(r); err != nil {
				panic(err) // tags are constants
			}
		}
	}
	return x
}

// Problems lists what could not be rendered.
func (p *program) Problems() []proxy.Problem { return p.problems }

// RuleCounts counts the rules of each table, jumps from built-in chains
// included.
func (p *program) RuleCounts() map[proxy.Table]int {
	n := map[proxy.Table]int{}
	for _, f := range p.families {
		for table, rules := range f.layout.Rules() {
			n[proxy.Table{IP6: f.ip6, Name: table}] = rules
		}
	}
	return n
}

// Text is the whole program, part by part as its tool takes it: ip, ipset,
// iptables and ipvsadm.
func (p *program) Text() string {
	b := []byte("# ip -batch -\nlink add " + Device + " type dummy\n")
	for _, f := range p.families {
		addrs := slices.SortedFunc(maps.Keys(f.bound), netip.Addr.Compare)
		for _, ip := range addrs {
			b = fmt.Appendf(b, "addr add %s dev %s\n", netip.PrefixFrom(ip, ip.BitLen()), Device)
		}
	}
	for _, f := range p.families {
		b = append(b, f.setsText()...)
		b = append(b, "# "+xtables.Program(xtables.Legacy, f.layout.Family, "restore")+" --noflush (or its nft twin)\n"...)
		b = append(b, f.layout.Text()...)
	}
	b = append(b, "# ipvsadm --restore\n"...)
	for _, f := range p.families {
		for _, u := range f.units {
			for i := range u.virtuals {
				b = u.virtuals[i].text(b)
			}
		}
	}
	return string(b)
}

// setsText writes the sets for ipset restore, their members in order.
func (f *familyProgram) setsText() []byte {
	b := []byte("# ipset restore\n")
	members := map[entry]bool{}
	for _, u := range f.units {
		for _, e := range u.entries {
			members[e] = true
		}
	}
	family := "inet"
	if f.ip6 {
		family = "inet6"
	}
	for s := range numSets {
		if def := s.def(); def.kind == typeBitmapPort {
			b = fmt.Appendf(b, "create %s %s range 0-65535 -exist\n", s.name(f.ip6), def.kind)
		} else {
			b = fmt.Appendf(b, "create %s %s family %s -exist\n", s.name(f.ip6), def.kind, family)
		}
	}
	sorted := slices.SortedFunc(maps.Keys(members), func(a, b entry) int {
		return cmp.Or(int(a.set)-int(b.set), a.ip.Compare(b.ip), int(a.port)-int(b.port), int(a.proto)-int(b.proto),
			a.other.Compare(b.other), int(a.bits)-int(b.bits))
	})
	for _, e := range sorted {
		b = fmt.Appendf(b, "add %s %s -exist\n", e.set.name(f.ip6), e)
	}
	return b
}
