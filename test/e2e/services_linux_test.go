//go:build e2e

package e2e

import (
	"strconv"

	corev1 "k8s.io/api/core/v1"
)

// fixture has a Service for everything that shapes iptables rules.
func fixture() *objects {
	o := &objects{}

	o.add("clusterip", "http:80", "a,b,c local")
	o.add("one", "http:80", "a")
	o.add("ports", "http:80 https:443", "a,b local")
	o.add("unnamed", ":80", "a,b")
	o.add("udp", "dns:53/UDP", "a,b")
	o.add("sctp", "s:132/SCTP", "a,b")
	o.add("protocols", "t:53 u:53/UDP s:53/SCTP", "a,b", nodePort)
	o.add("many", "http:80", "a,b,c,d,e,f,g,h,i")
	o.add("v4", "http:80", "a,b", single(corev1.IPv4Protocol), nodePort)
	o.add("v6", "http:80", "a,b", single(corev1.IPv6Protocol), nodePort)

	o.add("nodeport", "http:80 dns:53/UDP", "a,b local", nodePort)
	o.add("external", "http:80", "a,b local", externalIPs(1))
	o.add("lb", "http:80", "a,b local", loadBalancer(1))
	o.add("lb-udp", "dns:53/UDP", "a,b local", loadBalancer(2))
	o.add("lb-proxy", "http:80", "a,b local", loadBalancer(3), func(s *corev1.Service) {
		for i := range s.Status.LoadBalancer.Ingress {
			s.Status.LoadBalancer.Ingress[i].IPMode = ptr(corev1.LoadBalancerIPModeProxy)
		}
	})
	o.add("lb-vip", "http:80", "a,b local", loadBalancer(4), func(s *corev1.Service) {
		for i := range s.Status.LoadBalancer.Ingress {
			s.Status.LoadBalancer.Ingress[i].IPMode = ptr(corev1.LoadBalancerIPModeVIP)
		}
	})
	o.add("lb-name", "http:80", "a", loadBalancer(5), func(s *corev1.Service) {
		s.Status.LoadBalancer.Ingress = []corev1.LoadBalancerIngress{{Hostname: "lb.example.org"}}
	})
	o.add("lb-pending", "http:80", "a", loadBalancer(5), func(s *corev1.Service) {
		s.Status.LoadBalancer.Ingress = nil
	})
	o.add("lb-no-nodeport", "http:80", "a", loadBalancer(6), func(s *corev1.Service) {
		s.Spec.AllocateLoadBalancerNodePorts = ptr(false)
	})
	o.add("everything", "http:80 dns:53/UDP", "a,b local", loadBalancer(7), externalIPs(2), affinity(600),
		ranges("10.0.0.0/8", "fd00:10::/32"))

	o.add("ranges", "http:80", "a,b", loadBalancer(10), ranges("203.0.113.0/24", " 198.51.100.128/25 ", "fd00:5::/32"))
	o.add("ranges-node", "http:80", "a,b", loadBalancer(11), ranges("192.0.2.0/24", "fd00:1::/64"))
	o.add("ranges-all", "http:80", "a,b", loadBalancer(12), ranges("0.0.0.0/0", "::/0"))
	o.add("ranges-all-too", "http:80", "a,b", loadBalancer(13), ranges("203.0.113.0/24", "0.0.0.0/0", "fd00:5::/32"))
	o.add("ranges-v4", "http:80", "a,b", loadBalancer(14), ranges("203.0.113.7/32"))
	o.add("ranges-many", "http:80", "a,b", loadBalancer(15), ranges("203.0.113.9/32", "203.0.113.3/32", "10.0.0.0/8", "fd00:7::/32", "fd00:6::/32"))
	o.add("ranges-two-ips", "http:80", "a,b", loadBalancer(16), loadBalancer(17), ranges("192.0.2.1/32", "fd00:1::1/128"))
	o.add("ranges-none", "http:80", "", loadBalancer(18), ranges("203.0.113.0/24"))
	o.add("ranges-local", "http:80", "a", loadBalancer(19), externalLocal, ranges("203.0.113.0/24", "fd00:5::/32"))

	o.add("affinity", "http:80", "a,b,c", affinity(0))
	o.add("affinity-short", "dns:53/UDP", "a,b", affinity(10), nodePort)
	o.add("affinity-one", "http:80", "a", affinity(86400))
	o.add("affinity-local", "http:80", "a,b local,c local", affinity(0), nodePort, externalLocal, internalLocal)

	o.add("none", "http:80", "", nodePort)
	o.add("none-udp", "dns:53/UDP", "")
	o.add("none-sctp", "s:132/SCTP", "", externalIPs(3))
	o.add("none-lb", "http:80", "", loadBalancer(20), externalIPs(4))
	o.add("unready", "http:80", "a unready,b unready", nodePort)
	o.add("dead", "http:80", "a dead,b dead", nodePort)

	o.add("internal-local", "http:80", "a,b local,c local", internalLocal)
	o.add("internal-local-missing", "http:80", "a,b", internalLocal)
	o.add("internal-local-nodeport", "http:80", "a,b", internalLocal, nodePort)
	o.add("internal-local-none", "http:80", "", internalLocal)
	o.add("external-local", "http:80", "a,b local,c local", nodePort, externalLocal)
	o.add("external-local-missing", "http:80 dns:53/UDP", "a,b", nodePort, externalLocal)
	o.add("external-local-none", "http:80", "", nodePort, externalLocal)
	o.add("external-local-ips", "http:80", "a,b", loadBalancer(21), externalLocal, externalIPs(5))
	o.add("external-local-lb", "http:80 https:443", "a,b local", loadBalancer(22), externalLocal)
	o.add("both-local", "http:80", "a,b local", loadBalancer(23), externalLocal, internalLocal)
	o.add("both-local-missing", "http:80", "a,b", loadBalancer(24), externalLocal, internalLocal)

	o.add("terminating", "http:80", "a terminating,b terminating local,c dead")
	o.add("terminating-some", "http:80", "a terminating,b,c unready")
	o.add("terminating-local", "http:80", "a,b terminating local", nodePort, externalLocal)
	o.add("terminating-internal", "http:80", "a,b terminating local", internalLocal)
	o.add("terminating-all", "http:80", "a terminating,b terminating local", nodePort, externalLocal, internalLocal)
	o.add("published", "http:80", "a unready,b", func(s *corev1.Service) { s.Spec.PublishNotReadyAddresses = true })

	o.add("zone", "http:80", "a zone=zone1,b zone=zone2,c zone=zone1 zone=zone2")
	o.add("zone-unhinted", "http:80", "a zone=zone1,b")
	o.add("zone-elsewhere", "http:80", "a zone=zone2,b zone=zone3")
	o.add("zone-unready", "http:80", "a zone=zone1,b zone=zone2,c unready")
	o.add("zone-terminating", "http:80", "a zone=zone1 terminating,b zone=zone2 terminating")
	o.add("zone-local", "http:80", "a zone=zone1,b local zone=zone2", nodePort, externalLocal)
	o.add("node", "http:80", "a node=node2 zone=zone2,b local node=node1 zone=zone1,c zone=zone1 node=node3")
	o.add("node-elsewhere", "http:80", "a node=node2 zone=zone1,b node=node3 zone=zone2")
	o.add("node-some", "http:80", "a node=node1 zone=zone1,b zone=zone1,c zone=zone2")

	o.add("headless", "http:80", "a,b", func(s *corev1.Service) { s.Spec.ClusterIP = corev1.ClusterIPNone })
	o.add("foreign", "http:80", "a,b", func(s *corev1.Service) {
		s.Labels = map[string]string{"service.kubernetes.io/service-proxy-name": "another"}
	})
	o.add("foreign-empty", "http:80", "a,b", func(s *corev1.Service) {
		s.Labels = map[string]string{"service.kubernetes.io/service-proxy-name": ""}
	})
	o.add("name", "http:80", "", func(s *corev1.Service) {
		s.Spec = corev1.ServiceSpec{Type: corev1.ServiceTypeExternalName, ExternalName: "example.org"}
	})
	o.merged()
	return o
}

// merged adds a second slice to a Service: one address in both with different
// conditions, one in the second alone, ports that the Service does not have.
func (o *objects) merged() {
	o.add("merged", "http:80", "a terminating,b")
	s := o.services[len(o.services)-1]
	more := slice(s, "IPv4", "a,c local,d")
	more.Name += "-more"
	more.Ports = append(more.Ports, more.Ports[0])
	more.Ports[1].Name, more.Ports[1].Port = ptr("other"), ptr(int32(9999))
	o.slices = append(o.slices, more)
}

func nodePort(s *corev1.Service) { s.Spec.Type = corev1.ServiceTypeNodePort }

func externalLocal(s *corev1.Service) {
	s.Spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyLocal
}

func internalLocal(s *corev1.Service) {
	s.Spec.InternalTrafficPolicy = ptr(corev1.ServiceInternalTrafficPolicyLocal)
}

// externalIPs gives a Service the n-th pair of external addresses.
func externalIPs(n int) func(*corev1.Service) {
	return func(s *corev1.Service) {
		s.Spec.ExternalIPs = []string{"203.0.113.2" + strconv.Itoa(n), "fd00:e::" + strconv.Itoa(n), "203.0.113.1" + strconv.Itoa(n)}
	}
}

// loadBalancer gives a Service the n-th load balancer address of each family.
func loadBalancer(n int) func(*corev1.Service) {
	return func(s *corev1.Service) {
		s.Spec.Type = corev1.ServiceTypeLoadBalancer
		s.Status.LoadBalancer.Ingress = append(s.Status.LoadBalancer.Ingress,
			corev1.LoadBalancerIngress{IP: "198.18.0." + strconv.Itoa(n)}, corev1.LoadBalancerIngress{IP: "fd00:18::" + strconv.Itoa(n)})
	}
}

func ranges(cidrs ...string) func(*corev1.Service) {
	return func(s *corev1.Service) { s.Spec.LoadBalancerSourceRanges = cidrs }
}

// affinity is by client IP, with the default timeout for 0.
func affinity(seconds int32) func(*corev1.Service) {
	return func(s *corev1.Service) {
		s.Spec.SessionAffinity = corev1.ServiceAffinityClientIP
		if seconds > 0 {
			s.Spec.SessionAffinityConfig = &corev1.SessionAffinityConfig{ClientIP: &corev1.ClientIPConfig{TimeoutSeconds: &seconds}}
		}
	}
}

func single(f corev1.IPFamily) func(*corev1.Service) {
	return func(s *corev1.Service) {
		s.Spec.IPFamilyPolicy, s.Spec.IPFamilies = ptr(corev1.IPFamilyPolicySingleStack), []corev1.IPFamily{f}
	}
}
