package health

import (
	"fmt"
	"net/http"
	"net/netip"
	"strconv"

	"github.com/kptrace/kptrace/proxy"
)

// Service is a Service with a healthCheckNodePort.
type Service struct {
	Namespace, Name string
	Port            uint16
	// Local counts the ready endpoints on this node, each address once, in the
	// family that has more of them.
	Local int
}

// Services lists the Services of a Snapshot that have a healthCheckNodePort.
// Like kube-proxy, it counts endpoint addresses, not ports: a load balancer
// weighs nodes by pods. Terminating endpoints do not count, so that a load
// balancer turns away while they still serve.
func Services(snap *proxy.Snapshot) []Service {
	type key struct{ namespace, name string }
	var list []Service
	at := map[key]int{}
	local := map[key]*[2]map[netip.Addr]bool{} // by family
	for i := range snap.Services {
		s := &snap.Services[i]
		if s.HealthCheckNodePort == 0 || !s.ExternalLocal || s.Type != "LoadBalancer" {
			continue
		}
		k := key{s.Name.Namespace, s.Name.Name}
		if _, ok := at[k]; !ok {
			at[k], local[k] = len(list), &[2]map[netip.Addr]bool{{}, {}}
			list = append(list, Service{Namespace: k.namespace, Name: k.name, Port: s.HealthCheckNodePort})
		}
		for j := range s.Endpoints {
			if ep := &s.Endpoints[j]; ep.Local && ep.Ready {
				addr := ep.Addr.Addr()
				family := 0
				if addr.Is6() {
					family = 1
				}
				local[k][family][addr] = true
			}
		}
		list[at[k]].Local = max(len(local[k][0]), len(local[k][1]))
	}
	return list
}

// serviceHandler answers for one Service: 200 if it has a ready endpoint on
// this node and the proxy is healthy, else 503. The header
// X-Load-Balancing-Endpoint-Weight has the number of endpoints.
func serviceHandler(service func() Service, healthy func() bool) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		s, ok := service(), healthy()
		h := w.Header()
		h.Set("Content-Type", "application/json")
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("X-Load-Balancing-Endpoint-Weight", strconv.Itoa(s.Local))
		if s.Local > 0 && ok {
			w.WriteHeader(http.StatusOK)
		} else {
			w.WriteHeader(http.StatusServiceUnavailable)
		}
		fmt.Fprintf(w, "{\n\t\"service\": {\n\t\t\"namespace\": %q,\n\t\t\"name\": %q\n\t},\n\t\"localEndpoints\": %d,\n\t\"serviceProxyHealthy\": %v\n}",
			s.Namespace, s.Name, s.Local, ok)
	})
}
