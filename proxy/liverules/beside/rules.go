package beside

import (
	"strconv"

	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
)

// Our chains, all in table mangle, and our sets.
const (
	chainTrace = "KPTRACE"
	chainLife  = "KPTRACE-LIFE"
	chainPick  = "KPTRACE-PICK"

	setVirtual = "KPTRACE-VIRTUAL"
	setReal    = "KPTRACE-REAL"
)

const about = ` -m comment --comment "kptrace: life of service connections"`

// What of each packet the NFLOG rules copy; see proxy/iptables.
const (
	nflogSize     = 64
	nflogSizeICMP = 128
)

// isOurs reports whether a chain is one of ours.
func isOurs(table, chain string) bool {
	return table == "mangle" && (chain == chainTrace || chain == chainLife || chain == chainPick)
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
	w := writer{layout: xtables.Layout{Family: fa}, group: group}
	ip6, icmp := fa == xtables.IPv6, "icmp"
	if ip6 {
		icmp = "ipv6-icmp"
	}
	in := func(set, dirs string) string { return "-m set --match-set " + setName(set, ip6) + " " + dirs }

	// PREROUTING and OUTPUT of mangle come before those of nat.
	for _, from := range []string{"PREROUTING", "OUTPUT"} {
		come := "" // what comes in by lo went out by OUTPUT
		if from == "PREROUTING" {
			come = "! -i lo "
		}
		w.jump(from, chainTrace, come+"-p udp -m conntrack --ctstate NEW")
		w.jump(from, chainTrace, come+"-p udp -m conntrack --ctdir REPLY -m connbytes --connbytes 1:1 --connbytes-mode packets --connbytes-dir reply")
		w.jump(from, chainTrace, come+"-p "+icmp+" -m conntrack --ctstate RELATED")
		w.jump(from, chainTrace, come+"-p sctp -m sctp --chunk-types any INIT,INIT_ACK,ABORT,SHUTDOWN")
		w.jump(from, chainTrace, come+"-p tcp -m tcp ! --tcp-flags FIN,SYN,RST NONE")
	}
	w.chain(chainTrace,
		w.log(chainTrace, proxy.TagICMP, "", "-p "+icmp, nflogSizeICMP, "report an ICMP error about a service connection"),
		in(setVirtual, "dst,dst")+" -j "+chainLife,
		in(setReal, "src,src")+" -j "+chainLife)
	w.chain(chainLife,
		w.log(chainLife, proxy.TagSynAck, "", "-p tcp -m tcp --tcp-flags SYN,ACK SYN,ACK", nflogSize, "report the answer to a SYN"),
		w.log(chainLife, proxy.TagFin, "", "-p tcp -m tcp --tcp-flags FIN FIN", nflogSize, "report the end of one direction"),
		w.log(chainLife, proxy.TagRst, "", "-p tcp -m tcp --tcp-flags RST RST", nflogSize, "report a reset"),
		w.log(chainLife, proxy.TagSynAck, "", "-p sctp -m sctp --chunk-types any INIT_ACK", nflogSize, "report the answer to an INIT"),
		w.log(chainLife, proxy.TagFin, "", "-p sctp -m sctp --chunk-types any SHUTDOWN", nflogSize, "report the end of an association"),
		w.log(chainLife, proxy.TagRst, "", "-p sctp -m sctp --chunk-types any ABORT", nflogSize, "report an abort"),
		w.log(chainLife, proxy.TagReply, "", "-p udp -m conntrack --ctdir REPLY", nflogSize, "report the first answer of a UDP flow"),
		w.log(chainLife, proxy.TagSyn, proxy.IDVirtual, "-m conntrack --ctstate NEW", nflogSize, "report a connection to a Service before it is translated, and each SYN sent again"))

	// POSTROUTING and INPUT of mangle come before source addresses are
	// translated.
	match, id := "-m conntrack --ctstate DNAT", proxy.IDTranslated
	if mode == proxy.IPVS {
		match, id = "-m ipvs --ipvs", proxy.IDScheduled
	} else {
		w.jump("INPUT", chainPick, "! -i lo -m conntrack --ctstate NEW") // lo: it was in POSTROUTING
	}
	w.jump("POSTROUTING", chainPick, "-m conntrack --ctstate NEW")
	w.chain(chainPick, w.log(chainPick, proxy.TagPick, id, match, nflogSize, "report which endpoint was picked: it is the packet's destination"))
	return w.layout, w.tagged
}

type writer struct {
	layout xtables.Layout
	tagged []*proxy.Rule
	group  uint16
}

func (w *writer) jump(from, to, match string) {
	w.layout.Jumps = append(w.layout.Jumps, xtables.LayoutJump{Table: "mangle", Chain: from, Rule: match + about + " -j " + to})
}

func (w *writer) chain(name string, rules ...string) {
	w.layout.Chains = append(w.layout.Chains, xtables.LayoutChain{Table: "mangle", Name: name, Rules: rules})
}

func (w *writer) log(chain string, kind proxy.TagKind, id, match string, size int, purpose string) string {
	tag := proxy.Tag{Kind: kind, ID: id}
	w.tagged = append(w.tagged, &proxy.Rule{Tag: tag, Table: "mangle", Chain: chain, Purpose: purpose})
	return match + ` -j NFLOG --nflog-prefix "` + tag.String() + `" --nflog-group ` + strconv.Itoa(int(w.group)) + " --nflog-size " + strconv.Itoa(size)
}
