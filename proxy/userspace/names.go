package userspace

import (
	"crypto/sha256"
	"encoding/base32"
	"net/netip"

	"github.com/kptrace/kptrace/proxy"
)

// The chains, as kube-proxy named them.
const (
	chainContainer         = "KUBE-PORTALS-CONTAINER"
	chainHost              = "KUBE-PORTALS-HOST"
	chainNodePortContainer = "KUBE-NODEPORT-CONTAINER"
	chainNodePortHost      = "KUBE-NODEPORT-HOST"
	chainNonLocal          = "KUBE-NODEPORT-NON-LOCAL"
	// chainRefuse is ours: the old mode accepted connections to Services
	// without endpoints and closed them.
	chainRefuse = "KUBE-PORTALS-REFUSE"
)

// chainKey is a chain in its table.
type chainKey struct{ table, chain string }

// chains lists all of ours, in the order in which they are written.
func chains() []chainKey {
	return []chainKey{
		{"filter", chainNonLocal}, {"filter", chainRefuse},
		{"nat", chainContainer}, {"nat", chainHost}, {"nat", chainNodePortContainer}, {"nat", chainNodePortHost},
	}
}

func owned(table, chain string) bool {
	for _, k := range chains() {
		if k == (chainKey{table, chain}) {
			return true
		}
	}
	return false
}

// chainPrefixes are what the names of our chains begin with.
func chainPrefixes() []string { return []string{"KUBE-PORTALS-", "KUBE-NODEPORT-"} }

// hash is the part of a tag that tells Services and endpoints apart.
func hash(s string) string {
	sum := sha256.Sum256([]byte(s))
	return base32.StdEncoding.EncodeToString(sum[:])[:16]
}

// serviceHash and endpointHash are those of iptables mode, so that tags mean
// the same in both.
func serviceHash(n proxy.PortName) string { return hash(n.String() + n.Proto.String()) }

func endpointHash(n proxy.PortName, ep netip.AddrPort) string {
	return hash(n.String() + n.Proto.String() + ep.String())
}
