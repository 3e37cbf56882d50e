package userspace

import (
	"net/netip"
	"strconv"
	"strings"

	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
)

// Rules are written as iptables-save 1.8.9 prints them back, so that what we
// want and what the kernel has can be compared as text.

// line joins the parts of a rule that are not empty.
func line(parts ...string) string {
	kept := make([]string, 0, len(parts))
	for _, p := range parts {
		if p != "" {
			kept = append(kept, p)
		}
	}
	return strings.Join(kept, " ")
}

func host(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }

func from(p netip.Prefix) string { return "-s " + p.String() }

func to(a netip.Addr) string { return "-d " + host(a).String() }

// comment is right for every text with a character outside [A-Za-z0-9_-], as
// all of ours have; iptables-save prints others without quotes.
func comment(s string) string { return `-m comment --comment "` + s + `"` }

func dport(proto string, port uint16) string {
	return "-m " + proto + " --dport " + strconv.Itoa(int(port))
}

func reject(f xtables.Family) string {
	if f == xtables.IPv6 {
		return "-j REJECT --reject-with icmp6-port-unreachable"
	}
	return "-j REJECT --reject-with icmp-port-unreachable"
}

// source and device are the two places in a rule of which one has the match of
// a detector.
func source(d proxy.Detector) string {
	if !d.CIDR.IsValid() {
		return ""
	}
	return from(d.CIDR)
}

func device(d proxy.Detector) string {
	if d.Interface == "" {
		return ""
	}
	return "-i " + d.Interface
}
