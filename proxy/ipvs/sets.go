package ipvs

import (
	"fmt"
	"net/netip"
	"strings"

	"github.com/kptrace/kptrace/conntrack"
)

// set is an ipset of ours.
type set uint8

// The sets, kube-proxy's first, then those that are our own.
const (
	setLoopBack set = iota
	setClusterIP
	setExternalIP
	setExternalIPLocal
	setLoadBalancer
	setLoadBalancerLocal
	setLoadBalancerFW
	setSourceCIDR
	setSourceIP
	setNodePortTCP
	setNodePortUDP
	setNodePortSCTP
	setNodePortLocalTCP
	setNodePortLocalUDP
	setNodePortLocalSCTP
	setHealthCheck
	setIPs
	setNoEndpoints
	setNoLocal
	setVirtual
	setReal
	numSets
)

// The types of sets.
const (
	typeIP         = "hash:ip"
	typeIPPort     = "hash:ip,port"
	typeIPPortIP   = "hash:ip,port,ip"
	typeIPPortNet  = "hash:ip,port,net"
	typeBitmapPort = "bitmap:port"
)

// setDef is a set's name for IPv4 and its type.
type setDef struct{ name, kind string }

func (s set) def() setDef {
	return [numSets]setDef{
		setLoopBack:          {"KUBE-LOOP-BACK", typeIPPortIP},
		setClusterIP:         {"KUBE-CLUSTER-IP", typeIPPort},
		setExternalIP:        {"KUBE-EXTERNAL-IP", typeIPPort},
		setExternalIPLocal:   {"KUBE-EXTERNAL-IP-LOCAL", typeIPPort},
		setLoadBalancer:      {"KUBE-LOAD-BALANCER", typeIPPort},
		setLoadBalancerLocal: {"KUBE-LOAD-BALANCER-LOCAL", typeIPPort},
		setLoadBalancerFW:    {"KUBE-LOAD-BALANCER-FW", typeIPPort},
		setSourceCIDR:        {"KUBE-LOAD-BALANCER-SOURCE-CIDR", typeIPPortNet},
		setSourceIP:          {"KUBE-LOAD-BALANCER-SOURCE-IP", typeIPPortIP},
		setNodePortTCP:       {"KUBE-NODE-PORT-TCP", typeBitmapPort},
		setNodePortUDP:       {"KUBE-NODE-PORT-UDP", typeBitmapPort},
		setNodePortSCTP:      {"KUBE-NODE-PORT-SCTP-HASH", typeIPPort},
		setNodePortLocalTCP:  {"KUBE-NODE-PORT-LOCAL-TCP", typeBitmapPort},
		setNodePortLocalUDP:  {"KUBE-NODE-PORT-LOCAL-UDP", typeBitmapPort},
		setNodePortLocalSCTP: {"KUBE-NODE-PORT-LOCAL-SCTP-HASH", typeIPPort},
		setHealthCheck:       {"KUBE-HEALTH-CHECK-NODE-PORT", typeBitmapPort},
		setIPs:               {"KUBE-IPVS-IPS", typeIP},
		setNoEndpoints:       {"KPTRACE-NO-ENDPOINTS", typeIPPort},
		setNoLocal:           {"KPTRACE-NO-LOCAL", typeIPPort},
		setVirtual:           {"KPTRACE-VIRTUAL", typeIPPort},
		setReal:              {"KPTRACE-REAL", typeIPPort},
	}[s]
}

// maxSetName is the longest name of a set (IPSET_MAXNAMELEN without its NUL).
const maxSetName = 31

// name is the set's name in a family, as kube-proxy makes it.
func (s set) name(ip6 bool) string {
	name := s.def().name
	if ip6 {
		prefix, rest, _ := strings.Cut(name, "-")
		name = prefix + "-6-" + rest
	}
	return name[:min(len(name), maxSetName)]
}

// setNamed finds a set by its name.
func setNamed(name string) (s set, ip6, ok bool) {
	for s := range numSets {
		for _, ip6 := range []bool{false, true} {
			if s.name(ip6) == name {
				return s, ip6, true
			}
		}
	}
	return 0, false, false
}

// entry is a member of a set. It is comparable.
type entry struct {
	set   set
	ip6   bool
	proto conntrack.Proto
	port  uint16
	// ip is invalid for sets of ports alone; other is the second address or,
	// with bits, network.
	ip, other netip.Addr
	bits      uint8
}

// String writes the entry as ipset does.
func (e entry) String() string {
	switch e.set.def().kind {
	case typeBitmapPort:
		return fmt.Sprint(e.port)
	case typeIP:
		return e.ip.String()
	}
	s := fmt.Sprintf("%s,%s:%d", e.ip, e.proto, e.port)
	switch {
	case e.set.def().kind == typeIPPortNet:
		s += "," + netip.PrefixFrom(e.other, int(e.bits)).String()
	case e.other.IsValid():
		s += "," + e.other.String()
	}
	return s
}
