package xtables

import "strings"

// optSpec is what is known of one option of an extension.
type optSpec struct {
	name  string // as it is printed
	argc  int    // how many arguments it takes
	rank  int    // its place in what iptables-save prints
	plain bool   // a string: printed bare only if xtables_save_string would
}

// extension is what is known of a match or target. Its options are printed in
// the order of the list unless it is loose.
type extension struct {
	opts  map[string]optSpec
	loose bool
}

// spec lists options as "name:argc", an alias as "alias=name:argc", a quoted
// string as "name:1q". A leading "~" keeps the options in the order given.
func spec(list string) *extension {
	e := &extension{opts: make(map[string]optSpec)}
	for i, word := range strings.Fields(list) {
		if word == "~" {
			e.loose = true
			continue
		}
		name, args, _ := strings.Cut(word, ":")
		alias, real, isAlias := strings.Cut(name, "=")
		if !isAlias {
			real = alias
		}
		o := optSpec{name: real, rank: i, plain: strings.HasSuffix(args, "q")}
		if args != "" {
			o.argc = int(args[0] - '0')
		}
		e.opts[alias] = o
	}
	return e
}

// The tables below say how many arguments an option takes (man page
// iptables-extensions(8)) and in which order iptables-save 1.8.9 prints them.
// Aliases follow the option they stand for, so that they share its rank.
var matchExtensions = map[string]*extension{
	"comment":   spec("comment:1q"),
	"tcp":       spec("sport:1 source-port=sport:1 dport:1 destination-port=dport:1 tcp-option:1 tcp-flags:2 syn:0"),
	"udp":       spec("sport:1 source-port=sport:1 dport:1 destination-port=dport:1"),
	"udplite":   spec("sport:1 source-port=sport:1 dport:1 destination-port=dport:1"),
	"sctp":      spec("sport:1 source-port=sport:1 dport:1 destination-port=dport:1 chunk-types:2"),
	"icmp":      spec("icmp-type:1"),
	"icmp6":     spec("icmpv6-type:1"),
	"mark":      spec("mark:1"),
	"connmark":  spec("mark:1"),
	"state":     spec("state:1"),
	"statistic": spec("mode:1 probability:1 every:1 packet:1"),
	"recent": spec("set:0 rcheck:0 update:0 remove:0 seconds:1 reap:0 hitcount:1 rttl:0 " +
		"name:1 mask:1 rsource:0 rdest:0"),
	"conntrack": spec("ctstate:1 ctproto:1 ctorigsrc:1 ctorigdst:1 ctreplsrc:1 ctrepldst:1 " +
		"ctorigsrcport:1 ctorigdstport:1 ctreplsrcport:1 ctrepldstport:1 ctstatus:1 ctexpire:1 ctdir:1"),
	"addrtype": spec("src-type:1 dst-type:1 limit-iface-in:0 limit-iface-out:0"),
	"physdev": spec("physdev-is-in:0 physdev-in:1 physdev-is-out:0 physdev-out:1 " +
		"physdev-is-bridged:0"),
	"multiport": spec("~ sports:1 source-ports=sports:1 dports:1 destination-ports=dports:1 ports:1"),
	"limit":     spec("limit:1 limit-burst:1"),
	"connbytes": spec("connbytes:1 connbytes-mode:1 connbytes-dir:1"),
	"set": spec("~ match-set:2 return-nomatch:0 update-counters:0 update-subcounters:0 packets-eq:1 " +
		"packets-lt:1 packets-gt:1 bytes-eq:1 bytes-lt:1 bytes-gt:1"),
	"nfacct":   spec("nfacct-name:1"),
	"owner":    spec("~ uid-owner:1 gid-owner:1 socket-exists:0 suppl-groups:0"),
	"ipvs":     spec("~ ipvs:0 vproto:1 vaddr:1 vport:1 vdir:1 vmethod:1 vportctl:1"),
	"iprange":  spec("src-range:1 dst-range:1"),
	"mac":      spec("mac-source:1"),
	"length":   spec("length:1"),
	"string":   spec("hex-string:1q string:1q algo:1 from:1 to:1 icase:0"),
	"pkttype":  spec("pkt-type:1"),
	"helper":   spec("helper:1q"),
	"ttl":      spec("~ ttl-eq:1 ttl-lt:1 ttl-gt:1"),
	"socket":   spec("~ transparent:0 nowildcard:0 restore-skmark:0"),
	"rpfilter": spec("~ loose:0 validmark:0 accept-local:0 invert:0"),
}

var targetExtensions = map[string]*extension{
	"ACCEPT":     spec(""),
	"DROP":       spec(""),
	"RETURN":     spec(""),
	"TRACE":      spec(""),
	"NOTRACK":    spec(""),
	"REJECT":     spec("reject-with:1"),
	"MARK":       spec("set-xmark:1 set-mark:1 and-mark:1 or-mark:1 xor-mark:1"),
	"DNAT":       spec("to-destination:1 random:0 persistent:0"),
	"SNAT":       spec("to-source:1 random:0 random-fully:0 persistent:0"),
	"MASQUERADE": spec("to-ports:1 random:0 random-fully:0"),
	"REDIRECT":   spec("to-ports:1 random:0"),
	"NFLOG":      spec("nflog-prefix:1q nflog-group:1 nflog-range:1 nflog-size:1 nflog-threshold:1"),
	"LOG": spec("log-prefix:1q log-level:1 log-tcp-sequence:0 log-tcp-options:0 log-ip-options:0 " +
		"log-uid:0 log-macdecode:0"),
	"CT": spec("~ notrack:0 helper:1 timeout:1 ctevents:1 expevents:1 zone-orig:1 zone-reply:1 zone:1"),
	"CONNMARK": spec("set-xmark:1 set-mark:1 and-mark:1 or-mark:1 xor-mark:1 save-mark:0 restore-mark:0 " +
		"nfmask:1 ctmask:1 mask:1"),
	"TCPMSS":    spec("set-mss:1 clamp-mss-to-pmtu:0"),
	"TEE":       spec("gateway:1 oif:1"),
	"TPROXY":    spec("on-port:1 on-ip:1 tproxy-mark:1"),
	"NETMAP":    spec("to:1"),
	"CLASSIFY":  spec("set-class:1"),
	"CHECKSUM":  spec("checksum-fill:0"),
	"NFQUEUE":   spec("~ queue-num:1 queue-balance:1 queue-bypass:0 queue-cpu-fanout:0"),
	"IDLETIMER": spec("~ timeout:1 label:1 alarm:0"),
	"SET":       spec("~ add-set:2 del-set:2 map-set:2 exist:0 timeout:1"),
}

func (e *extension) option(name string) (optSpec, bool) {
	if e == nil {
		return optSpec{}, false
	}
	o, ok := e.opts[name]
	return o, ok
}

// protoMatch returns the match that iptables loads by itself for the options
// of a protocol.
func protoMatch(proto string) string {
	switch proto {
	case "tcp", "udp", "sctp", "udplite", "icmp", "dccp", "esp", "ah":
		return proto
	case "ipv6-icmp":
		return "icmp6"
	}
	return ""
}

// protoName returns the name that iptables-save prints for the argument of -p.
func protoName(s string) string {
	switch s {
	case "tcp", "udp", "sctp", "icmp", "ipv6-icmp":
		return s
	case "all", "0", "ip":
		return ""
	case "icmpv6":
		return "ipv6-icmp"
	case "mh", "ipv6-mh", "135":
		return "mobility-header"
	}
	for _, p := range protocols {
		if p.number == s {
			return p.name
		}
	}
	return strings.ToLower(s)
}

// protocols are the names of /etc/protocols as Debian ships it, as far as a
// firewall is likely to name them.
var protocols = []struct{ number, name string }{
	{"1", "icmp"}, {"2", "igmp"}, {"4", "ipencap"}, {"6", "tcp"}, {"17", "udp"}, {"33", "dccp"},
	{"41", "ipv6"}, {"43", "ipv6-route"}, {"44", "ipv6-frag"}, {"46", "rsvp"}, {"47", "gre"},
	{"50", "esp"}, {"51", "ah"}, {"58", "ipv6-icmp"}, {"59", "ipv6-nonxt"}, {"60", "ipv6-opts"},
	{"88", "eigrp"}, {"89", "ospf"}, {"94", "ipip"}, {"103", "pim"}, {"108", "ipcomp"},
	{"112", "vrrp"}, {"115", "l2tp"}, {"132", "sctp"}, {"136", "udplite"},
}
