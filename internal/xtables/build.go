package xtables

import (
	"net/netip"
	"strconv"
)

// New returns r in canonical form, on the heap; it copies the lists of matches
// and options, so that they may be used for other rules. Building rules with it
// rather than comparing bare literals saves the work at every comparison.
func New(r Rule) *Rule { return r.canon() }

// The protocols kube-proxy knows, for Rule.Proto.
var (
	TCP  = Proto{Name: "tcp"}
	UDP  = Proto{Name: "udp"}
	SCTP = Proto{Name: "sctp"}
)

func match(name string, opts ...Opt) Match { return Match{Name: name, Opts: opts} }

func opt(name string, values ...string) Opt { return Opt{Name: name, Values: values} }

// Not returns m with all its options inverted.
func Not(m Match) Match {
	out := Match{Name: m.Name, Opts: make([]Opt, len(m.Opts))}
	for i, o := range m.Opts {
		o.Not = !o.Not
		out.Opts[i] = o
	}
	return out
}

// Comment is -m comment.
func Comment(text string) Match { return match("comment", opt("comment", text)) }

// DPort is the protocol's own match for a destination port: -m tcp --dport 80.
func DPort(proto string, port uint16) Match {
	return match(proto, opt("dport", strconv.Itoa(int(port))))
}

// L4 is the protocol's own match without options: -m tcp.
func L4(proto string) Match { return match(proto) }

// TCPFlags is -m tcp --tcp-flags mask comp.
func TCPFlags(mask, comp string) Match { return match("tcp", opt("tcp-flags", mask, comp)) }

// MarkIs is -m mark --mark value/mask.
func MarkIs(value, mask uint32) Match { return match("mark", opt("mark", hexPair(value, mask))) }

// CTState is -m conntrack --ctstate; states are comma-separated.
func CTState(states string) Match { return match("conntrack", opt("ctstate", states)) }

// SrcType is -m addrtype --src-type.
func SrcType(types string) Match { return match("addrtype", opt("src-type", types)) }

// DstType is -m addrtype --dst-type.
func DstType(types string) Match { return match("addrtype", opt("dst-type", types)) }

// Random is -m statistic --mode random --probability p.
func Random(p float64) Match {
	return match("statistic", opt("mode", "random"),
		opt("probability", strconv.FormatFloat(Probability(p), 'f', 11, 64)))
}

// RecentCheck is -m recent --name list --rcheck --seconds n --reap.
func RecentCheck(list string, seconds int) Match {
	return match("recent", opt("rcheck"), opt("seconds", strconv.Itoa(seconds)), opt("reap"),
		opt("name", list))
}

// RecentSet is -m recent --name list --set.
func RecentSet(list string) Match { return match("recent", opt("set"), opt("name", list)) }

// NFAcct is -m nfacct --nfacct-name name.
func NFAcct(name string) Match { return match("nfacct", opt("nfacct-name", name)) }

// MatchSet is -m set --match-set name dirs, where dirs is like "dst,dst".
func MatchSet(name, dirs string) Match { return match("set", opt("match-set", name, dirs)) }

// SetXmark are the options of -j MARK that make the mark = mark &^ mask ^ value:
// (M, M) sets the bits M, (M, 0) flips them.
func SetXmark(value, mask uint32) []Opt { return []Opt{opt("set-xmark", hexFull(value, mask))} }

// DNATTo are the options of -j DNAT --to-destination.
func DNATTo(to netip.AddrPort) []Opt { return []Opt{opt("to-destination", to.String())} }

// NFLog are the options of -j NFLOG. Size 0 means the whole packet and
// threshold 0 the kernel's default; a prefix is at most 63 bytes, for legacy
// iptables cuts longer ones without a word.
func NFLog(prefix string, group uint16, size uint32, threshold uint16) []Opt {
	opts := []Opt{opt("nflog-prefix", prefix), opt("nflog-group", strconv.Itoa(int(group)))}
	if size > 0 {
		opts = append(opts, opt("nflog-size", strconv.FormatUint(uint64(size), 10)))
	}
	if threshold > 0 {
		opts = append(opts, opt("nflog-threshold", strconv.Itoa(int(threshold))))
	}
	return opts
}

// RandomFully are the options of -j MASQUERADE --random-fully.
func RandomFully() []Opt { return []Opt{opt("random-fully")} }

func hexPair(value, mask uint32) string {
	if mask == 1<<32-1 {
		return string(appendHex(nil, value))
	}
	return hexFull(value, mask)
}

func hexFull(value, mask uint32) string {
	return string(appendHex(append(appendHex(nil, value), '/'), mask))
}
