package ipvs

import (
	"fmt"
	"log/slog"
	"net/netip"
	"time"

	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
)

// Config says how the mode works on this node. Its zero value is a kube-proxy
// without a local detector and without tracing, with scheduler rr.
type Config struct {
	// Tools says where the programs of iptables are and in which namespace
	// all of it is.
	Tools xtables.Tools
	// Flavour is "auto", "nft" or "legacy"; empty means auto.
	Flavour string
	// IPv4Only leaves IPv6 out. Preflight finds out by itself where the node
	// has none.
	IPv4Only bool

	// Scheduler is for Services that name none, as proxy.ParseScheduler reads
	// it; empty means rr.
	Scheduler string
	// ExcludeCIDRs are ranges in which virtual servers are never removed,
	// whosesoever they are.
	ExcludeCIDRs []netip.Prefix
	// TakeOver makes virtual servers of others ours: those at addresses of
	// Services are used, all others removed, as kube-proxy does.
	TakeOver bool
	// TCPTimeout, TCPFinTimeout and UDPTimeout are how long IPVS remembers
	// idle connections, in whole seconds; zero leaves the kernel's value.
	TCPTimeout, TCPFinTimeout, UDPTimeout time.Duration
	// GracePeriod is how long a TCP or SCTP endpoint that is gone may keep its
	// connections: 15 minutes if zero, which is the time after which IPVS
	// forgets an idle connection anyway. It gets no new ones.
	GracePeriod time.Duration
	// MaxElements bounds each hash set that is made: 1,048,576 if zero.
	MaxElements uint32

	// Detect says how to tell the traffic of pods.
	Detect proxy.DetectConfig
	// MasqueradeAll masquerades all traffic to cluster IPs.
	MasqueradeAll bool
	// MasqueradeMark is the packet mark for traffic to be masqueraded, one
	// bit. Zero means 0x4000.
	MasqueradeMark uint32
	// NodePorts says which of the node's addresses serve node ports; those of
	// the loopback network never do. Its LocalAddrs should leave out the
	// device kube-ipvs0, as LocalAddrs does.
	NodePorts proxy.NodePortConfig

	// Trace adds the NFLOG rules, which report to NFLogGroup (100 if zero).
	Trace      bool
	NFLogGroup uint16

	Logger *slog.Logger
}

// The defaults of Config.
const (
	DefaultScheduler   = "rr"
	DefaultGracePeriod = 15 * time.Minute
	defaultMark        = 0x4000
	defaultNFLogGroup  = 100
	defaultMaxElements = 1 << 20
)

// Device is the dummy device whose addresses make packets to Services come to
// IPVS, by kube-proxy's name.
const Device = "kube-ipvs0"

func (c Config) withDefaults() Config {
	if c.Flavour == "" {
		c.Flavour = "auto"
	}
	if c.Scheduler == "" {
		c.Scheduler = DefaultScheduler
	}
	if c.GracePeriod == 0 {
		c.GracePeriod = DefaultGracePeriod
	}
	if c.MaxElements == 0 {
		c.MaxElements = defaultMaxElements
	}
	if c.MasqueradeMark == 0 {
		c.MasqueradeMark = defaultMark
	}
	if c.NFLogGroup == 0 {
		c.NFLogGroup = defaultNFLogGroup
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return c
}

// Sysctl is a kernel setting that the mode needs, as a path below /proc/sys.
type Sysctl struct{ Name, Value string }

// Sysctls lists the settings that IPVS needs to work as a kube-proxy. They
// belong to the network namespace. strictARP has the node answer ARP for
// addresses of the asked interface alone, so that nobody takes it for the owner
// of addresses on kube-ipvs0. The kernel's release, as uname -r prints it, matters
// before Linux 5.9, where a client that used a port again was kept waiting.
func Sysctls(strictARP bool, release string) []Sysctl {
	list := []Sysctl{
		{"net/ipv4/vs/conntrack", "1"},
		{"net/ipv4/vs/expire_nodest_conn", "1"},
		{"net/ipv4/vs/expire_quiescent_template", "1"},
		{"net/ipv4/ip_forward", "1"},
	}
	var major, minor int
	if n, _ := fmt.Sscanf(release, "%d.%d", &major, &minor); n == 2 && (major < 5 || major == 5 && minor < 9) && (major > 4 || major == 4 && minor >= 1) {
		list = append(list, Sysctl{"net/ipv4/vs/conn_reuse_mode", "0"})
	}
	if strictARP {
		list = append(list, Sysctl{"net/ipv4/conf/all/arp_ignore", "1"}, Sysctl{"net/ipv4/conf/all/arp_announce", "2"})
	}
	return list
}
