package prom

import (
	"cmp"
	"slices"
	"strings"

	"github.com/kptrace/kptrace/proxy"
)

// changes counts the Services (not their ports) that differ between two
// Snapshots, and those whose endpoints do. Nil is a Snapshot without Services.
func changes(a, b *proxy.Snapshot) (services, endpoints int) {
	if a == b {
		return 0, 0
	}
	var before, after []proxy.Service
	if a != nil {
		before = a.Services
	}
	if b != nil {
		after = b.Services
	}
	for len(before) > 0 || len(after) > 0 {
		n, m := run(before), run(after)
		if n > 0 && m > 0 {
			x, y := before[0].Name, after[0].Name
			switch c := cmp.Or(strings.Compare(x.Namespace, y.Namespace), strings.Compare(x.Name, y.Name)); {
			case c < 0:
				m = 0
			case c > 0:
				n = 0
			}
		}
		if !slices.EqualFunc(before[:n], after[:m], sameSpec) {
			services++
		}
		if !sameEndpoints(before[:n], after[:m]) {
			endpoints++
		}
		before, after = before[n:], after[m:]
	}
	return services, endpoints
}

// run is how many of the first elements belong to one Service.
func run(s []proxy.Service) int {
	n := 0
	for n < len(s) && s[n].Name.Namespace == s[0].Name.Namespace && s[n].Name.Name == s[0].Name.Name {
		n++
	}
	return n
}

func sameSpec(a, b proxy.Service) bool {
	return a.Name == b.Name && a.Type == b.Type && a.ClusterIP == b.ClusterIP && a.Port == b.Port &&
		a.NodePort == b.NodePort && slices.Equal(a.ExternalIPs, b.ExternalIPs) &&
		slices.Equal(a.LoadBalancerIPs, b.LoadBalancerIPs) && slices.Equal(a.SourceRanges, b.SourceRanges) &&
		a.Affinity == b.Affinity && a.InternalLocal == b.InternalLocal && a.ExternalLocal == b.ExternalLocal &&
		a.HealthCheckNodePort == b.HealthCheckNodePort
}

func sameEndpoints(a, b []proxy.Service) bool {
	for i := range max(len(a), len(b)) {
		var x, y []proxy.Endpoint
		if i < len(a) {
			x = a[i].Endpoints
		}
		if i < len(b) {
			y = b[i].Endpoints
		}
		if len(x) == len(y) && (len(x) == 0 || &x[0] == &y[0]) {
			continue
		}
		if !slices.EqualFunc(x, y, sameEndpoint) {
			return false
		}
	}
	return true
}

func sameEndpoint(a, b proxy.Endpoint) bool {
	return a.Addr == b.Addr && a.Ready == b.Ready && a.Serving == b.Serving && a.Terminating == b.Terminating &&
		a.Local == b.Local && a.Node == b.Node && a.Zone == b.Zone &&
		slices.Equal(a.ZoneHints, b.ZoneHints) && slices.Equal(a.NodeHints, b.NodeHints)
}
