package iptables

import (
	"net/netip"

	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
)

// Config says how the mode works on this node. Its zero value is a kube-proxy
// without a local detector and without tracing, in whichever flavour the node
// uses.
type Config struct {
	Family xtables.Family
	// Tools says where the programs are and in which namespace they run.
	Tools xtables.Tools
	// Flavour is "auto", "nft" or "legacy"; empty means auto.
	Flavour string
	// TakeOver lets Preflight pass while Service chains are live in the other
	// flavour.
	TakeOver bool

	// LocalMode says how to tell the traffic of pods, ClusterCIDRs and
	// PodInterface by what.
	LocalMode    LocalMode
	ClusterCIDRs []netip.Prefix
	PodInterface string
	// MasqueradeAll masquerades all traffic to cluster IPs.
	MasqueradeAll bool
	// MasqueradeMark is the packet mark for traffic to be masqueraded, one
	// bit (kube-proxy's masqueradeBit as 1<<bit). Zero means 0x4000.
	MasqueradeMark uint32
	// LocalhostNodePorts serves node ports on 127.0.0.0/8 and guards the hole
	// that the sysctl route_localnet makes. IPv4 only.
	LocalhostNodePorts bool
	// NodePortAddresses limits node ports to those of the node's addresses
	// that are in one of the ranges. A family of which there is no range
	// serves them on all. Without a range that holds loopback addresses,
	// LocalhostNodePorts does not count.
	NodePortAddresses []netip.Prefix
	// NodePortPrimary limits them to the Node's first address of each family.
	NodePortPrimary bool
	// LocalAddrs tells the node's addresses for NodePortAddresses, as
	// InterfaceAddrs does. Nil means the Node's and 127.0.0.1. Render calls it.
	LocalAddrs func() []netip.Addr
	// KeepInvalid leaves out the rule that drops packets which connection
	// tracking calls invalid, as is right where nf_conntrack_tcp_be_liberal
	// is on.
	KeepInvalid bool
	// Counters says that the kernel has the packet counters CounterInvalid
	// and CounterLocalhost, which rules then feed; see EnsureCounters.
	Counters bool

	// Reroute adds the chain in which Reroute writes.
	Reroute bool

	// Trace adds the NFLOG rules.
	Trace bool
	// NFLogGroup is the group they report to. Zero means 100.
	NFLogGroup uint16
	// RequestGroup adds rules that report, to this group of their own, packets
	// from clients with the text "traceparent:" near their head. Zero means
	// none: it is the only thing that looks into what a connection carries.
	RequestGroup uint16
}

// DefaultMark and DefaultNFLogGroup stand for zero in Config.
const (
	DefaultMark       = 0x4000
	DefaultNFLogGroup = 100
)

// What of each packet the NFLOG rules copy, in bytes from the IP header on.
// Decoders need both headers without options, 40 bytes for IPv4 and 60 for
// IPv6; an ICMP error quotes another packet behind its own 28 or 48 bytes.
const (
	nflogSize     = 64
	nflogSizeICMP = 128
)

// What a request is searched for, from where to where in bytes from the IP
// header on, and how much of it is copied: what begins before the end of the
// search, with room for the header's value.
const (
	requestText     = "traceparent:"
	requestFrom     = 40
	requestTo       = 1500
	nflogSizeHeader = requestTo + 100
)

func (c Config) withDefaults() Config {
	if c.Flavour == "" {
		c.Flavour = "auto"
	}
	if c.MasqueradeMark == 0 {
		c.MasqueradeMark = DefaultMark
	}
	if c.NFLogGroup == 0 {
		c.NFLogGroup = DefaultNFLogGroup
	}
	return c
}

// InterfaceAddrs is proxy.InterfaceAddrs.
func InterfaceAddrs() []netip.Addr { return proxy.InterfaceAddrs() }

// ours reports whether an address is of the family.
func (c *Config) ours(a netip.Addr) bool {
	return a.IsValid() && !a.Is4In6() && a.Is6() == (c.Family == xtables.IPv6)
}
