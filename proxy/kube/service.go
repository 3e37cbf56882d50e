package kube

import (
	"fmt"
	"net/netip"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/proxy"
)

const (
	labelProxyName = "service.kubernetes.io/service-proxy-name"
	labelHeadless  = corev1.IsHeadlessService

	defaultAffinity = 10800 * time.Second
	maxAffinity     = 86400
)

// part is a Part in the making.
type part struct {
	Part
	node string
	pods map[netip.Addr]proxy.Pod
}

// bad notes a fault of one field of an object.
func (p *part) bad(kind, name, field, format string, args ...any) {
	p.Problems = append(p.Problems, proxy.Problem{
		Object: objectName(kind, p.Namespace, name), Field: field, Message: fmt.Sprintf(format, args...),
	})
}

// skip says why a Service is not proxied on purpose, empty if it is.
func skip(svc *corev1.Service) string {
	_, other := svc.Labels[labelProxyName]
	switch {
	case other:
		return "service-proxy-name"
	case svc.Spec.Type == corev1.ServiceTypeExternalName:
		return "ExternalName"
	case svc.Spec.ClusterIP == corev1.ClusterIPNone || len(svc.Spec.ClusterIPs) > 0 && svc.Spec.ClusterIPs[0] == corev1.ClusterIPNone:
		return "headless"
	}
	return ""
}

func (p *part) service(svc *corev1.Service) {
	bad := func(field, format string, args ...any) { p.bad("Service", svc.Name, field, format, args...) }
	ips := p.clusterIPs(svc)
	affinity, scheduler := p.affinity(svc), p.scheduler(svc)
	if len(svc.Spec.Ports) == 0 {
		bad("spec.ports", "is empty: a Service needs at least one port")
	}
	names := map[proxy.PortName]bool{}
	for i, port := range svc.Spec.Ports {
		field := fmt.Sprintf("spec.ports[%d]", i)
		proto, err := conntrack.ParseProto(string(port.Protocol))
		if port.Protocol == "" {
			proto, err = conntrack.TCP, nil
		}
		if err != nil || proto == conntrack.ICMP || proto == conntrack.ICMPv6 {
			bad(field+".protocol", "%q is not TCP, UDP or SCTP", port.Protocol)
			continue
		}
		if port.Port < 1 || port.Port > 65535 {
			bad(field+".port", "%d is not within 1 to 65535", port.Port)
			continue
		}
		s := proxy.Service{
			Name: proxy.PortName{Namespace: svc.Namespace, Name: svc.Name, Port: port.Name, Proto: proto},
			Type: string(svc.Spec.Type), Port: uint16(port.Port), Affinity: affinity, Scheduler: scheduler,
		}
		if names[s.Name] {
			bad(field+".name", "port name %q is used twice for %s; this port is left out", port.Name, proto)
			continue
		}
		names[s.Name] = true
		if s.Type == "" {
			s.Type = string(corev1.ServiceTypeClusterIP)
		}
		if p := svc.Spec.InternalTrafficPolicy; p != nil {
			s.InternalLocal = *p == corev1.ServiceInternalTrafficPolicyLocal
		}
		s.ExternalLocal = svc.Spec.ExternalTrafficPolicy == corev1.ServiceExternalTrafficPolicyLocal
		if s.ExternalLocal && svc.Spec.Type == corev1.ServiceTypeLoadBalancer {
			if n := svc.Spec.HealthCheckNodePort; n < 0 || n > 65535 {
				bad("spec.healthCheckNodePort", "%d is not within 1 to 65535", n)
			} else {
				s.HealthCheckNodePort = uint16(n)
			}
		}
		if s.Type != string(corev1.ServiceTypeClusterIP) && port.NodePort != 0 {
			if port.NodePort < 1 || port.NodePort > 65535 {
				bad(field+".nodePort", "%d is not within 1 to 65535", port.NodePort)
			} else {
				s.NodePort = uint16(port.NodePort)
			}
		}
		for _, ip := range ips {
			s := s
			s.ClusterIP = ip
			p.Services = append(p.Services, s)
		}
	}
	// What is one per family is read once, so that a fault is said once.
	p.addresses(svc)
}

// clusterIPs returns at most one address of each family.
func (p *part) clusterIPs(svc *corev1.Service) []netip.Addr {
	bad := func(field, format string, args ...any) { p.bad("Service", svc.Name, field, format, args...) }
	field, texts := "spec.clusterIP", []string{svc.Spec.ClusterIP}
	if len(svc.Spec.ClusterIPs) > 0 {
		texts = svc.Spec.ClusterIPs
		if len(texts) > 1 {
			field = "spec.clusterIPs"
		}
		if ip := svc.Spec.ClusterIP; ip != "" && ip != texts[0] {
			bad("spec.clusterIP", "%s is not the first of spec.clusterIPs, which are used", ip)
		}
	}
	var ips []netip.Addr
	for _, text := range texts {
		ip, err := parseAddr(text)
		switch {
		case text == "":
			bad(field, "is empty: give the Service an address from the service range, or None")
		case err != nil:
			bad(field, "%v", err)
		case len(ips) > 0 && (len(ips) > 1 || ips[0].Is6() == ip.Is6()):
			bad(field, "%s is a second address of its family; it is left out", ip)
		default:
			ips = append(ips, ip)
		}
	}
	return ips
}

func (p *part) affinity(svc *corev1.Service) time.Duration {
	switch svc.Spec.SessionAffinity {
	case "", corev1.ServiceAffinityNone:
		return 0
	case corev1.ServiceAffinityClientIP:
	default:
		p.bad("Service", svc.Name, "spec.sessionAffinity", "%q is neither None nor ClientIP; None is used", svc.Spec.SessionAffinity)
		return 0
	}
	a := svc.Spec.SessionAffinityConfig
	if a == nil || a.ClientIP == nil || a.ClientIP.TimeoutSeconds == nil {
		return defaultAffinity
	}
	t := *a.ClientIP.TimeoutSeconds
	if t < 1 || t > maxAffinity {
		p.bad("Service", svc.Name, "spec.sessionAffinityConfig.clientIP.timeoutSeconds",
			"%d is not within 1 to %d; the default of %d is used", t, maxAffinity, int(defaultAffinity.Seconds()))
		return defaultAffinity
	}
	return time.Duration(t) * time.Second
}

// addresses gives every port the external addresses of its own family.
func (p *part) addresses(svc *corev1.Service) {
	parse := func(field, text string) (netip.Addr, bool) {
		ip, err := parseAddr(text)
		if err != nil {
			p.bad("Service", svc.Name, field, "%v", err)
		}
		return ip, err == nil
	}
	var external, lb [2][]netip.Addr // IPv4, IPv6
	for i, text := range svc.Spec.ExternalIPs {
		if ip, ok := parse(fmt.Sprintf("spec.externalIPs[%d]", i), text); ok {
			external[family(ip)] = append(external[family(ip)], ip)
		}
	}
	for i, in := range svc.Status.LoadBalancer.Ingress {
		if in.IP == "" || in.IPMode != nil && *in.IPMode != corev1.LoadBalancerIPModeVIP {
			continue
		}
		if ip, ok := parse(fmt.Sprintf("status.loadBalancer.ingress[%d].ip", i), in.IP); ok {
			lb[family(ip)] = append(lb[family(ip)], ip)
		}
	}
	var sources [2][]netip.Prefix
	var all [2]bool
	for i, text := range svc.Spec.LoadBalancerSourceRanges {
		r, err := parsePrefix(text)
		if err != nil {
			p.bad("Service", svc.Name, fmt.Sprintf("spec.loadBalancerSourceRanges[%d]", i), "%v", err)
			continue
		}
		f := family(r.Addr())
		sources[f] = append(sources[f], r)
		all[f] = all[f] || r.Bits() == 0
	}
	for i := range p.Services {
		s := &p.Services[i]
		f := family(s.ClusterIP)
		s.ExternalIPs, s.LoadBalancerIPs, s.SourceRanges = external[f], lb[f], sources[f]
		if all[f] {
			s.SourceRanges = nil // a range of everything is no limit
		}
	}
}

func family(ip netip.Addr) int {
	if ip.Is6() {
		return 1
	}
	return 0
}
