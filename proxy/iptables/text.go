package iptables

import (
	"net/netip"
	"strconv"
	"strings"

	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
)

// Rules are written as iptables-save 1.8.9 prints them back, so that what we
// want and what the kernel has can be compared as text: source, destination,
// protocol, comment, other matches, target.

// line joins the parts of a rule that are not empty.
func line(parts ...string) string {
	n := 0
	for _, p := range parts {
		if p != "" {
			n += len(p) + 1
		}
	}
	var b strings.Builder
	b.Grow(n)
	for _, p := range parts {
		if p == "" {
			continue
		}
		if b.Len() > 0 {
			b.WriteByte(' ')
		}
		b.WriteString(p)
	}
	return b.String()
}

func from(p netip.Prefix) string { return "-s " + p.String() }
func to(p netip.Prefix) string   { return "-d " + p.String() }

func host(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }

// comment is right for every text with a character outside [A-Za-z0-9_-], as
// all of ours have; iptables-save prints others without quotes.
func comment(s string) string { return `-m comment --comment "` + s + `"` }

func dport(proto string, port uint16) string {
	return "-m " + proto + " --dport " + strconv.Itoa(int(port))
}

func jump(chain string) string { return "-j " + chain }

func hex(n uint32) string { return "0x" + strconv.FormatUint(uint64(n), 16) }

// probability is 1/n as the kernel keeps it: kube-proxy writes ten digits,
// xt_statistic rounds them to 31 bits, iptables-save prints eleven.
func probability(n int) string {
	p, err := strconv.ParseFloat(strconv.FormatFloat(1/float64(n), 'f', 10, 64), 64)
	if err != nil {
		panic(err) // it was made by FormatFloat
	}
	kept := uint32(p*(1<<31) + 0.5)
	return strconv.FormatFloat(float64(kept)/(1<<31), 'f', 11, 64)
}

// reject is the REJECT target of a family.
func reject(f xtables.Family) string {
	if f == xtables.IPv6 {
		return "-j REJECT --reject-with icmp6-port-unreachable"
	}
	return "-j REJECT --reject-with icmp-port-unreachable"
}

// recent is an xt_recent match on the whole source address.
func recent(f xtables.Family, list, what string) string {
	mask := "255.255.255.255"
	if f == xtables.IPv6 {
		mask = "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"
	}
	return "-m recent " + what + " --name " + list + " --mask " + mask + " --rsource"
}

// nflog is the target of a tagged rule.
func (r *renderer) nflog(t proxy.Tag, size int) string { return nflogTo(t, r.cfg.NFLogGroup, size) }

func nflogTo(t proxy.Tag, group uint16, size int) string {
	return `-j NFLOG --nflog-prefix "` + t.String() + `" --nflog-group ` +
		strconv.Itoa(int(group)) + " --nflog-size " + strconv.Itoa(size)
}
