package trace

import (
	"net/netip"
	"time"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/proxy"
)

// VirtualServer is an IPVS virtual server with its statistics, whoever made it.
type VirtualServer struct {
	Addr  netip.AddrPort
	Proto conntrack.Proto
	// Service is the Service port it stands for; zero if it is none of ours.
	Service proxy.PortName
	// Scheduler is the kernel's name of it, such as "rr".
	Scheduler string
	// Persistence is the timeout of its templates; 0 without.
	Persistence time.Duration
	// Total is since it was made, as far as we were there; Rate is per second,
	// as the kernel estimates it every two seconds.
	Total, Rate Traffic
	Servers     []RealServer
}

// RealServer is one server of a VirtualServer.
type RealServer struct {
	Addr netip.AddrPort
	// Weight 0 takes no new connections. Active are established connections,
	// Inactive all others that IPVS has for it.
	Weight, Active, Inactive int
	// Persistent is how many clients its templates bind to it, as far as the
	// table of connections was read.
	Persistent  int
	Forwarding  Forwarding
	Total, Rate Traffic
}

// Traffic counts what IPVS passed on. In is from clients.
type Traffic struct {
	Connections, PacketsIn, PacketsOut, BytesIn, BytesOut uint64
}
