package xtables

import (
	"errors"
	"fmt"
	"math/bits"
	"net/netip"
	"strconv"
	"strings"
)

// parseAddr reads the argument of -s and -d.
func parseAddr(f Family, s string) (Addr, error) {
	text, mask, masked := strings.Cut(s, "/")
	ip, err := netip.ParseAddr(text)
	if err != nil {
		if isHostName(text) {
			return Addr{Text: s}, nil
		}
		return Addr{}, fmt.Errorf("bad address %q", s)
	}
	if ip.Zone() != "" || ip.BitLen() != f.bits() {
		return Addr{}, fmt.Errorf("address %q is not %v", s, f)
	}
	if !masked {
		return Host(ip), nil
	}
	if n, err := strconv.Atoi(mask); err == nil {
		p, err := ip.Prefix(n)
		if err != nil {
			return Addr{}, fmt.Errorf("bad mask %q", s)
		}
		return Addr{Prefix: p}, nil
	}
	m, err := netip.ParseAddr(mask)
	if err != nil || m.Zone() != "" || m.BitLen() != f.bits() {
		return Addr{}, fmt.Errorf("bad mask %q", s)
	}
	n, ok := ones(m)
	if !ok { // a mask with holes
		b := appendIP(nil, andAddr(ip, m))
		return Addr{Text: string(appendIP(append(b, '/'), m))}, nil
	}
	p, err := ip.Prefix(n)
	return Addr{Prefix: p}, err
}

// ones returns the length of a mask without holes.
func ones(mask netip.Addr) (n int, ok bool) {
	for i, b := range mask.AsSlice() {
		k := bits.LeadingZeros8(^b)
		if b != byte(uint16(0xff00)>>k) || k > 0 && n != 8*i {
			return 0, false
		}
		n += k
	}
	return n, true
}

func andAddr(a, mask netip.Addr) netip.Addr {
	b, m := a.AsSlice(), mask.AsSlice()
	for i := range b {
		b[i] &= m[i]
	}
	out, _ := netip.AddrFromSlice(b)
	return out
}

// matches reports whether ip is in a; known is false where that cannot be
// told (a host name).
func (a *Addr) matches(ip netip.Addr) (match, known bool) {
	switch {
	case a.Prefix.IsValid():
		return a.Prefix.Contains(ip) != a.Not, true
	case a.Text == "":
		return true, true
	}
	text, mask, _ := strings.Cut(a.Text, "/")
	want, err1 := netip.ParseAddr(text)
	m, err2 := netip.ParseAddr(mask)
	if errors.Join(err1, err2) != nil || m.BitLen() != ip.BitLen() {
		return false, false
	}
	return (andAddr(ip, m) == want) != a.Not, true
}

// appendIP prints an address as inet_ntop(3) of glibc does, which differs from
// netip for IPv4-compatible IPv6 addresses.
func appendIP(b []byte, a netip.Addr) []byte {
	if a.Is6() && !a.Is4In6() {
		if x := a.As16(); [12]byte(x[:12]) == [12]byte{} && (x[12] != 0 || x[13] != 0) {
			b = append(b, "::"...)
			return netip.AddrFrom4([4]byte(x[12:])).AppendTo(b)
		}
	}
	return a.AppendTo(b)
}

// isHostName accepts what the resolver might know, and nothing that would not
// survive a text.
func isHostName(s string) bool {
	letter := false
	for i := 0; i < len(s); i++ {
		switch c := s[i]; {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z':
			letter = true
		case c >= '0' && c <= '9', c == '_', i > 0 && (c == '.' || c == '-'):
		default:
			return false
		}
	}
	return letter
}
