package proxy

import (
	"strconv"

	"github.com/kptrace/kptrace/internal/xtables"
)

// The chains of Reports, all in table mangle.
const (
	ChainTrace = "KPTRACE"
	ChainLife  = "KPTRACE-LIFE"
	ChainPick  = "KPTRACE-PICK"
)

// What of each packet an NFLOG rule copies: headers, and of an ICMP error the
// packet it is about too.
const (
	reportSize     = 64
	reportSizeICMP = 128
)

// InvalidSegment matches a segment of a connection that connection tracking takes for
// INVALID, not too many a second: there is no entry to tell whose it is.
const InvalidSegment = "-p tcp -m tcp --tcp-flags FIN,SYN,RST NONE -m conntrack --ctstate INVALID -m limit --limit 100/sec --limit-burst 500"

// InvalidPurpose is what a rule with that match and an NFLOG target is for.
const InvalidPurpose = "report a segment that connection tracking takes for INVALID"

// Reports is a set of rules that report the life of connections and whose number
// does not grow with Services: addresses are in ipsets, and one rule serves all.
// The IPVS mode has them, and whoever watches another kube-proxy. They decide
// nothing.
//
// A first packet, or a SYN sent again, is reported as it is addressed to a Service
// (IDVirtual) and once more behind the pick; answers, FIN, RST, the first answer
// of a UDP flow and ICMP errors once. They stand in mangle, which comes before nat
// in PREROUTING and OUTPUT, and before sources are translated in POSTROUTING and
// INPUT.
type Reports struct {
	// Group is the NFLOG group.
	Group uint16
	// Virtual and Real are the names of the sets of the Services' addresses and
	// of the endpoints, both of type hash:ip,port.
	Virtual, Real string
	// Picked matches a packet for which an endpoint was picked, and PickID is the
	// id of its tag.
	Picked, PickID string
	// Rules says that rules pick, before a packet is routed. It is then reported on
	// its way through the node or into it too, before anybody's filter drops it.
	Rules bool
}

// AddTo appends the chains and jumps to l, and returns the tagged rules.
func (r *Reports) AddTo(l *xtables.Layout) []*Rule {
	w := reportsWriter{l, r.Group, nil}
	icmp := "icmp"
	if l.Family == xtables.IPv6 {
		icmp = "ipv6-icmp"
	}
	for _, from := range []string{"PREROUTING", "OUTPUT"} {
		in := "" // what comes in by lo went out by OUTPUT
		if from == "PREROUTING" {
			in = "! -i lo "
		}
		w.jump(from, ChainTrace, in+"-p udp -m conntrack --ctstate NEW")
		w.jump(from, ChainTrace, in+"-p udp -m conntrack --ctdir REPLY -m connbytes --connbytes 1:1 --connbytes-mode packets --connbytes-dir reply")
		w.jump(from, ChainTrace, in+"-p "+icmp+" -m conntrack --ctstate RELATED")
		w.jump(from, ChainTrace, in+"-p sctp -m sctp --chunk-types any INIT,INIT_ACK,ABORT,SHUTDOWN")
		w.jump(from, ChainTrace, in+"-p tcp -m tcp ! --tcp-flags FIN,SYN,RST NONE")
	}
	w.chain(ChainTrace,
		w.log(ChainTrace, TagICMP, "", "-p "+icmp, reportSizeICMP, "report an ICMP error about a service connection"),
		"-m set --match-set "+r.Virtual+" dst,dst -j "+ChainLife,
		"-m set --match-set "+r.Real+" src,src -j "+ChainLife)
	var invalid []string
	if r.Rules {
		w.jump("FORWARD", ChainTrace, "-p tcp -m conntrack --ctstate INVALID")
		invalid = append(invalid, w.log(ChainLife, TagInvalid, "", InvalidSegment, reportSize, InvalidPurpose))
	}
	life := func(kind TagKind, id, match, purpose string) string {
		return w.log(ChainLife, kind, id, match, reportSize, purpose)
	}
	w.chain(ChainLife, append(invalid,
		life(TagSynAck, "", "-p tcp -m tcp --tcp-flags SYN,ACK SYN,ACK", "report the answer to a SYN"),
		life(TagFin, "", "-p tcp -m tcp --tcp-flags FIN FIN", "report the end of one direction"),
		life(TagRst, "", "-p tcp -m tcp --tcp-flags RST RST", "report a reset"),
		life(TagSynAck, "", "-p sctp -m sctp --chunk-types any INIT_ACK", "report the answer to an INIT"),
		life(TagFin, "", "-p sctp -m sctp --chunk-types any SHUTDOWN", "report the end of an association"),
		life(TagRst, "", "-p sctp -m sctp --chunk-types any ABORT", "report an abort"),
		life(TagReply, "", "-p udp -m conntrack --ctdir REPLY", "report the first answer of a UDP flow"),
		life(TagSyn, "", "-p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN -m conntrack --ctstate ESTABLISHED", "report a SYN sent again after the answer"),
		life(TagSyn, IDVirtual, "-m conntrack --ctstate NEW", "report a connection to a Service before an endpoint is picked, and each SYN sent again"))...)
	w.chain(ChainPick,
		w.log(ChainPick, TagPick, r.PickID, r.Picked, reportSize, "report which endpoint was picked: it is the packet's destination"))
	own := ""
	if r.Rules {
		w.jump("INPUT", ChainPick, "! -i lo -m conntrack --ctstate NEW") // lo: it was in POSTROUTING
		w.jump("FORWARD", ChainPick, "-m conntrack --ctstate NEW")
		own = "-m addrtype --src-type LOCAL " // others were in FORWARD
	}
	w.jump("POSTROUTING", ChainPick, own+"-m conntrack --ctstate NEW")
	return w.tagged
}

type reportsWriter struct {
	layout *xtables.Layout
	group  uint16
	tagged []*Rule
}

func (w *reportsWriter) jump(from, to, match string) {
	w.layout.Jumps = append(w.layout.Jumps, xtables.LayoutJump{
		Table: "mangle", Chain: from, Rule: match + ` -m comment --comment "kptrace: life of service connections" -j ` + to,
	})
}

func (w *reportsWriter) chain(name string, rules ...string) {
	w.layout.Chains = append(w.layout.Chains, xtables.LayoutChain{Table: "mangle", Name: name, Rules: rules})
}

func (w *reportsWriter) log(chain string, kind TagKind, id, match string, size int, purpose string) string {
	tag := Tag{Kind: kind, ID: id}
	w.tagged = append(w.tagged, &Rule{Tag: tag, Table: "mangle", Chain: chain, Purpose: purpose})
	return match + ` -j NFLOG --nflog-prefix "` + tag.String() + `" --nflog-group ` + strconv.Itoa(int(w.group)) + " --nflog-size " + strconv.Itoa(size)
}
