package redact

import (
	"crypto/hmac"
	"crypto/sha256"
	"net/netip"
)

// specials mean the same on every machine, and stay. privates are of no one in
// particular: they stay at level Names, and keep their range at level All.
func specials() (always, private []netip.Prefix) {
	for _, s := range []string{
		"0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/4", "240.0.0.0/4",
		"::/127", "::ffff:0:0/96", "fe80::/10", "ff00::/8",
	} {
		always = append(always, netip.MustParsePrefix(s))
	}
	for _, s := range []string{"10.0.0.0/8", "100.64.0.0/10", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7"} {
		private = append(private, netip.MustParsePrefix(s))
	}
	return always, private
}

// Addr returns the replacement of an address. IPv4 stays IPv4.
func (r *Redactor) Addr(a netip.Addr) netip.Addr {
	if r.level == None || !a.IsValid() {
		return a
	}
	if a.Is4In6() {
		return netip.AddrFrom16(r.Addr(a.Unmap()).As16())
	}
	if out, ok := r.addrs[a]; ok {
		return out
	}
	out := r.mapped(a)
	r.addrs[a] = out
	return out
}

// mapped flips each bit or not by what stands before it (as Crypto-PAn does), but
// never one that would lead into or out of a range that has a meaning.
func (r *Redactor) mapped(a netip.Addr) netip.Addr {
	for _, p := range r.always {
		if p.Contains(a) {
			return a
		}
	}
	if r.level == Names {
		for _, p := range r.private {
			if p.Contains(a) {
				return a
			}
		}
	}
	in := a.AsSlice()
	out := make([]byte, len(in))
	copy(out, in)
	for i := range len(in) * 8 {
		if r.leads(a, i) {
			continue
		}
		before, _ := a.Prefix(i) // i is in range
		m := hmac.New(sha256.New, r.key)
		m.Write([]byte{'a', byte(len(in)), byte(i)})
		m.Write(before.Addr().AsSlice())
		if m.Sum(nil)[0]&1 != 0 {
			out[i/8] ^= 0x80 >> (i % 8)
		}
	}
	mapped, _ := netip.AddrFromSlice(out) // as long as a
	return mapped
}

// leads reports whether the first i bits of an address begin a range with a
// meaning, without being all of it.
func (r *Redactor) leads(a netip.Addr, i int) bool {
	before, err := a.Prefix(i)
	if err != nil {
		return false
	}
	for _, list := range [2][]netip.Prefix{r.always, r.private} {
		for _, p := range list {
			if p.Addr().BitLen() == a.BitLen() && i < p.Bits() && before.Contains(p.Addr()) {
				return true
			}
		}
	}
	return false
}

// AddrPort returns the replacement of an address, with the same port.
func (r *Redactor) AddrPort(a netip.AddrPort) netip.AddrPort {
	if !a.IsValid() {
		return a
	}
	return netip.AddrPortFrom(r.Addr(a.Addr()), a.Port())
}

// Prefix returns the replacement of a range; bits behind the prefix stay as they
// are if they are zero.
func (r *Redactor) Prefix(p netip.Prefix) netip.Prefix {
	if !p.IsValid() {
		return p
	}
	out := netip.PrefixFrom(r.Addr(p.Addr()), p.Bits())
	if p == p.Masked() {
		return out.Masked()
	}
	return out
}

// addrBytes replaces an address of 4 or 16 bytes in its place.
func (r *Redactor) addrBytes(b []byte) {
	if a, ok := netip.AddrFromSlice(b); ok {
		copy(b, r.Addr(a).AsSlice())
	}
}
