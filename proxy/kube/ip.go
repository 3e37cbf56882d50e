package kube

import (
	"fmt"
	"net/netip"
	"strings"

	netutils "k8s.io/utils/net"
)

// parseAddr reads an address as kube-proxy does: leading zeros are decimal, as
// in objects from before they were forbidden, and a mapped IPv4 address is an
// IPv4 address.
func parseAddr(text string) (netip.Addr, error) {
	if ip, err := netip.ParseAddr(text); err == nil && ip.Zone() == "" {
		return ip.Unmap(), nil
	}
	ip, ok := netip.AddrFromSlice(netutils.ParseIPSloppy(text))
	if !ok {
		return netip.Addr{}, fmt.Errorf("%q is not an IP address", text)
	}
	return ip.Unmap(), nil
}

// parsePrefix reads a range of addresses in the same way, without what is
// beyond its bits. Blanks around it are allowed, since the API allows them.
func parsePrefix(text string) (netip.Prefix, error) {
	text = strings.TrimSpace(text)
	if p, err := netip.ParsePrefix(text); err == nil && !p.Addr().Is4In6() {
		return p.Masked(), nil
	}
	_, n, err := netutils.ParseCIDRSloppy(text)
	if err != nil {
		return netip.Prefix{}, fmt.Errorf("%q is not a CIDR", text)
	}
	ip, _ := netip.AddrFromSlice(n.IP)
	ones, bits := n.Mask.Size()
	if ip = ip.Unmap(); ip.Is4() && bits == 128 {
		ones -= 96
	}
	p := netip.PrefixFrom(ip, ones)
	if !p.IsValid() {
		return p, fmt.Errorf("%q is not a CIDR", text)
	}
	return p.Masked(), nil
}
