package kube

import (
	"bytes"
	"fmt"
	"net/netip"
	"slices"

	discoveryv1 "k8s.io/api/discovery/v1"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/proxy"
)

// endpoints gives a Service port the endpoints of its name, protocol and
// family.
func (p *part) endpoints(s *proxy.Service, all []*discoveryv1.EndpointSlice) {
	total := 0
	for _, slice := range all {
		if _, ok := portOf(s, slice); ok {
			total += len(slice.Endpoints)
		}
	}
	if total == 0 {
		s.OtherPorts = otherPorts(s, all)
		return
	}
	list := make([]proxy.Endpoint, 0, total)
	at := make(map[netip.AddrPort]int, total)
	for _, slice := range all {
		port, ok := portOf(s, slice)
		if !ok {
			continue
		}
		for i := range slice.Endpoints {
			ep := &slice.Endpoints[i]
			ip, err := endpointAddr(slice, ep)
			if err != nil {
				continue
			}
			e := p.endpoint(slice, ep, netip.AddrPortFrom(ip, port))
			// The same address in several slices: one that is not
			// terminating wins.
			if i, ok := at[e.Addr]; !ok {
				at[e.Addr] = len(list)
				list = append(list, e)
			} else if list[i].Terminating && !e.Terminating {
				list[i] = e
			}
		}
	}
	if len(list) == 0 {
		return
	}
	// By their text, as kube-proxy has them.
	slices.SortFunc(list, func(a, b proxy.Endpoint) int {
		var x, y [64]byte
		return bytes.Compare(a.Addr.AppendTo(x[:0]), b.Addr.AppendTo(y[:0]))
	})
	s.Endpoints = list
}

// portOf returns the port that a slice's endpoints serve s on.
func portOf(s *proxy.Service, slice *discoveryv1.EndpointSlice) (uint16, bool) {
	want := discoveryv1.AddressTypeIPv4
	if s.Is6() {
		want = discoveryv1.AddressTypeIPv6
	}
	if slice.AddressType != want {
		return 0, false
	}
	for _, p := range slice.Ports {
		if p.Port == nil || *p.Port < 1 || *p.Port > 65535 || value(p.Name) != s.Name.Port {
			continue
		}
		proto := conntrack.TCP
		if p.Protocol != nil {
			var err error
			if proto, err = conntrack.ParseProto(string(*p.Protocol)); err != nil {
				continue
			}
		}
		if proto == s.Name.Proto {
			return uint16(*p.Port), true
		}
	}
	return 0, false
}

// otherPorts lists the ports that slices of the family have endpoints for.
func otherPorts(s *proxy.Service, all []*discoveryv1.EndpointSlice) []string {
	var names []string
	for _, slice := range all {
		if len(slice.Endpoints) == 0 || (slice.AddressType == discoveryv1.AddressTypeIPv6) != s.Is6() {
			continue
		}
		for _, p := range slice.Ports {
			proto := "TCP"
			if p.Protocol != nil {
				proto = string(*p.Protocol)
			}
			if name := value(p.Name) + "/" + proto; !slices.Contains(names, name) {
				names = append(names, name)
			}
		}
	}
	return names
}

// endpointAddr returns the address of an endpoint, which is its first one: the
// others have no meaning.
func endpointAddr(slice *discoveryv1.EndpointSlice, ep *discoveryv1.Endpoint) (netip.Addr, error) {
	if len(ep.Addresses) == 0 {
		return netip.Addr{}, fmt.Errorf("is empty")
	}
	ip, err := parseAddr(ep.Addresses[0])
	if err == nil && ip.Is6() != (slice.AddressType == discoveryv1.AddressTypeIPv6) {
		err = fmt.Errorf("%s does not fit addressType %s", ip, slice.AddressType)
	}
	return ip, err
}

// checkSlice reports faults of a slice once, whatever ports use it.
func (p *part) checkSlice(slice *discoveryv1.EndpointSlice) {
	bad := func(field, format string, args ...any) { p.bad("EndpointSlice", slice.Name, field, format, args...) }
	switch slice.AddressType {
	case discoveryv1.AddressTypeIPv4, discoveryv1.AddressTypeIPv6:
	case discoveryv1.AddressTypeFQDN:
		return // names are nothing to send packets to
	default:
		bad("addressType", "%q is not IPv4, IPv6 or FQDN", slice.AddressType)
		return
	}
	if len(slice.Ports) == 0 && len(slice.Endpoints) > 0 {
		bad("ports", "is empty: its %d endpoints are left out", len(slice.Endpoints))
	}
	for i, p := range slice.Ports {
		if p.Port == nil || *p.Port < 1 || *p.Port > 65535 {
			bad(fmt.Sprintf("ports[%d].port", i), "is missing or not within 1 to 65535: endpoints of port %q are left out", value(p.Name))
		}
	}
	for i := range slice.Endpoints {
		if _, err := endpointAddr(slice, &slice.Endpoints[i]); err != nil {
			bad(fmt.Sprintf("endpoints[%d].addresses", i), "%v", err)
		}
	}
}

func (p *part) endpoint(slice *discoveryv1.EndpointSlice, ep *discoveryv1.Endpoint, addr netip.AddrPort) proxy.Endpoint {
	e := proxy.Endpoint{
		Addr:        addr,
		Ready:       ep.Conditions.Ready == nil || *ep.Conditions.Ready,
		Serving:     ep.Conditions.Serving == nil || *ep.Conditions.Serving,
		Terminating: ep.Conditions.Terminating != nil && *ep.Conditions.Terminating,
		Node:        value(ep.NodeName),
		Zone:        value(ep.Zone),
	}
	e.Local = e.Node != "" && e.Node == p.node
	if r := ep.TargetRef; r != nil && (r.Kind == "Pod" || r.Kind == "") {
		e.Pod, e.Namespace = r.Name, r.Namespace
		if e.Namespace == "" {
			e.Namespace = slice.Namespace
		}
	}
	if e.Pod == "" || e.Node == "" {
		p.Looked = true
		pod := p.pods[addr.Addr()]
		if e.Pod == "" {
			e.Pod, e.Namespace = pod.Name, pod.Namespace
		}
		if e.Node == "" {
			e.Node = pod.Node // for display: an endpoint is local only if its slice says so
		}
	}
	if h := ep.Hints; h != nil {
		for _, z := range h.ForZones {
			e.ZoneHints = append(e.ZoneHints, z.Name)
		}
		for _, n := range h.ForNodes {
			e.NodeHints = append(e.NodeHints, n.Name)
		}
	}
	return e
}

func value[T any](p *T) T {
	if p == nil {
		var zero T
		return zero
	}
	return *p
}
