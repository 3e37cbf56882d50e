package proxy

import (
	"net"
	"net/netip"
	"slices"
)

// NodePortConfig says which of the node's addresses serve node ports.
type NodePortConfig struct {
	// Ranges limits node ports to addresses in one of them. A family of which
	// there is no range serves them on all.
	Ranges []netip.Prefix
	// Primary limits them to the Node's first address of each family.
	Primary bool
	// LocalAddrs tells the node's addresses, as InterfaceAddrs does. Nil means
	// the Node's and 127.0.0.1.
	LocalAddrs func() []netip.Addr
}

// Limits returns the ranges of one family; none means all addresses, and so
// does a range of all among them.
func (c *NodePortConfig) Limits(node *Node, ip6 bool) []netip.Prefix {
	var ranges []netip.Prefix
	if c.Primary {
		for _, ip := range node.Addrs {
			if ofFamily(ip, ip6) {
				return []netip.Prefix{netip.PrefixFrom(ip, ip.BitLen())}
			}
		}
	}
	for _, p := range c.Ranges {
		switch {
		case !ofFamily(p.Addr(), ip6):
		case p.Bits() == 0:
			return nil
		default:
			ranges = append(ranges, p)
		}
	}
	return ranges
}

// Loopback reports whether the limits of IPv4 leave 127.0.0.0/8.
func (c *NodePortConfig) Loopback(node *Node) bool {
	ranges := c.Limits(node, false)
	return len(ranges) == 0 || slices.ContainsFunc(ranges, func(p netip.Prefix) bool {
		return p.Addr().IsLoopback() || p.Contains(netip.AddrFrom4([4]byte{127}))
	})
}

// Addrs lists the addresses of one family that serve node ports, those of the
// loopback network only if asked.
func (c *NodePortConfig) Addrs(node *Node, ip6, loopback bool) []netip.Addr {
	var addrs, ips []netip.Addr
	if c.LocalAddrs != nil {
		addrs = c.LocalAddrs()
	} else {
		addrs = append(addrs, netip.AddrFrom4([4]byte{127, 0, 0, 1}))
		addrs = append(addrs, node.Addrs...)
	}
	ranges := c.Limits(node, ip6)
	for _, ip := range addrs {
		if !ofFamily(ip, ip6) || ip.IsLoopback() && !loopback || slices.Contains(ips, ip) {
			continue
		}
		if len(ranges) == 0 || slices.ContainsFunc(ranges, func(p netip.Prefix) bool { return p.Contains(ip) }) {
			ips = append(ips, ip)
		}
	}
	return ips
}

func ofFamily(a netip.Addr, ip6 bool) bool { return a.IsValid() && !a.Is4In6() && a.Is6() == ip6 }

// InterfaceAddrs returns the addresses of all interfaces of the calling thread's
// network namespace, none if they cannot be read.
func InterfaceAddrs() []netip.Addr {
	list, err := net.InterfaceAddrs()
	if err != nil {
		return nil
	}
	var addrs []netip.Addr
	for _, a := range list {
		if p, err := netip.ParsePrefix(a.String()); err == nil {
			addrs = append(addrs, p.Addr().Unmap())
		}
	}
	return addrs
}
