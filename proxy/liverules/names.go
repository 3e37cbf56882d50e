package liverules

import (
	"crypto/sha256"
	"encoding/base32"
	"net/netip"
	"strings"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/proxy"
)

// The chains of kube-proxy that serve all Services.
const (
	chainServices         = "KUBE-SERVICES"
	chainExternalServices = "KUBE-EXTERNAL-SERVICES"
	chainNodePorts        = "KUBE-NODEPORTS"
	chainPostrouting      = "KUBE-POSTROUTING"
	chainMarkMasq         = "KUBE-MARK-MASQ"
	chainMarkDrop         = "KUBE-MARK-DROP"
	chainForward          = "KUBE-FORWARD"
	chainProxyFirewall    = "KUBE-PROXY-FIREWALL"
	chainFirewall         = "KUBE-FIREWALL"
	chainTrace            = "KPTRACE"
)

// Kind is what one chain of a Service port is for.
type Kind uint8

// The kinds of chains.
const (
	KindNone     Kind = iota
	KindCluster       // KUBE-SVC: choose among all endpoints
	KindLocal         // KUBE-SVL, before 1.24 KUBE-XLB: among those on the node
	KindExternal      // KUBE-EXT: traffic from outside
	KindFirewall      // KUBE-FW: source ranges of a load balancer
	KindEndpoint      // KUBE-SEP
)

var kinds = []struct {
	prefix string
	kind   Kind
}{
	{"KUBE-SVC-", KindCluster}, {"KUBE-SVL-", KindLocal}, {"KUBE-XLB-", KindLocal},
	{"KUBE-EXT-", KindExternal}, {"KUBE-FW-", KindFirewall}, {"KUBE-SEP-", KindEndpoint},
}

// KindOf tells the kind of a chain of nat by its name.
func KindOf(chain string) Kind {
	for _, k := range kinds {
		if strings.HasPrefix(chain, k.prefix) {
			return k.kind
		}
	}
	return KindNone
}

// Hash returns what tells the chains of a Service port apart: the 16 characters
// behind KUBE-SVC- and its kin. With an endpoint, those behind KUBE-SEP-.
func Hash(n proxy.PortName, endpoint netip.AddrPort) string {
	s := n.String() + n.Proto.String()
	if endpoint.IsValid() {
		s += endpoint.String()
	}
	sum := sha256.Sum256([]byte(s))
	return base32.StdEncoding.EncodeToString(sum[:])[:16]
}

// parseKey reads "namespace/name:port", the name of a Service port as it stands
// in comments.
func parseKey(key string, proto conntrack.Proto) (proxy.PortName, bool) {
	namespace, rest, ok := strings.Cut(key, "/")
	if !ok || namespace == "" || rest == "" || strings.ContainsAny(key, " \"") {
		return proxy.PortName{}, false
	}
	name, port, _ := strings.Cut(rest, ":")
	return proxy.PortName{Namespace: namespace, Name: name, Port: port, Proto: proto}, name != ""
}

// protocol reads the name that -p has.
func protocol(name string) (conntrack.Proto, bool) {
	for _, p := range []conntrack.Proto{conntrack.TCP, conntrack.UDP, conntrack.SCTP} {
		if p.String() == name {
			return p, true
		}
	}
	return 0, false
}
