package iptables

import (
	"crypto/sha256"
	"encoding/base32"
	"net/netip"
	"strings"

	"github.com/kptrace/kptrace/proxy"
)

// The chains that serve all Services, as kube-proxy names them.
const (
	chainServices         = "KUBE-SERVICES"
	chainExternalServices = "KUBE-EXTERNAL-SERVICES"
	chainNodePorts        = "KUBE-NODEPORTS"
	chainPostrouting      = "KUBE-POSTROUTING"
	chainMarkMasq         = "KUBE-MARK-MASQ"
	chainForward          = "KUBE-FORWARD"
	chainProxyFirewall    = "KUBE-PROXY-FIREWALL"
	chainCanary           = "KUBE-PROXY-CANARY"
	// chainFirewall is shared with the kubelet.
	chainFirewall = "KUBE-FIREWALL"
	// chainTrace is our own, in mangle.
	chainTrace = "KPTRACE"
	// chainReroute is our own, in nat.
	chainReroute = "KPTRACE-REROUTE"
)

// The prefixes of chains that belong to one Service port.
const (
	prefixService  = "KUBE-SVC-" // policy Cluster
	prefixLocal    = "KUBE-SVL-" // policy Local
	prefixExternal = "KUBE-EXT-" // NodePort, external IPs, load balancers
	prefixFirewall = "KUBE-FW-"  // source ranges of load balancers
	prefixEndpoint = "KUBE-SEP-"
)

var servicePrefixes = [...]string{prefixService, prefixLocal, prefixExternal, prefixFirewall, prefixEndpoint}

// isServiceChain reports whether a chain of nat belongs to one Service port.
func isServiceChain(name string) bool {
	for _, p := range servicePrefixes {
		if strings.HasPrefix(name, p) {
			return true
		}
	}
	return false
}

// hash is the part of a chain's name that tells Services and endpoints apart.
func hash(s string) string {
	sum := sha256.Sum256([]byte(s))
	return base32.StdEncoding.EncodeToString(sum[:])[:16]
}

// serviceHash names a Service port's own chains.
func serviceHash(n proxy.PortName) string { return hash(n.String() + n.Proto.String()) }

// endpointHash names the chain of one of its endpoints.
func endpointHash(n proxy.PortName, ep netip.AddrPort) string {
	return hash(n.String() + n.Proto.String() + ep.String())
}
