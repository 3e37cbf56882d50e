package beside

import (
	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
)

// Our sets.
const (
	setVirtual = "KPTRACE-VIRTUAL"
	setReal    = "KPTRACE-REAL"
)

// isOurs reports whether a chain is one of ours.
func isOurs(table, chain string) bool {
	return table == "mangle" && (chain == proxy.ChainTrace || chain == proxy.ChainLife || chain == proxy.ChainPick)
}

// setName is the name of one of our sets in a family.
func setName(name string, ip6 bool) string {
	if ip6 {
		return "KPTRACE-6-" + name[len("KPTRACE-"):]
	}
	return name
}

// layout writes our chains of one family, and lists the tagged rules in them.
func layout(fa xtables.Family, mode proxy.Mode, group uint16) (xtables.Layout, []*proxy.Rule) {
	ip6 := fa == xtables.IPv6
	r := proxy.Reports{
		Group: group, Virtual: setName(setVirtual, ip6), Real: setName(setReal, ip6),
		Picked: "-m conntrack --ctstate DNAT", PickID: proxy.IDTranslated, Rules: true,
	}
	if mode == proxy.IPVS {
		r.Picked, r.PickID, r.Rules = "-m ipvs --ipvs", proxy.IDScheduled, false
	}
	l := xtables.Layout{Family: fa}
	tagged := r.AddTo(&l)
	return l, tagged
}
