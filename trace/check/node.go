package check

import (
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/proxy"
)

// behind is how much older than the API's state rules may be before it is said.
const behind = 10 * time.Second

// The shares of a table's limit from which on it is said.
const (
	nearFull = 0.80
	full     = 0.98
)

// settings looks at sysctls.
func (c *checker) settings() {
	is := func(name, value string) bool { return c.Sysctls[name] == value }
	if is("net/ipv4/ip_forward", "0") {
		c.add("ip-forward", "net.ipv4.ip_forward", "sysctl -w net.ipv4.ip_forward=1, and in /etc/sysctl.d for good", "it is 0: packets to pods and from pods are not forwarded")
	}
	six := c.Snapshot != nil && slices.ContainsFunc(c.Snapshot.Services, func(s proxy.Service) bool { return s.Is6() })
	if six && is("net/ipv6/conf/all/forwarding", "0") {
		c.add("ip-forward", "net.ipv6.conf.all.forwarding", "sysctl -w net.ipv6.conf.all.forwarding=1, and in /etc/sysctl.d for good", "it is 0, and there are Services with IPv6 addresses")
	}
	if is("net/ipv4/conf/all/rp_filter", "1") {
		c.add("rp-filter", "net.ipv4.conf.all.rp_filter", "2 (loose) is enough where packets may come back by another interface", "it is 1 (strict)")
	}
	if len(c.Bridges) > 0 && is("net/bridge/bridge-nf-call-iptables", "0") && slices.ContainsFunc(c.Bridges, podBridge) {
		c.add("bridge-nf-call", "net.bridge.bridge-nf-call-iptables", "sysctl -w net.bridge.bridge-nf-call-iptables=1 if pods hang on a bridge",
			"it is 0, and there are bridges (%s): an answer from a pod to another on the same bridge does not pass the rules that would translate it back", strings.Join(c.Bridges, ", "))
	}
}

// podBridge tells a bridge to which a CNI may attach pods from others.
func podBridge(name string) bool {
	return name == "cni0" || name == "cbr0" || strings.HasPrefix(name, "cni-") || name == "weave" || name == "kube-bridge"
}

// tables looks at how full the kernel's tables are, and what is stale in them.
func (c *checker) tables() {
	if s := c.Counters; s != nil && s.Limit > 0 {
		share := float64(s.Entries) / float64(s.Limit)
		const fix = "sysctl -w net.netfilter.nf_conntrack_max, or find out who makes so many connections"
		switch {
		case share >= full:
			c.add("conntrack-full", "net.netfilter.nf_conntrack_max", fix, "%d of %d entries are in use, and %d packets were refused for it so far", s.Entries, s.Limit, s.Drop)
		case share >= nearFull:
			c.add("conntrack-near-full", "net.netfilter.nf_conntrack_max", fix, "%d of %d entries are in use (%.0f %%)", s.Entries, s.Limit, 100*share)
		}
		if s.InsertFailed > 0 {
			c.add("conntrack-clash", "nf_conntrack", "for DNS, NodeLocal DNSCache avoids it", "%d first packets were lost to a race for one entry since the node started", s.InsertFailed)
		}
	}
	c.stale()
	for _, name := range sorted(c.Lists) {
		if c.ListMax > 0 && c.Lists[name] >= c.ListMax {
			object := name
			if c.live != nil {
				if _, svc, ep, ok := c.live.Chain(name); ok {
					object = svc.String() + " -> " + ep.String()
				}
			}
			c.add("affinity-full", object, "load xt_recent with a larger ip_list_tot, or use IPVS mode for Services with affinity and many clients",
				"the kernel's list of this endpoint holds %d clients, as many as it can: of more, those not seen for longest lose their affinity", c.Lists[name])
		}
	}
}

func sorted(m map[string]int) []string {
	var names []string
	for n := range m {
		names = append(names, n)
	}
	slices.Sort(names)
	return names
}

// stale looks for UDP entries that keep a client from the endpoints there are.
func (c *checker) stale() {
	if c.Snapshot == nil || len(c.Entries) == 0 {
		return
	}
	frontends := c.Frontends
	if frontends == nil {
		if c.live != nil && c.live.Mode() == proxy.Userspace {
			return // entries lead to ports that only that proxy knows
		}
		frontends = c.Snapshot.UDPFrontends()
	}
	local := func(a netip.Addr) bool { return a.IsLoopback() || slices.Contains(c.Addrs, a) }
	found := make(map[netip.AddrPort][]conntrack.Flow)
	for i := range c.Entries {
		if e := &c.Entries[i]; frontends.Stale(e, local) {
			found[e.Orig.Dst()] = append(found[e.Orig.Dst()], *e)
		}
	}
	for dst, entries := range found {
		e := &entries[0]
		to := "is translated to " + e.Reply.Src().String() + ", which is no endpoint any more"
		if e.Reply.Src() == e.Orig.Dst() {
			to = "is not translated at all, for it is older than the rules"
		}
		f := c.add("conntrack-stale", c.nameOf(dst), "conntrack -D -p udp --orig-dst "+dst.Addr().String()+", or let kptrace's proxy do it",
			"%s entries keep clients of %s away from its endpoints: %s %s", strconv.Itoa(len(entries)), dst, e.Orig, to)
		f.Ours = c.Program != nil
	}
}

// nameOf names the Service at an address, or returns the address.
func (c *checker) nameOf(dst netip.AddrPort) string {
	for i := range c.Snapshot.Services {
		s := &c.Snapshot.Services[i]
		if s.Name.Proto != conntrack.UDP {
			continue
		}
		if s.Port == dst.Port() && (s.ClusterIP == dst.Addr() || slices.Contains(s.ExternalIPs, dst.Addr()) || slices.Contains(s.LoadBalancerIPs, dst.Addr())) ||
			s.NodePort == dst.Port() && slices.Contains(c.Addrs, dst.Addr()) {
			return s.Name.String()
		}
	}
	return dst.String()
}
